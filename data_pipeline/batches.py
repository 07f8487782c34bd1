"""Texts by the batch: many short ones together, as arrays pay only then, and few long ones, for arrays take memory."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

ITEMS, CHARACTERS = 512, 1 << 19  # a batch is closed when it holds this many of either
T = TypeVar("T")


def batched(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in their order. `characters` says how many an item has."""
    batch: list[T] = []
    held = 0
    for item in items:
        batch.append(item)
        held += characters(item)
        if len(batch) >= ITEMS or held >= CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
