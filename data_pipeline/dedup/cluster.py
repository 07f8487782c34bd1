"""From equal keys to clusters, on blocks of numpy arrays. Documents are numbers: shard << 32 | row.

The order of numbers is the order of the input, and a cluster's first document is the one that stays; nothing
depends on the order in which blocks arrive.
"""

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

_ROW_BITS = np.uint64(32)


def number(shard: int, rows: np.ndarray) -> np.ndarray:
    """Global document numbers of rows of a shard."""
    return (np.uint64(shard) << _ROW_BITS) | rows.astype(np.uint64)


def shard_of(numbers: np.ndarray) -> np.ndarray:
    """The shard part of document numbers."""
    return (numbers >> _ROW_BITS).astype(np.uint32)


def row_of(numbers: np.ndarray) -> np.ndarray:
    """The row part of document numbers."""
    return numbers.astype(np.uint32)


def repeats(keys_N: np.ndarray, numbers_N: np.ndarray) -> np.ndarray:
    """[pairs, 2] of (first document with this key, later document with the same key). keys: [N] or [N, K]."""
    return _runs(keys_N, numbers_N)[0]


def candidates(keys_N: np.ndarray, numbers_N: np.ndarray) -> np.ndarray:
    """[pairs, 2] of documents to compare: within equal keys, each with the first and with the one before."""
    return np.unique(np.concatenate(_runs(keys_N, numbers_N)), axis=0)


def _runs(keys_N: np.ndarray, numbers_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Later documents of each key, paired with the key's first document and with the one just before."""
    keys = keys_N.reshape(len(numbers_N), -1)
    order = np.lexsort((numbers_N, *keys.T))
    keys, numbers = keys[order], numbers_N[order]
    new = np.ones(len(numbers), bool)
    new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    head = np.flatnonzero(new)
    first = numbers[np.repeat(head, np.diff(np.append(head, len(numbers))))]
    later = np.flatnonzero(~new)
    return np.stack([first[later], numbers[later]], 1), np.stack([numbers[later - 1], numbers[later]], 1)


def components(pairs: np.ndarray) -> np.ndarray:
    """[removed, 2] of (first document of its connected component, document), sorted by document."""
    if not len(pairs):
        return np.zeros((0, 2), np.uint64)
    members, place = np.unique(pairs, return_inverse=True)
    place = place.reshape(-1, 2)
    edges = (np.ones(len(place), bool), (place[:, 0], place[:, 1]))
    graph = sparse.coo_matrix(edges, shape=(len(members), len(members)))
    count, label = csgraph.connected_components(graph, directed=False)
    first = np.full(count, np.iinfo(np.uint64).max)
    np.minimum.at(first, label, members)
    later = first[label] != members
    return np.stack([first[label][later], members[later]], 1)
