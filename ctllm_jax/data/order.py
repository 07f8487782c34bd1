"""Which row stands at place g of the training stream: a pure function of (seed, g), with no iterator state.

A mixture lays sources out in blocks of `BLOCK` places: every block holds the same number of places of each source
(its rate, resolved to 1/BLOCK) in an order of its own. The n-th place of a source takes row n mod size of its
epoch's permutation. Permutations are Feistel networks, not linear congruences, whose neighbours are correlated.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping

from ctllm_jax.common.errors import UserError

BLOCK = 2048
_ROUNDS = 6


def keyed(*parts: object) -> int:
    """A 64-bit key from parts that have a stable repr."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(index: int, size: int, key: int) -> int:
    """Place of `index` in the key's permutation of range(size): Feistel rounds, walked until they land inside."""
    if not 0 <= index < size:
        raise IndexError(f"{index} is outside a permutation of {size}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ key ^ (number * 0x9E3779B97F4A7C15)) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(x: int) -> int:
    """splitmix64's finaliser."""
    x &= 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an example comes from: `index` is the row within the source, `epoch` how often it was gone through."""

    source: str
    epoch: int
    index: int


class Mixture:
    """The order of an endless stream of examples."""

    def __init__(self, sizes: Mapping[str, int], rates: Mapping[str, float], seed: int):
        """Args: rows of each source; rate of each source (any positive scale; empty: by size); the seed.

        Raises:
          UserError: a rate that is negative or not finite, a rate for a source that has no rows, no positive rate, or
            more sources than a block has places.
        """
        rates = dict(rates) or {name: float(size) for name, size in sizes.items()}
        for name, rate in rates.items():
            if not 0 <= rate < math.inf:
                raise UserError(f"the mixture rate of {name!r} is {rate}; rates are numbers from 0 up")
            if rate > 0 and not sizes.get(name):
                raise UserError(f"mixture rate given for {name!r}, but the store has rows for: {', '.join(sizes)}")
        rates = {name: rate for name, rate in sorted(rates.items()) if rate > 0}
        if not rates:
            raise UserError("the mixture has no source with a positive rate")
        if len(rates) > BLOCK:
            raise UserError(f"the mixture has {len(rates)} sources; it can hold {BLOCK}")
        self._sizes, self._seed = dict(sizes), seed
        self.per_block = _largest_remainder(rates, BLOCK)

    def place(self, example: int) -> Place:
        """The source, epoch and row of the example at place `example` of the stream."""
        block, slot = divmod(example, BLOCK)
        source, earlier = _lay_out(tuple(self.per_block.items()), keyed(self._seed, "block", block))[slot]
        epoch, index = divmod(block * self.per_block[source] + earlier, self._sizes[source])
        return Place(source, epoch, permute(index, self._sizes[source], keyed(self._seed, source, epoch)))


@functools.lru_cache(maxsize=8)
def _lay_out(per_block: tuple[tuple[str, int], ...], key: int) -> list[tuple[str, int]]:
    """(source, number of earlier places of that source in the block) of each place of a block."""
    sources = [source for source, count in per_block for _ in range(count)]
    earlier, places = dict.fromkeys(sources, 0), []
    for slot in range(BLOCK):
        source = sources[permute(slot, BLOCK, key)]
        places.append((source, earlier[source]))
        earlier[source] += 1
    return places


def _largest_remainder(rates: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole counts in proportion to the rates that add up to `total`, each at least 1."""
    scale = total / sum(rates.values())
    counts = {name: max(1, int(rate * scale)) for name, rate in rates.items()}
    by_remainder = sorted(rates, key=lambda name: (counts[name] - rates[name] * scale, name))
    missing = total - sum(counts.values())
    for name in by_remainder[: max(missing, 0)]:
        counts[name] += 1
    for _ in range(-missing):  # tiny sources were lifted to 1
        counts[max(counts, key=counts.get)] -= 1
    return counts
