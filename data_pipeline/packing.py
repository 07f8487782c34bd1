"""Packing token sequences into rows of a fixed length with little padding and nothing cut away."""

import bisect
import random
from collections.abc import Iterator, Sequence

import numpy as np

from ctllm_jax.data.record import Row


def chunks(row: Row, length: int) -> Iterator[Row]:
    """Cuts a document that is longer than a row.

    A later piece repeats the last token before it, so that every token but a document's first is predicted exactly
    once. Text bytes are shared out in proportion to the predicted tokens and add up exactly.
    """
    total, done = len(row.tokens) - 1, 0  # predicted tokens
    while True:
        end = min(done + length - 1, total)
        tokens = row.tokens[done : end + 1]
        mask = None if row.mask is None else row.mask[done : end + 1]
        share = row.bytes * end // max(total, 1) - row.bytes * done // max(total, 1)
        yield Row(tokens, [len(tokens)], row.ids, mask, share)
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
    rows: list[list[Row]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in order:
        size = len(documents[i].tokens)
        place = bisect.bisect_left(space, (size, -1))
        if place == len(space):
            rows.append([documents[i]])
            bisect.insort(space, (length - size, len(rows) - 1))
        else:
            free, row = space.pop(place)
            rows[row].append(documents[i])
            bisect.insort(space, (free - size, row))
    draw.shuffle(rows)
    return [_join(parts) for parts in rows]


def _join(parts: Sequence[Row]) -> Row:
    masks = None if parts[0].mask is None else np.concatenate([part.mask for part in parts])
    return Row(
        tokens=np.concatenate([part.tokens for part in parts]),
        lengths=[len(part.tokens) for part in parts],
        ids=[part.ids[0] for part in parts],
        mask=masks,
        bytes=sum(part.bytes for part in parts),
    )
