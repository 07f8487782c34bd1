"""Example order: a pure function of (seed, place), every row once per epoch, rates as asked."""

import collections
import itertools
import subprocess
import sys

import numpy as np
import pytest

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.order import BLOCK, Mixture, Place, keyed, permute


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 1023, 1024, 1025, 4097])
def test_permute_is_a_bijection(size):
    for key in (0, 1, keyed("x"), 2**64 - 1):
        assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_reaches_every_place_of_a_source_too_large_to_list():
    size, key = 10**12 + 39, keyed("large")
    found = [permute(i, size, key) for i in range(2000)]
    assert len(set(found)) == 2000 and 0 <= min(found) and max(found) < size
    tenths = np.bincount(np.array(found) // (size // 10 + 1), minlength=10)
    assert tenths.min() > 150 and tenths.max() < 250  # 200 expected, deviation 13


@pytest.mark.parametrize("index", [-1, 5])
def test_permute_refuses_what_is_outside(index):
    with pytest.raises(IndexError, match="outside a permutation of 5"):
        permute(index, 5, 0)


@pytest.mark.parametrize("size", [1000, 1024, 2048, 4000])
@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_neighbours_are_uncorrelated(size, lag):
    # Under a linear congruence the differences of neighbours take two values; here they are as those of random draws.
    for seed in range(4):
        order = np.array([permute(i, size, keyed("neighbours", seed)) for i in range(size)])
        correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
        assert abs(correlation) < 4 / size**0.5
        differences = (order[lag:] - order[:-lag]) % size
        assert len(set(differences)) > 0.55 * size  # 1 - 1/e = 0.63 of all values for random draws
        _, repeats = np.unique(differences, return_counts=True)
        assert repeats.max() <= 9


def test_keys_give_unrelated_orders():
    orders = [[permute(i, 512, keyed("s", "zh", epoch)) for i in range(512)] for epoch in range(6)]
    for a, b in itertools.combinations(orders, 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 10  # 1 expected
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2


SIZES = {"zh": 5000, "en": 1111, "code": 37}
RATES = {"zh": 0.7, "en": 0.25, "code": 0.05}


@pytest.fixture(scope="module")
def places() -> list[Place]:
    mixture = Mixture(SIZES, RATES, seed=3)
    return [mixture.place(g) for g in range(8 * BLOCK)]


def test_every_block_holds_the_same_number_of_each_source(places):
    counts = Mixture(SIZES, RATES, seed=3).per_block
    assert sum(counts.values()) == BLOCK
    for start in range(0, len(places), BLOCK):
        assert collections.Counter(place.source for place in places[start : start + BLOCK]) == counts


def test_sources_alternate_within_a_block(places):
    for start in range(0, BLOCK, 256):
        share = sum(place.source == "zh" for place in places[start : start + 256]) / 256
        assert abs(share - 0.7) < 0.12  # four deviations


@pytest.mark.parametrize("source", SIZES)
def test_a_row_comes_once_per_epoch_and_no_epoch_starts_before_the_last_has_ended(places, source):
    own = [place for place in places if place.source == source]
    size = SIZES[source]
    for epoch, start in enumerate(range(0, len(own), size)):
        part = own[start : start + size]
        assert {place.epoch for place in part} == {epoch}
        assert len({place.index for place in part}) == len(part)
        if len(part) == size:
            assert {place.index for place in part} == set(range(size))


def test_epochs_have_orders_of_their_own(places):
    own = [place.index for place in places if place.source == "code"]
    assert len({tuple(own[start : start + 37]) for start in range(0, 37 * 20, 37)}) == 20


def test_the_place_depends_on_seed_and_number_alone(places):
    mixture = Mixture(SIZES, RATES, seed=3)
    for g in (7 * BLOCK + 5, 0, 4096, 17, 0):  # in no order, some twice
        assert mixture.place(g) == places[g]
    assert Mixture(dict(reversed(SIZES.items())), dict(reversed(RATES.items())), 3).place(999) == places[999]
    scaled = Mixture(SIZES, {name: 40 * rate for name, rate in RATES.items()}, 3)
    assert [scaled.place(g) for g in range(100)] == places[:100]
    other = Mixture(SIZES, RATES, seed=4)
    assert sum(other.place(g) == places[g] for g in range(1000)) < 50


def test_the_place_is_the_same_in_another_process(places):
    program = (
        "from ctllm_jax.data.order import Mixture\n"
        f"mixture = Mixture({SIZES!r}, {RATES!r}, 3)\n"
        "print([(p.source, p.epoch, p.index) for p in map(mixture.place, range(5000, 5050))])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str([(p.source, p.epoch, p.index) for p in places[5000:5050]])


def test_an_example_far_into_a_run_is_found_at_once():
    place = Mixture(SIZES, RATES, seed=3).place(10**15)
    assert 0 <= place.index < SIZES[place.source] and place.epoch > 10**9


def test_rates_are_honoured_to_one_place_of_a_block():
    random = np.random.default_rng(0)
    for _ in range(300):
        number = int(random.integers(1, 40))
        rates = {f"s{i}": float(r) for i, r in enumerate(random.lognormal(0, 2, number))}
        counts = Mixture(dict.fromkeys(rates, 10), rates, 0).per_block
        assert sum(counts.values()) == BLOCK and min(counts.values()) >= 1
        total = sum(rates.values())
        lifted = sum(rate / total * BLOCK < 1 for rate in rates.values())  # these take from the largest
        for name, rate in rates.items():
            away = abs(counts[name] - rate / total * BLOCK)
            assert away <= (1 if name != max(rates, key=rates.get) else max(1, lifted))


@pytest.mark.parametrize("number", [1500, BLOCK])
def test_many_tiny_sources_keep_a_place_each(number):
    rates = {f"s{i}": 1000.0 if i % 2 else 0.01 for i in range(number)}
    counts = Mixture(dict.fromkeys(rates, 10), rates, 0).per_block
    assert len(counts) == number and min(counts.values()) == 1 and sum(counts.values()) == BLOCK


def test_without_rates_sources_come_by_their_size():
    assert Mixture({"a": 300, "b": 100}, {}, 0).per_block == {"a": 1536, "b": 512}


def test_a_source_of_rate_zero_is_left_out():
    assert Mixture({"a": 300, "b": 100}, {"a": 1.0, "b": 0.0}, 0).per_block == {"a": BLOCK}


@pytest.mark.parametrize(
    ("sizes", "rates", "message"),
    [
        ({"zh": 5}, {"en": 1.0}, "'en', but the store has rows for: zh"),
        ({"zh": 5, "en": 0}, {"zh": 1.0, "en": 1.0}, "rate given for 'en'"),
        (dict.fromkeys(map(str, range(BLOCK + 1)), 5), {}, "has 2049 sources; it can hold 2048"),
        ({"zh": 5}, {"zh": 0.0}, "no source with a positive rate"),
        ({}, {}, "no source with a positive rate"),
        ({"zh": 5, "en": 5}, {"zh": 1.0, "en": -1.0}, "rate of 'en' is -1.0; rates are numbers"),
        ({"zh": 5}, {"zh": float("nan")}, "rate of 'zh' is nan"),
        ({"zh": 5}, {"zh": float("inf")}, "rate of 'zh' is inf"),
    ],
)
def test_rates_that_cannot_be_honoured_are_refused(sizes, rates, message):
    with pytest.raises(UserError, match=message):
        Mixture(sizes, rates, 0)
