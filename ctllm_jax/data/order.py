"""Which row stands at place g of the training stream: a pure function of (seed, g), with no iterator state.

A mixture lays sources out in blocks of `BLOCK` places, each block in an order of its own. How many places a source has
had by the end of a block is a whole number fixed by its rate, so that rates are met within one block at every prefix,
however long the run. The n-th place of a source takes row n mod size of its epoch's permutation. Permutations are
Feistel networks, not linear congruences, whose neighbours are correlated. All of it runs backwards too: where a row
was shown is as quick to find as what a place shows.

Rates may change: a `Phase` begins at an example and says what holds from there. Blocks begin anew with a phase and
counts go on, so a change leaves everything before it as it was.

Legend: N places asked for at once.
"""

import bisect
import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ctllm_jax.common.errors import UserError

BLOCK = 2048
_ROUNDS = 6
_ONE = 1 << 40  # rates are whole shares of this, so that counts are exact however far a run goes


def keyed(*parts: object) -> int:
    """A 64-bit key from parts that have a stable repr."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


# ---- Permutations


def permute(index_N: np.ndarray, size: int, key: int) -> np.ndarray:
    """Places of indices in the key's permutation of range(size): Feistel rounds, walked until they land inside.

    Raises:
      IndexError: an index is outside.
    """
    return _walk(index_N, size, [_round_key(key, number) for number in range(_ROUNDS)], _forward)


def unpermute(place_N: np.ndarray, size: int, key: int) -> np.ndarray:
    """The indices that `permute` sends to these places; IndexError as there."""
    return _walk(place_N, size, [_round_key(key, number) for number in reversed(range(_ROUNDS))], _backward)


def _walk(index_N: np.ndarray, size: int, keys: Sequence[np.uint64], rounds) -> np.ndarray:
    index_N = np.asarray(index_N, np.int64)
    if index_N.size and not 0 <= index_N.min() <= index_N.max() < size:
        raise IndexError(f"{index_N.min()} to {index_N.max()} is not inside a permutation of {size}")
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    found_N = rounds(index_N.astype(np.uint64), half, keys)
    while (outside_N := found_N >= size).any():
        found_N[outside_N] = rounds(found_N[outside_N], half, keys)
    return found_N.astype(np.int64)


def _forward(index_N: np.ndarray, half: np.uint64, keys: Sequence[np.uint64]) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left_N, right_N = index_N >> half, index_N & mask
    for key in keys:
        left_N, right_N = right_N, left_N ^ (mix(right_N ^ key) & mask)
    return left_N << half | right_N


def _backward(index_N: np.ndarray, half: np.uint64, keys: Sequence[np.uint64]) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left_N, right_N = index_N >> half, index_N & mask
    for key in keys:
        left_N, right_N = right_N ^ (mix(left_N ^ key) & mask), left_N
    return left_N << half | right_N


def _round_key(key: int, number: int) -> np.uint64:
    return np.uint64(key ^ number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)


def mix(x_N: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 whose bits all depend on all bits of x (arithmetic modulo 2^64)."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


# ---- Mixtures


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an example comes from: `index` is the row within the source, `epoch` how often it was gone through."""

    source: str
    epoch: int
    index: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """From example `start` on, sources come at these rates (any positive scale; empty: by their rows)."""

    start: int
    rates: Mapping[str, float]


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity
class _Span:
    """A phase with its arithmetic done: shares add up to their total; `before` holds each source's earlier places."""

    start: int
    stop: float  # of the next phase, or infinity
    shares: tuple[tuple[str, int], ...]
    before: Mapping[str, int]

    def counts(self, block: int) -> dict[str, int]:
        """Places of each source in the phase's first `block` blocks: never falling as `block` grows, exact in sum."""
        counts, left, total = {}, block * BLOCK, sum(share for _, share in self.shares)
        for source, share in self.shares:
            counts[source] = left * share // total
            left, total = left - counts[source], total - share
        return counts


class Mixture:
    """The order of an endless stream of examples."""

    def __init__(self, sizes: Mapping[str, int], phases: Sequence[Phase], seed: int):
        """Args: rows of each source; the phases, the first from example 0, in ascending order; the seed.

        Raises:
          UserError: phases out of order; a rate that is negative or not finite, a rate for a source that has no rows,
            or no positive rate.
        """
        self._sizes, self._seed = dict(sizes), seed
        self._block = functools.lru_cache(maxsize=16)(self._lay_out)
        starts = [phase.start for phase in phases]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise UserError(f"rates must change at examples that ascend from 0, not {starts}")
        self._spans: list[_Span] = []
        for phase, stop in zip(phases, [*starts[1:], math.inf], strict=True):
            before = self._counts_to(phase.start) if self._spans else dict.fromkeys(sizes, 0)
            self._spans.append(_Span(phase.start, stop, _shares(sizes, phase.rates), before))

    def place(self, example: int) -> Place:
        """The source, epoch and row of the example at place `example` of the stream."""
        return self.places([example])[0]

    def places(self, examples: Sequence[int]) -> list[Place]:
        """`place` of several examples."""
        wanted: dict[tuple[str, int], list[tuple[int, int]]] = {}  # (source, epoch): [(position, index)]
        for position, example in enumerate(examples):
            span = self._span_of(example)
            block, slot = divmod(example - span.start, BLOCK)
            sources, places = self._block(span, block)
            source = span.shares[sources[slot]][0]
            epoch, index = divmod(int(places[slot]), self._sizes[source])
            wanted.setdefault((source, epoch), []).append((position, index))
        found: list[Place | None] = [None] * len(examples)
        for (source, epoch), group in wanted.items():
            positions, indices = zip(*group, strict=True)
            rows = permute(np.array(indices), self._sizes[source], self._epoch_key(source, epoch))
            for position, row in zip(positions, rows.tolist(), strict=True):
                found[position] = Place(source, epoch, row)
        return found

    def examples(self, source: str, index: int, stop: int) -> list[int]:
        """The examples before `stop` that show row `index` of a source, ascending: one an epoch."""
        found, size = [], self._sizes[source]
        for epoch in range(stop // size + 1):
            place = int(unpermute(np.array([index]), size, self._epoch_key(source, epoch))[0]) + epoch * size
            example = self._example_of(source, place)
            if example is None or example >= stop:
                break
            found.append(example)
        return found

    def _epoch_key(self, source: str, epoch: int) -> int:
        return keyed(self._seed, source, epoch)

    def _span_of(self, example: int) -> _Span:
        return next(span for span in reversed(self._spans) if span.start <= example)

    def _lay_out(self, span: _Span, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(number of the source, which of all its places this is) of each place of a block; both [BLOCK]."""
        before, after = span.counts(block), span.counts(block + 1)
        numbers = np.repeat(np.arange(len(before)), [after[source] - before[source] for source in before])
        numbers = numbers[permute(np.arange(BLOCK), BLOCK, keyed(self._seed, "block", span.start, block))]
        places = np.zeros(BLOCK, np.int64)
        for number, (source, earlier) in enumerate(before.items()):
            own = numbers == number
            places[own] = span.before[source] + earlier + np.arange(own.sum())
        return numbers, places

    def _counts_to(self, example: int) -> dict[str, int]:
        """Places of each source before an example."""
        span = self._span_of(example - 1)
        block, slot = divmod(example - 1 - span.start, BLOCK)
        numbers, _ = self._block(span, block)
        part = np.bincount(numbers[: slot + 1], minlength=len(span.shares)).tolist()
        whole = span.counts(block)
        gained = {source: whole[source] + some for source, some in zip(whole, part, strict=True)}
        return {source: count + gained.get(source, 0) for source, count in span.before.items()}

    def _example_of(self, source: str, place: int) -> int | None:
        """The example that has the source's place of this number, or None if no phase goes that far."""
        for span in self._spans:
            names = [name for name, _ in span.shares]
            if source not in names:
                continue
            block = _first_block(span, source, place - span.before[source])
            numbers, places = self._block(span, block)
            slot = np.flatnonzero((numbers == names.index(source)) & (places == place))
            if slot.size and (example := span.start + block * BLOCK + int(slot[0])) < span.stop:
                return example
        return None


def _first_block(span: _Span, source: str, place: int) -> int:
    """The first block at whose end the source has had more than `place` places within the span."""
    total, share = sum(share for _, share in span.shares), dict(span.shares)[source]
    # Its share says where that is, give or take what rounding adds: less than a place for each source.
    slack = len(span.shares) + 1
    low = max(0, (place - slack) * total // (share * BLOCK) - 1)
    high = max(0, (place + slack) * total // (share * BLOCK) + 1)
    return bisect.bisect_right(range(high), place, lo=low, key=lambda block: span.counts(block + 1)[source])


def _shares(sizes: Mapping[str, int], rates: Mapping[str, float]) -> tuple[tuple[str, int], ...]:
    """Sources with a positive rate and their whole shares of about `_ONE`, in an order that is theirs alone."""
    rates = dict(rates) or {name: float(size) for name, size in sizes.items()}
    for name, rate in rates.items():
        if not 0 <= rate < math.inf:
            raise UserError(f"the mixture rate of {name!r} is {rate}; rates are numbers from 0 up")
        if rate > 0 and not sizes.get(name):
            raise UserError(f"mixture rate given for {name!r}, but the store has rows for: {', '.join(sizes)}")
    total = sum(rates.values())
    shares = {name: max(1, round(rate / total * _ONE)) for name, rate in sorted(rates.items()) if rate > 0}
    if not shares:
        raise UserError("the mixture has no source with a positive rate")
    return tuple(shares.items())
