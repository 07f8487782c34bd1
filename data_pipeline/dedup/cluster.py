"""From equal keys to clusters, on blocks of numpy arrays. Documents are numbers: shard << 32 | row.

The order of numbers is the order of the input, and a cluster's first document is the one that stays; nothing
depends on the order in which blocks arrive. Pairs are [pairs, 2] uint64, the first document first.
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


def repeats(keyed_N: np.ndarray) -> np.ndarray:
    """Pairs of the first document with a key and a later one with the same key. keyed: [N, key words..., number]."""
    return _runs(keyed_N)[0]


def candidates(keyed_N: np.ndarray) -> np.ndarray:
    """Pairs of documents to compare: within equal keys, each with the first and with the one before."""
    return distinct(np.concatenate(_runs(keyed_N)))


def _runs(keyed_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Later documents of each key, paired with the key's first document and with the one just before."""
    keyed = keyed_N[np.lexsort(keyed_N.T[::-1])]
    keys, numbers = keyed[:, :-1], keyed[:, -1]
    new = np.ones(len(numbers), bool)
    new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    later = np.flatnonzero(~new)
    head = np.flatnonzero(new)
    first = head[np.cumsum(new)[later] - 1]
    return numbers[np.stack([first, later], 1)], numbers[np.stack([later - 1, later], 1)]


def distinct(pairs: np.ndarray) -> np.ndarray:
    """The pairs in ascending order, each once."""
    pairs = pairs[np.lexsort(pairs.T[::-1])]
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[new]


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


def large_star(directed_N: np.ndarray) -> np.ndarray:
    """Ties every neighbour that comes after a document to the first of document and neighbours.

    directed: [N, 2] of (document, neighbour), all of a document's neighbours. Returns pairs.
    """
    edges, least_N = _least(distinct(directed_N))
    document_N, neighbour_N = edges.T
    after = neighbour_N > document_N
    return distinct(np.stack([np.minimum(least_N, document_N)[after], neighbour_N[after]], 1))


def small_star(directed_N: np.ndarray) -> np.ndarray:
    """Ties a document and those of its neighbours that come before it to the first of them.

    directed: [N, 2] of (document, neighbour before it). Returns pairs.
    """
    edges, least_N = _least(distinct(directed_N))
    document_N, neighbour_N = edges.T
    others = neighbour_N != least_N
    tied = np.concatenate([np.stack([least_N, document_N], 1), np.stack([least_N, neighbour_N], 1)[others]])
    return distinct(tied)


def _least(edges_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges, which are sorted, and the least neighbour of each one's document."""
    new = np.ones(len(edges_N), bool)
    new[1:] = edges_N[1:, 0] != edges_N[:-1, 0]
    return edges_N, edges_N[np.flatnonzero(new), 1][np.cumsum(new) - 1]
