"""The loops of the search, compiled.

Shapes: N documents, T code points of all of them one after the other, U units likewise (document i is
[ends[i-1], ends[i])), K distinct n-grams of benchmarks, W words of their filter.
"""

import numba
import numpy as np

from data_pipeline.dedup.kernels import MULTIPLIER, mix

APART = np.uint32(ord(" "))  # what parts words in folded text
_compiled = numba.njit(cache=True, nogil=True)


@_compiled
def units(points_T, ends_N, alone):
    """(hash_U uint64, begin_U, end_U, ends_N): units of folded text, and where each lies in it.

    A character that stands `alone` is a unit; others are one as far as they stand together.
    """
    hash_U = np.empty(len(points_T), np.uint64)
    begin_U, end_U = np.empty(len(points_T), np.int64), np.empty(len(points_T), np.int64)
    unit_ends_N = np.empty(len(ends_N), np.int64)
    begin = count = 0
    for document in range(len(ends_N)):
        inside = False
        for i in range(begin, ends_N[document]):
            code = points_T[i]
            if code == APART:
                inside = False
                continue
            if alone[code] or not inside:
                hash_U[count], begin_U[count] = np.uint64(code), i
                count += 1
            else:
                hash_U[count - 1] = hash_U[count - 1] * MULTIPLIER + np.uint64(code)
            end_U[count - 1] = i + 1
            inside = not alone[code]
        begin = ends_N[document]
        unit_ends_N[document] = count
    for i in range(count):
        hash_U[i] = mix(hash_U[i] * MULTIPLIER)
    return hash_U[:count], begin_U[:count], end_U[:count], unit_ends_N


@_compiled
def ngrams(hash_U, ends_N, n):
    """[U] uint64: hash of the n-gram that begins at each unit; 0 where a document has fewer units left."""
    grams_U = np.zeros(len(hash_U), np.uint64)
    leaving = np.uint64(1)
    for _ in range(n):
        leaving *= MULTIPLIER
    begin = 0
    for document in range(len(ends_N)):
        value = np.uint64(0)
        for i in range(begin, ends_N[document]):
            value = value * MULTIPLIER + hash_U[i]
            first = i - n + 1
            if first > begin:
                value -= leaving * hash_U[first - 1]
            if first >= begin:
                grams_U[first] = max(mix(value), np.uint64(1))
        begin = ends_N[document]
    return grams_U


@_compiled
def make_filter(keys_K, words):
    """[words] uint64, a power of two: a bit is set for each key."""
    filter_W = np.zeros(words, np.uint64)
    for key in keys_K:
        filter_W[(key >> np.uint64(6)) & np.uint64(words - 1)] |= np.uint64(1) << (key & np.uint64(63))
    return filter_W


@_compiled
def find(grams_U, filter_W, keys_K):
    """(place_M, key_M): the units at which an n-gram of the keys (sorted) begins, and which."""
    place_M, key_M = np.empty(len(grams_U), np.int64), np.empty(len(grams_U), np.int64)
    count = 0
    for i in range(len(grams_U)):
        gram = grams_U[i]
        word = filter_W[(gram >> np.uint64(6)) & np.uint64(len(filter_W) - 1)]
        if not (word >> (gram & np.uint64(63))) & np.uint64(1):
            continue
        key = np.searchsorted(keys_K, gram)
        if key < len(keys_K) and keys_K[key] == gram:
            place_M[count], key_M[count] = i, key
            count += 1
    return place_M[:count], key_M[:count]
