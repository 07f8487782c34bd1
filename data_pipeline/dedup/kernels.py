"""The loops of deduplication, compiled.

Shapes: N documents, T code points of all of them one after the other (document i is [ends[i-1], ends[i])),
P permutations.
"""

import numba
import numpy as np

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
EMPTY = np.uint32(0xFFFFFFFF)  # signature values of a text that has no shingle
_compiled = numba.njit(cache=True, nogil=True)


@_compiled
def mix(value):
    """The finaliser of splitmix64, of an integer or an array."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@_compiled
def keep_images(points_T, ends_N, is_code_N, text_image, code_image):
    """(points, ends): what each code point becomes by the image for text or for code, without those that become 0."""
    out = np.empty(len(points_T), np.uint32)
    out_ends_N = np.empty(len(ends_N), np.int64)
    begin = size = 0
    for document in range(len(ends_N)):
        image = code_image if is_code_N[document] else text_image
        for i in range(begin, ends_N[document]):
            becomes = image[points_T[i]]
            out[size] = becomes
            size += becomes != 0
        begin = ends_N[document]
        out_ends_N[document] = size
    return out[:size], out_ends_N


@_compiled
def minhash(points_T, ends_N, shingle, factors_P, addends_P):
    """[N, P] uint32: per permutation, the least hash of a document's shingles; EMPTY where it has none.

    A shingle's hash is a polynomial in its code points, rolled along the text, mixed and cut to its upper 32 bits.
    """
    signatures = np.full((len(ends_N), len(factors_P)), EMPTY)
    longest, begin = 1, 0
    for document in range(len(ends_N)):
        longest = max(longest, ends_N[document] - begin)
        begin = ends_N[document]
    hashes = np.empty(longest, np.uint32)
    leaving = np.uint64(1)
    for _ in range(shingle):
        leaving *= MULTIPLIER
    begin = 0
    for document in range(len(ends_N)):
        windows = ends_N[document] - begin - shingle + 1
        value = np.uint64(0)
        for i in range(begin, ends_N[document]):
            value = value * MULTIPLIER + np.uint64(points_T[i])
            place = i - begin - shingle + 1
            if place > 0:
                value -= leaving * np.uint64(points_T[i - shingle])
            if place >= 0:
                hashes[place] = np.uint32(mix(value) >> np.uint64(32))
        if windows > 0:
            for p in range(len(factors_P)):
                factor, addend, least = factors_P[p], addends_P[p], EMPTY
                for i in range(windows):
                    permuted = np.uint32(hashes[i] * factor + addend)
                    least = min(least, np.uint32(permuted ^ (permuted >> np.uint32(15))))
                signatures[document, p] = least
        begin = ends_N[document]
    return signatures


@_compiled
def band_hashes(signatures_NP, bands):
    """[bands, N] uint64: one key per band of each signature."""
    rows = signatures_NP.shape[1] // bands
    keys = np.zeros((bands, len(signatures_NP)), np.uint64)
    for document in range(len(signatures_NP)):
        for band in range(bands):
            key = np.uint64(0)
            for row in range(rows):
                key = mix((key ^ np.uint64(signatures_NP[document, band * rows + row])) * MULTIPLIER)
            keys[band, document] = key
    return keys


@_compiled
def agreement(first_NP, second_NP):
    """[N] float32: share of equal values of two signatures."""
    shares_N = np.empty(len(first_NP), np.float32)
    for pair in range(len(first_NP)):
        same = 0
        for p in range(first_NP.shape[1]):
            same += first_NP[pair, p] == second_NP[pair, p]
        shares_N[pair] = np.float32(same) / np.float32(first_NP.shape[1])
    return shares_N
