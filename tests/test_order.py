"""Example order: a pure function of (seed, place), every row once per epoch, rates as asked."""

import collections
import itertools
import subprocess
import sys

import numpy as np
import pytest

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.order import BLOCK, Mixture, Phase, Place, keyed, permute, unpermute


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 1023, 1024, 1025, 4097])
def test_permute_is_a_bijection_and_unpermute_its_inverse(size):
    for key in (0, 1, keyed("x"), 2**64 - 1):
        order = permute(np.arange(size), size, key)
        assert sorted(order.tolist()) == list(range(size))
        np.testing.assert_array_equal(unpermute(order, size, key), np.arange(size))


def test_permute_reaches_every_place_of_a_source_too_large_to_list():
    size, key = 10**12 + 39, keyed("large")
    found = permute(np.arange(2000), size, key)
    assert len(set(found.tolist())) == 2000 and 0 <= found.min() and found.max() < size
    tenths = np.bincount(found // (size // 10 + 1), minlength=10)
    assert tenths.min() > 150 and tenths.max() < 250  # 200 expected, deviation 13
    np.testing.assert_array_equal(unpermute(found, size, key), np.arange(2000))


@pytest.mark.parametrize("index", [-1, 5])
def test_permute_refuses_what_is_outside(index):
    with pytest.raises(IndexError, match="not inside a permutation of 5"):
        permute(np.array([0, index]), 5, 0)


def correlated(order: np.ndarray, lag: int) -> bool:
    """Whether neighbours in an order know of each other: their differences are not as those of random draws."""
    size = len(order)
    differences = (order[lag:] - order[:-lag]) % size
    _, repeats = np.unique(differences, return_counts=True)
    few = len(set(differences)) <= 0.55 * size  # 1 - 1/e = 0.63 of all values for random draws
    return few or repeats.max() > 9 or abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) >= 4 / size**0.5


@pytest.mark.parametrize("size", [1000, 1024, 2048, 4000])
@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_neighbours_are_uncorrelated(size, lag):
    for seed in range(4):
        assert not correlated(permute(np.arange(size), size, keyed("neighbours", seed)), lag)


@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_a_linear_congruence_would_not_pass_for_uncorrelated(lag):
    order = (np.arange(1024) * 661 + 7) % 1024
    assert sorted(order) == list(range(1024)) and correlated(order, lag)


def test_keys_give_unrelated_orders():
    orders = [permute(np.arange(512), 512, keyed("s", "zh", epoch)) for epoch in range(6)]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 10  # 1 expected
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2


SIZES = {"zh": 5000, "en": 1111, "code": 37}
RATES = {"zh": 0.7, "en": 0.25, "code": 0.05}


def mixture(seed: int = 3, rates: dict = RATES, sizes: dict = SIZES) -> Mixture:
    return Mixture(sizes, [Phase(0, rates)], seed)


@pytest.fixture(scope="module")
def places() -> list[Place]:
    return mixture().places(range(8 * BLOCK))


def test_rates_are_met_within_one_block_at_every_prefix(places):
    prefix = np.arange(1, len(places) + 1)
    for source, rate in RATES.items():
        count = np.cumsum([place.source == source for place in places])
        assert np.abs(count - rate * prefix).max() < BLOCK
        assert np.abs(count[BLOCK - 1 :: BLOCK] - rate * prefix[BLOCK - 1 :: BLOCK]).max() < len(RATES)


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
    again = mixture()
    for g in (7 * BLOCK + 5, 0, 4096, 17, 0):  # in no order, some twice
        assert again.place(g) == places[g]
    assert again.places([9000, 3, 9000]) == [places[9000], places[3], places[9000]] and again.places([]) == []
    turned = mixture(rates=dict(reversed(RATES.items())), sizes=dict(reversed(SIZES.items())))
    assert turned.place(999) == places[999]
    scaled = mixture(rates={name: 64 * rate for name, rate in RATES.items()})
    assert scaled.places(range(100)) == places[:100]
    other = mixture(seed=4).places(range(1000))
    assert sum(a == b for a, b in zip(other, places, strict=False)) < 50


def test_the_place_is_the_same_in_another_process(places):
    program = (
        "from ctllm_jax.data.order import Mixture, Phase\n"
        f"mixture = Mixture({SIZES!r}, [Phase(0, {RATES!r})], 3)\n"
        "print([(p.source, p.epoch, p.index) for p in mixture.places(range(5000, 5050))])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str([(p.source, p.epoch, p.index) for p in places[5000:5050]])


# ---- Backwards


def test_where_a_row_was_shown_is_what_the_places_say(places):
    shown = collections.defaultdict(list)
    for g, place in enumerate(places):
        shown[place.source, place.index].append(g)
    backwards = mixture()
    for (source, index), examples in list(shown.items())[::7]:
        assert backwards.examples(source, index, len(places)) == examples
    first = max(examples[0] for examples in shown.values())  # a row whose turn comes late
    assert backwards.examples(places[first].source, places[first].index, first) == []
    assert backwards.examples(places[first].source, places[first].index, first + 1) == [first]


def test_a_row_is_found_far_into_a_run():
    far = mixture()
    for g in (10**9 + 7, 10**12 + 1):
        place = far.place(g)
        assert far._example_of(place.source, _nth(place)) == g


def _nth(place: Place) -> int:
    index = unpermute(np.array([place.index]), SIZES[place.source], keyed(3, place.source, place.epoch))[0]
    return place.epoch * SIZES[place.source] + int(index)


# ---- Rates that change

CHANGE, AGAIN = 3 * BLOCK + 777, 5 * BLOCK + 1
PHASES = [Phase(0, RATES), Phase(CHANGE, {"zh": 0.1, "en": 0.9}), Phase(AGAIN, {"code": 1.0, "en": 3.0})]


def test_a_change_of_rates_leaves_the_past_as_it_was(places):
    assert Mixture(SIZES, PHASES[:2], 3).places(range(CHANGE)) == places[:CHANGE]
    changed = Mixture(SIZES, PHASES[:2], 3).places(range(8 * BLOCK))
    assert Mixture(SIZES, PHASES, 3).places(range(AGAIN)) == changed[:AGAIN]
    assert changed[CHANGE : CHANGE + 500] != places[CHANGE : CHANGE + 500]


def test_rates_are_met_from_the_change_on_and_epochs_go_on():
    found = Mixture(SIZES, PHASES, 3).places(range(9 * BLOCK))
    for phase, stop in zip(PHASES, [CHANGE, AGAIN, len(found)], strict=True):
        part, total = found[phase.start : stop], sum(phase.rates.values())
        for source in SIZES:
            count = np.cumsum([place.source == source for place in part])
            rate = phase.rates.get(source, 0) / total
            assert np.abs(count - rate * np.arange(1, len(part) + 1)).max() < BLOCK
            assert rate > 0 or count[-1] == 0
    for source, size in SIZES.items():
        own = [place for place in found if place.source == source]
        assert [place.epoch for place in own] == [n // size for n in range(len(own))]
        for start in range(0, len(own), size):
            assert len({place.index for place in own[start : start + size]}) == len(own[start : start + size])


def test_rows_are_found_backwards_through_changes():
    changing = Mixture(SIZES, PHASES, 3)
    shown = collections.defaultdict(list)
    for g, place in enumerate(changing.places(range(9 * BLOCK))):
        shown[place.source, place.index].append(g)
    for (source, index), examples in list(shown.items())[::11]:
        assert changing.examples(source, index, 9 * BLOCK) == examples


# ---- Rates at their limits


def test_rates_stay_exact_however_many_sources_and_however_far():
    random = np.random.default_rng(0)
    for _ in range(30):
        number = int(random.integers(1, 40))
        rates = {f"s{i}": float(r) for i, r in enumerate(random.lognormal(0, 3, number))}
        total, block = sum(rates.values()), int(random.integers(0, 10**9))
        span = mixture(sizes=dict.fromkeys(rates, 10), rates=rates)._spans[0]
        counts, later = span.counts(block), span.counts(block + 1)
        assert sum(counts.values()) == block * BLOCK and sum(later.values()) == (block + 1) * BLOCK
        for name, rate in rates.items():
            assert later[name] >= counts[name]
            assert abs(counts[name] - rate / total * block * BLOCK) < number + block * BLOCK / 2**38


def test_a_source_rarer_than_once_a_block_still_comes():
    rare = mixture(sizes={"a": 5, "b": 5}, rates={"a": 0.3 / BLOCK, "b": 1.0}).places(range(20 * BLOCK))
    assert sum(place.source == "a" for place in rare) in (5, 6)


def test_without_rates_sources_come_by_their_size():
    found = mixture(sizes={"a": 300, "b": 100}, rates={}).places(range(BLOCK))
    assert collections.Counter(place.source for place in found) == {"a": 1536, "b": 512}


def test_a_source_of_rate_zero_is_left_out():
    found = mixture(sizes={"a": 300, "b": 100}, rates={"a": 1.0, "b": 0.0}).places(range(BLOCK))
    assert {place.source for place in found} == {"a"}


@pytest.mark.parametrize(
    ("sizes", "rates", "message"),
    [
        ({"zh": 5}, {"en": 1.0}, "'en', but the store has rows for: zh"),
        ({"zh": 5, "en": 0}, {"zh": 1.0, "en": 1.0}, "rate given for 'en'"),
        ({"zh": 5}, {"zh": 0.0}, "no source with a positive rate"),
        ({}, {}, "no source with a positive rate"),
        ({"zh": 5, "en": 5}, {"zh": 1.0, "en": -1.0}, "rate of 'en' is -1.0; rates are numbers"),
        ({"zh": 5}, {"zh": float("nan")}, "rate of 'zh' is nan"),
        ({"zh": 5}, {"zh": float("inf")}, "rate of 'zh' is inf"),
    ],
)
def test_rates_that_cannot_be_honoured_are_refused(sizes, rates, message):
    with pytest.raises(UserError, match=message):
        mixture(sizes=sizes, rates=rates)


@pytest.mark.parametrize("starts", [[], [5], [0, 7, 7], [0, 9, 3]])
def test_changes_that_do_not_ascend_from_the_start_are_refused(starts):
    with pytest.raises(UserError, match="ascend from 0"):
        Mixture(SIZES, [Phase(start, RATES) for start in starts], 0)
