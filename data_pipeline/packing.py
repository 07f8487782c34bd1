"""Packing token sequences into rows of a fixed length: best fit, with little padding and nothing cut that would fit, or
wrapped, without padding and cut wherever a row ends, as the released models were trained.
"""

import bisect
import collections
import random
from collections.abc import Iterator, Sequence

import numpy as np

from ctllm_jax.data.record import Row


def chunks(row: Row, length: int) -> Iterator[Row]:
    """Cuts a document that is longer than a row.

    A later piece repeats the last token before it, so that every token but a document's first is predicted exactly
    once; `starts` says where a piece begins. Text bytes are shared out in proportion to the predicted tokens and add
    up exactly.
    """
    total, done = len(row.tokens) - 1, 0  # predicted tokens
    while True:
        end = min(done + length - 1, total)
        tokens = row.tokens[done : end + 1]
        mask = None if row.mask is None else row.mask[done : end + 1]
        share = row.bytes * end // max(total, 1) - row.bytes * done // max(total, 1)
        yield Row(tokens, [len(tokens)], row.ids, mask, share, [done] if done else ())
        done = end
        if done >= total:
            return


def pack(documents: Sequence[Row], length: int, seed: int) -> list[Row]:
    """Best-fit decreasing bin packing of single-segment rows of at most `length` tokens, in a seeded order.

    Each document goes, longest first, into the fullest row that still takes it. The rows come in a seeded order too.
    """
    order = list(range(len(documents)))
    draw = random.Random(seed)
    draw.shuffle(order)
    order.sort(key=lambda i: -len(documents[i].tokens))  # stable: equal lengths stay in seeded order
    plan = best_fit([len(documents[i].tokens) for i in order], length)
    draw.shuffle(plan)
    return [_join([documents[order[i]] for i in row]) for row in plan]


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Rows of places in `sizes`: each, in the order given, goes into the fullest row that still takes it, of equally
    full ones the one that became so first. Time per place is bounded by `length`, not by the number of rows.
    """
    rows: list[list[int]] = []
    waiting: dict[int, collections.deque[int]] = {}  # free tokens: rows with so many, never empty
    levels: list[int] = []  # its keys, ascending
    for i, size in enumerate(sizes):
        place = bisect.bisect_left(levels, size)
        if place == len(levels):
            row, free = len(rows), length
            rows.append([])
        else:
            free = levels[place]
            row = waiting[free].popleft()
            if not waiting[free]:
                del waiting[free], levels[place]
        rows[row].append(i)
        if free - size not in waiting:
            waiting[free - size] = collections.deque()
            bisect.insort(levels, free - size)
        waiting[free - size].append(row)
    return rows


def wrap(documents: Sequence[Row], length: int, seed: int) -> list[Row]:
    """Documents end to end in a seeded order, cut every `length` tokens; the rows come in a seeded order too.

    What a cut separates is not predicted from one another: a document loses a prediction at each cut. Text bytes are
    shared out in proportion to the tokens and add up exactly.
    """
    order = list(range(len(documents)))
    draw = random.Random(seed)
    draw.shuffle(order)
    plan = wrapped([len(documents[i].tokens) for i in order], length)
    draw.shuffle(plan)
    return [_join([_part(documents[order[i]], begin, end) for i, begin, end in row]) for row in plan]


def wrapped(sizes: Sequence[int], length: int) -> list[list[tuple[int, int, int]]]:
    """Rows of (place in `sizes`, from token, to token): sequences end to end, a row every `length` tokens."""
    rows: list[list[tuple[int, int, int]]] = []
    room = 0
    for i, size in enumerate(sizes):
        begin = 0
        while begin < size:
            if not room:
                rows.append([])
                room = length
            end = min(size, begin + room)
            rows[-1].append((i, begin, end))
            begin, room = end, room - (end - begin)
    return rows


def _part(row: Row, begin: int, end: int) -> Row:
    """Tokens [begin, end) of a single-segment row."""
    size = len(row.tokens)
    mask = None if row.mask is None else row.mask[begin:end]
    share = row.bytes * end // size - row.bytes * begin // size
    return Row(row.tokens[begin:end], [end - begin], row.ids, mask, share, [begin] if begin else ())


def _join(parts: Sequence[Row]) -> Row:
    masks = None if parts[0].mask is None else np.concatenate([part.mask for part in parts])
    starts = [part.starts[0] if part.starts else 0 for part in parts]
    return Row(
        tokens=np.concatenate([part.tokens for part in parts]),
        lengths=[len(part.tokens) for part in parts],
        ids=[part.ids[0] for part in parts],
        mask=masks,
        bytes=sum(part.bytes for part in parts),
        starts=starts if any(starts) else (),
    )
