"""The n-grams of all items, as arrays on disk that every worker maps into memory.

Shapes: I items, K distinct n-grams, P places of n-grams in items, W words of the filter, U units.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
import orjson

from data_pipeline.contamination import kernels
from data_pipeline.contamination.items import Item
from data_pipeline.contamination.units import units_of
from data_pipeline.documents import EXCERPT
from data_pipeline.shards import json_line, save_array, save_bytes

MOST_ITEMS = 256  # an n-gram that more items have is a form of words, and tells none of them
_BATCH = 1024
_ARRAYS, _ITEMS = ("keys_K", "first_K", "item_P", "place_P", "units_I", "filter_W"), "items.jsonl"
_BITS = 16  # of the filter for each key: one place in sixteen is looked up in vain


@dataclasses.dataclass(frozen=True)
class Index:
    """keys_K: n-grams, sorted; places of key k: first_K[k] up to first_K[k + 1] of item_P and place_P (units).

    units_I: units of each item; those with fewer than `n` cannot be found.
    """

    n: int
    keys_K: np.ndarray
    first_K: np.ndarray
    item_P: np.ndarray
    place_P: np.ndarray
    units_I: np.ndarray
    filter_W: np.ndarray


def build_index(items: Sequence[Item], n: int) -> Index:
    """The index of some items."""
    grams, places, owners, sizes = [], [], [], []
    for begin in range(0, len(items), _BATCH):
        units = units_of([item.text for item in items[begin : begin + _BATCH]])
        grams_U = kernels.ngrams(units.hash_U, units.ends_N, n)
        size_N = np.diff(units.ends_N, prepend=0)
        owner_U = np.repeat(np.arange(len(size_N)), size_N)
        place_U = np.arange(len(grams_U)) - (units.ends_N - size_N)[owner_U]
        has = grams_U != 0
        grams.append(grams_U[has])
        places.append(place_U[has])
        owners.append(begin + owner_U[has])
        sizes.append(size_N)
    return _sorted(n, *map(np.concatenate, (grams, owners, places, sizes)))


def _sorted(n: int, gram_P: np.ndarray, item_P: np.ndarray, place_P: np.ndarray, units_I: np.ndarray) -> Index:
    order = np.lexsort((place_P, item_P, gram_P))
    gram_P, item_P, place_P = gram_P[order], item_P[order].astype(np.uint32), place_P[order].astype(np.uint32)
    new = np.ones(len(gram_P), bool)
    new[1:] = gram_P[1:] != gram_P[:-1]
    key_P = np.cumsum(new) - 1
    first_of_item = new.copy()
    first_of_item[1:] |= item_P[1:] != item_P[:-1]
    items_K = np.bincount(key_P[first_of_item], minlength=new.sum())
    kept = items_K[key_P] <= MOST_ITEMS
    gram_P, item_P, place_P = gram_P[kept], item_P[kept], place_P[kept]
    keys_K, first = np.unique(gram_P, return_index=True)
    words = 1 << max(10, int(len(keys_K) * _BITS / 64).bit_length())
    first_K = np.append(first, len(gram_P)).astype(np.int64)
    return Index(n, keys_K, first_K, item_P, place_P, units_I, kernels.make_filter(keys_K, words))


def save_index(folder: pathlib.Path, index: Index, items: Sequence[Item]) -> None:
    """Writes an index; its file of items comes last."""
    for name in _ARRAYS:
        save_array(folder / f"{name}.npy", getattr(index, name))
    with save_bytes(folder / _ITEMS) as file:
        for item in items:
            file.write(json_line({"n": index.n, "task": item.task, "id": item.id, "text": item.text[:EXCERPT]}))


def load_index(folder: pathlib.Path) -> tuple[Index, list[Item]]:
    """The index of a folder, mapped into memory, and its items with the beginnings of their texts."""
    return _load(folder, (folder / _ITEMS).stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _load(folder: pathlib.Path, _written: int) -> tuple[Index, list[Item]]:
    """Once in a process, unless the folder was written anew."""
    with open(folder / _ITEMS, "rb") as file:
        rows = [orjson.loads(line) for line in file]
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return Index(rows[0]["n"], **arrays), [Item(row["task"], row["id"], row["text"]) for row in rows]
