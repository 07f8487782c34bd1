"""Which sequences share a beginning, and how what is left of them is packed into rows of a few lengths.

A piece is what goes into the model together: the sequences of one or more requests that differ in their last id alone.
Everything here is decided from the set of pieces, not from their order.
"""

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np

from ctllm_jax.generate import bucket

SHORTEST_SHARED = 16  # tokens; a shorter beginning is not worth a pass of its own
ROW = 256  # slots of a row, unless a piece needs more or all pieces of a beginning need fewer
SLOTS_PER_PIECE = 8  # in a full row, at least: see `most_pieces`
KEYS_PER_TOKEN = 8192  # to look at so many keys is taken to cost as much as all else that a token does


@dataclasses.dataclass
class Piece:
    """Ids that go into the model together, and the last ids asked for after them.

    `logprobs` and `hits` are of `ids[1:]` and then of each last id, once computed.
    """

    ids: tuple[int, ...]
    last: list[int]
    logprobs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    hits: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))

    def add(self, logprobs: np.ndarray, hits: np.ndarray) -> None:
        """Takes what was computed next, in the order of `logprobs` and `hits`."""
        self.logprobs, self.hits = np.append(self.logprobs, logprobs), np.append(self.hits, hits)

    @property
    def key(self) -> tuple:
        """Sorts pieces by what they hold, the longest first."""
        return -len(self.ids), self.ids, self.last


@dataclasses.dataclass(frozen=True)
class Share:
    """Pieces whose first `length` ids are the same and are computed once."""

    length: int
    pieces: list[Piece]

    @property
    def left(self) -> int:
        """Ids after the beginning, of all pieces."""
        return sum(len(piece.ids) for piece in self.pieces) - self.length * len(self.pieces)


@dataclasses.dataclass(frozen=True)
class Row:
    """Pieces that stand beside each other in a row, from the end of their beginning on."""

    owner: int  # which share
    shared: int  # its length
    pieces: list[Piece]


def unique(pieces: Iterable[Piece]) -> list[Piece]:
    """Each piece once."""
    return list({id(piece): piece for piece in pieces}.values())


# ---- What is shared


def plan(groups: list[list[Piece]], most: int, batch_tokens: int) -> list[Share]:
    """Nothing shared, or by the pieces of each group, or by all: what takes the fewest padded tokens; nothing, where
    that would not save half a batch."""
    everything = unique(piece for group in groups for piece in group)
    taken: set[int] = set()
    own = []  # a piece that several groups have is the first one's
    for group in groups:
        own.append([piece for piece in group if id(piece) not in taken])
        taken.update(id(piece) for piece in group)
    apart = [Share(0, everything)]
    plans = ([_share(group) for group in own if group], [_share(everything)])
    best = min(plans, key=lambda shares: _padded_tokens(shares, most))
    return best if 2 * (_padded_tokens(apart, most) - _padded_tokens(best, most)) >= batch_tokens else apart


def _share(pieces: list[Piece]) -> Share:
    """All ids that the pieces begin with, less the one that each of them goes on from; none if it is not worth it."""
    first, last = min(piece.ids for piece in pieces), max(piece.ids for piece in pieces)
    alike = next((n for n, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return Share(alike - 1 if len(pieces) > 1 and alike > SHORTEST_SHARED else 0, pieces)


def _padded_tokens(shares: list[Share], most: int) -> int:
    return sum(
        padded_beginning(share.length, most) + (share.left if share.left > ROW else bucket(share.left, most))
        for share in shares
    )


def padded_beginning(length: int, most: int) -> int:
    """The next of 128, 512, 1024, 2048, ... that holds it, but `most` at most; 0 for 0."""
    size = 128 if length <= 128 else max(512, bucket(length, most))
    return min(size, most) if length else 0


# ---- What stands in a row


def pack(shares: list[Share], most: int, batch_tokens: int) -> dict[int, list[Row]]:
    """{slots of a row: rows}; a row's pieces go on from the same beginning."""
    classes: dict[int, dict[int, list[Piece]]] = {}
    for owner, share in enumerate(shares):
        for piece in share.pieces:
            needed = max(len(piece.ids) - share.length, min(ROW, share.left))
            classes.setdefault(bucket(needed, most), {}).setdefault(owner, []).append(piece)
    lengths = _lengths({length: _tokens(shares, own) for length, own in classes.items()}, batch_tokens)
    together: dict[int, dict[int, list[Piece]]] = {}
    for length, own in classes.items():
        for owner, pieces in own.items():
            together.setdefault(lengths[length], {}).setdefault(owner, []).extend(pieces)
    return {
        length: [
            Row(owner, shares[owner].length, row)
            for owner, pieces in sorted(own.items())
            for row in _first_fit(pieces, shares[owner].length, length)
        ]
        for length, own in sorted(together.items())
    }


def _tokens(shares: list[Share], own: dict[int, list[Piece]]) -> collections.Counter:
    return collections.Counter({owner: Share(shares[owner].length, pieces).left for owner, pieces in own.items()})


def _lengths(tokens: dict[int, collections.Counter], batch_tokens: int) -> dict[int, int]:
    """{length: the one that is taken in its place}, of the tokens that each beginning has of every length: a length
    that would not save a batch over the next longer one gives way to that."""
    chosen: dict[int, int] = {}
    waiting, own = [], collections.Counter()
    lengths = sorted(tokens)
    for length, longer in zip(lengths, [*lengths[1:], None], strict=True):
        waiting.append(length)
        own += tokens[length]
        if longer is None or _cost(own, longer) - _cost(own, length) >= batch_tokens:
            chosen |= dict.fromkeys(waiting, length)
            waiting, own = [], collections.Counter()
    return chosen


def _cost(tokens: collections.Counter, length: int) -> float:
    """What rows of so many slots would cost, in tokens."""
    return sum(-(-count // length) for count in tokens.values()) * length * (1 + length / KEYS_PER_TOKEN)


def most_pieces(length: int) -> int:
    """How many pieces may stand in a row of so many slots."""
    return max(1, length // SLOTS_PER_PIECE)


def _first_fit(pieces: list[Piece], shared: int, length: int) -> list[list[Piece]]:
    """Pieces by rows, each in the first row that has room for it, the longest first."""
    rows: list[list[Piece]] = []
    room: dict[int, int] = {}  # slots left in rows that can take another piece
    shortest = min(len(piece.ids) for piece in pieces) - shared
    for piece in sorted(pieces, key=lambda piece: piece.key):
        needed = len(piece.ids) - shared
        place = next((n for n, left in room.items() if left >= needed), len(rows))
        if place == len(rows):
            rows.append([])
        rows[place].append(piece)
        room[place] = room.get(place, length) - needed
        if room[place] < shortest or len(rows[place]) == most_pieces(length):
            del room[place]
    return rows
