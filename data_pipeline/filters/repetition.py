"""How much of a text is repeated n-grams, by position: a character counts once, however many cover it.

The released CT-LLM code counts the distinct characters of repeated n-grams, which never reaches its own
threshold on a long text, and calls the rule so that it never rejects. Here a repeat is every occurrence of an
n-gram after its first, and the share is the part of the document's characters that lie in a repeat: six
copies of a text give 5/6.

Works on any symbols: characters, or words weighted by their length. Shapes: T symbols of N documents.
"""

import numpy as np

from data_pipeline.filters.batch import sum_per_document

TOP = (2, 3, 4)  # share of the repeats of the most frequent n-gram
DUPLICATED = (5, 6, 7, 8, 9, 10)  # share of all repeated n-grams
NAMES = tuple([f"top_{n}gram" for n in TOP] + [f"duplicate_{n}gram" for n in DUPLICATED])


def repetition(symbols_T: np.ndarray, weights_T: np.ndarray, ends_N: np.ndarray) -> dict[str, np.ndarray]:
    """Shares by name (NAMES), each [N] in 0..1; 0 for an empty document.

    Only a position whose (n-1)-gram occurs twice can begin an n-gram that does, so the work shrinks with n.
    N-grams are compared exactly: the class of an n-gram is the rank of (class of its first n-1 symbols, its
    last symbol).
    """
    lengths_N = np.diff(np.concatenate([[0], ends_N]))
    document_T = np.repeat(np.arange(len(ends_N)), lengths_N)
    limit_T = np.repeat(ends_N, lengths_N)
    symbols_T = np.unique(symbols_T, return_inverse=True)[1].astype(np.uint64)
    base = np.uint64(int(symbols_T.max(initial=0)) + 1)
    total_N = np.maximum(sum_per_document(weights_T, ends_N), 1)

    start = np.arange(len(symbols_T))
    rank = document_T.astype(np.uint64) * base + symbols_T  # of the n-gram that begins at `start`, for n = 1
    shares = {}
    for n in range(2, DUPLICATED[-1] + 1):
        fits = start + n <= limit_T[start]
        start, rank = start[fits], rank[fits]
        start, rank, size, first = _group(start, rank * base + symbols_T[start + n - 1])
        if n in TOP:
            chosen = _is_most_frequent(document_T[start], rank, size) & ~first
            shares[f"top_{n}gram"] = _cover(start[chosen], n, weights_T, ends_N) / total_N
        elif n in DUPLICATED:
            shares[f"duplicate_{n}gram"] = _cover(start[~first], n, weights_T, ends_N) / total_N
    return shares


def _group(start: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sorted by key, keys that occur once dropped: (position, dense rank of the key, count, is first)."""
    order = np.argsort(key, kind="stable")
    start, key = start[order], key[order]
    new = np.concatenate([[True], key[1:] != key[:-1]])[: len(key)]
    rank = np.cumsum(new) - 1
    size = np.bincount(rank)[rank] if len(rank) else rank
    repeated = size > 1
    rank = rank[repeated]
    dense = (np.cumsum(np.concatenate([[True], rank[1:] != rank[:-1]])[: len(rank)]) - 1).astype(np.uint64)
    return start[repeated], dense, size[repeated], new[repeated]


def _is_most_frequent(document: np.ndarray, rank: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Marks, for each document, the entries of its most frequent class (the first in rank among equals)."""
    if not len(rank):
        return np.zeros(0, bool)
    best_rank = np.full(int(document.max()) + 1, -1)
    order = np.lexsort((-rank.astype(np.int64), size))  # the last write wins: largest size, then smallest rank
    best_rank[document[order]] = rank[order]
    return best_rank[document] == rank.astype(np.int64)


def _cover(start: np.ndarray, n: int, weights_T: np.ndarray, ends_N: np.ndarray) -> np.ndarray:
    """[N] weight of the symbols that lie in an n-gram beginning at one of `start`."""
    step = np.zeros(len(weights_T) + 1, np.int64)
    step[start] = 1
    np.subtract.at(step, start + n, 1)
    return sum_per_document(np.where(np.cumsum(step)[:-1] > 0, weights_T, 0), ends_N)
