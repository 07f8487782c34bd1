"""The loops over characters, compiled: one pass over a batch for all that can be counted in passing.

`reference.py` says the same in plain Python, a function for each measure; tests hold the two together.

Shapes: N documents, T code points (or words) in all of them one after the other; document i is [ends[i-1], ends[i]).
"""

import numba
import numpy as np

from data_pipeline.filters.tables import (
    ASCII_PUNCTUATION,
    BULLET,
    CODES,
    DIGIT,
    HAN,
    KANA_HANGUL,
    PUNCTUATION,
    SENTENCE_END,
    SPACE,
    WORD,
)

REPEATS_WITHIN = 1_000_000  # symbols of a document in which repeats are sought, so that memory stays bounded
PREFIX = 1000  # characters on which distinct characters are counted, so that long texts are not punished
NEWLINE, HASH, ELLIPSIS, FULL_STOP, STOP = 10, 35, 0x2026, 0x2E, 0x3002
OPEN, CLOSE = 0x3010, 0x3011  # 【】
TEXT_COUNTS = (
    "sentences",
    "hash_runs",
    "ellipsis_runs",
    "lines",
    "line_characters",
    "read_more_lines",
    "bullet_lines",
    "ascii_punctuation",
)
FOLDED_COUNTS = (
    *("digits", "not_punctuation", "punctuation", "distinct_in_prefix", "distinct"),
    *("word_characters", "han", "kana_hangul"),
)
_compiled = numba.njit(cache=True, nogil=True)


@_compiled
def folded_sizes(points_T, ends_N, image, starts, joins):
    """[N] characters of each text's NFKC form; -1 where a character may join with the one before."""
    sizes_N = np.zeros(len(ends_N), np.int64)
    begin = 0
    for document in range(len(ends_N)):
        size = 0
        for i in range(begin, ends_N[document]):
            point = points_T[i]
            if joins[point]:
                size = -1
                break
            becomes = image[point]
            size += 1 if becomes < CODES else starts[becomes - CODES + 1] - starts[becomes - CODES]
        sizes_N[document] = size
        begin = ends_N[document]
    return sizes_N


@_compiled
def fold(points_T, ends_N, simple_N, image, text, starts, folded_ends_N, out):
    """Writes the NFKC forms of the texts marked `simple` to `out`, each to its place."""
    begin, place = 0, 0
    for document in range(len(ends_N)):
        if simple_N[document]:
            for i in range(begin, ends_N[document]):
                becomes = image[points_T[i]]
                if becomes < CODES:
                    out[place] = becomes
                    place += 1
                else:
                    for j in range(starts[becomes - CODES], starts[becomes - CODES + 1]):
                        out[place] = text[j]
                        place += 1
        begin, place = ends_N[document], folded_ends_N[document]


@_compiled
def _ends_with(points_T, first, last, suffix):
    """Whether points[first..last], both included, end in the suffix (padded with zeros to its fixed width)."""
    length = 0
    while length < len(suffix) and suffix[length]:
        length += 1
    if length == 0 or last - first + 1 < length:
        return False
    for i in range(length):
        if points_T[last - length + 1 + i] != suffix[i]:
            return False
    return True


@_compiled
def count_text(points_T, ends_N, flags, suffixes):
    """[N, len(TEXT_COUNTS)]; `suffixes` [S, width]: what a line that asks to read on ends in."""
    counts = np.zeros((len(ends_N), len(TEXT_COUNTS)), np.int64)
    begin = 0
    for document in range(len(ends_N)):
        end = ends_N[document]
        out = counts[document]
        in_sentence = False
        stops = ellipses = full_stops = 0  # length of the run that ends here
        first = last = -1  # printed characters of this line
        for i in range(begin, end + 1):
            at_end = i == end
            point = np.uint32(NEWLINE) if at_end else points_T[i]
            flag = flags[point]
            if flag & SENTENCE_END:
                out[0] += in_sentence
                in_sentence = False
            elif not flag & SPACE:
                in_sentence = True
            if point == NEWLINE:
                if first >= 0:
                    out[3] += 1
                    out[4] += last - first + 1
                    for s in range(len(suffixes)):
                        if _ends_with(points_T, first, last, suffixes[s]):
                            out[5] += 1
                            break
                    out[6] += (flags[points_T[first]] & BULLET) != 0
                first = last = -1
            elif not flag & SPACE:
                first = i if first < 0 else first
                last = i
            if at_end:
                break
            out[1] += point == HASH and (i == begin or points_T[i - 1] != HASH)
            ellipses = ellipses + 1 if point == ELLIPSIS else 0
            stops = stops + 1 if point == STOP else 0
            full_stops = full_stops + 1 if point == FULL_STOP else 0
            out[2] += (ellipses == 1) + (stops == 2) + (full_stops == 2)
            out[7] += (flag & ASCII_PUNCTUATION) != 0
        out[0] += in_sentence
        begin = end
    return counts


@_compiled
def _longest(ends_N):
    """Length of the longest document."""
    longest, begin = 0, 0
    for end in ends_N:
        longest = max(longest, end - begin)
        begin = end
    return longest


@_compiled
def count_folded(points_T, ends_N, flags):
    """([N, len(FOLDED_COUNTS)], [N] entropy of the characters, in nats)."""
    counts = np.zeros((len(ends_N), len(FOLDED_COUNTS)), np.int64)
    entropy_N = np.zeros(len(ends_N))
    times = np.zeros(CODES, np.int32)
    seen = np.empty(_longest(ends_N), np.uint32)
    begin = 0
    for document in range(len(ends_N)):
        end = ends_N[document]
        out = counts[document]
        distinct = 0
        for i in range(begin, end):
            point = points_T[i]
            flag = flags[point]
            out[0] += (flag & DIGIT) != 0
            out[1] += (flag & (WORD | SPACE)) != 0
            out[2] += (flag & PUNCTUATION) != 0
            out[5] += (flag & WORD) != 0
            out[6] += (flag & HAN) != 0
            out[7] += (flag & KANA_HANGUL) != 0
            if times[point] == 0:
                seen[distinct] = point
                distinct += 1
            times[point] += 1
            if i - begin == PREFIX - 1:
                out[3] = distinct
        if end - begin < PREFIX:
            out[3] = distinct
        out[4] = distinct
        for i in range(distinct):
            share = times[seen[i]] / (end - begin)
            entropy_N[document] -= share * np.log(share)
            times[seen[i]] = 0
        begin = end
    return counts, entropy_N


@_compiled
def count_bracketed(points_T, ends_N):
    """[N] characters inside 【】, from the first 【 to the first 】 after it, within a line."""
    counts_N = np.zeros(len(ends_N), np.int64)
    begin = 0
    for document in range(len(ends_N)):
        opened = -1
        for i in range(begin, ends_N[document]):
            point = points_T[i]
            if point == OPEN and opened < 0:
                opened = i
            elif point == CLOSE and opened >= 0:
                counts_N[document] += i - opened - 1
                opened = -1
            elif point == NEWLINE:
                opened = -1
        begin = ends_N[document]
    return counts_N


@_compiled
def _slot(key, keys, owner, mark, mask):
    """Where the key is in a hash table, or the free slot where it belongs: one whose owner is not `mark`."""
    slot = key * np.uint64(0x9E3779B97F4A7C15)
    slot = (slot ^ (slot >> np.uint64(32))) & mask
    while owner[slot] == mark and keys[slot] != key:
        slot = (slot + np.uint64(1)) & mask
    return slot


@_compiled
def _classify(symbols_T, n, alive, living, class_at, times, opening, table, mark):
    """Numbers the n-grams at the positions alive[:living]; class_at has the classes of their first n-1 symbols.

    Returns:
      (classes, positions): how many there are; alive[:positions] are those where n symbols fit, class_at, times and
      opening tell of their n-grams.
    """
    keys, owner, classes = table
    # a table as large as this document needs keeps short documents in the cache
    mask = np.uint64(15)
    while mask < np.uint64(2 * living):
        mask = mask * np.uint64(2) + np.uint64(1)
    found, kept = 0, 0
    for a in range(living):
        i = alive[a]
        if i + n > len(symbols_T):
            continue
        key = (np.uint64(class_at[i]) << np.uint64(32)) | np.uint64(symbols_T[i + n - 1])
        slot = _slot(key, keys, owner, mark, mask)
        if owner[slot] != mark:
            owner[slot], keys[slot], classes[slot] = mark, key, found
            times[found], opening[found] = 0, i
            found += 1
        class_at[i] = classes[slot]
        times[class_at[i]] += 1
        alive[kept] = i
        kept += 1
    return found, kept


@_compiled
def _cover(n, only, alive, positions, class_at, times, opening, before):
    """Keeps in `alive` where an n-gram begins that came up twice, and weighs what later occurrences cover.

    Returns:
      (living, covered): alive[:living] are those positions; weight of the symbols that lie in an occurrence after the
      first, of class `only` or, where that is -1, of any.
    """
    covered = reached = living = 0
    for a in range(positions):
        i = alive[a]
        ngram = class_at[i]
        if times[ngram] < 2:
            continue
        alive[living] = i
        living += 1
        if opening[ngram] != i and (only < 0 or ngram == only):
            covered += before[i + n] - before[max(i, reached)]
            reached = i + n
    return living, covered


@_compiled
def count_repeats(symbols_T, weights_T, ends_N, top, last):
    """How much of each document (of its first REPEATS_WITHIN symbols) its repeated n-grams cover, n = 2 ... last.

    N-grams are compared exactly: the class of an n-gram is the number of the pair (class of its first n-1 symbols, its
    last symbol), and only positions whose (n-1)-gram came up twice are looked at again.

    Returns:
      covered [N, last-1]: weight of the symbols that lie in an occurrence after an n-gram's first; up to n = top: of
        the most frequent n-gram (the first of them to occur) alone, beyond: of any.
      most [N, last-1]: occurrences of the most frequent n-gram; 0 where no n-gram fits.
      total [N]: weight of these symbols.
    """
    covered = np.zeros((len(ends_N), last - 1), np.int64)
    most = np.zeros((len(ends_N), last - 1), np.int64)
    total_N = np.zeros(len(ends_N), np.int64)
    longest = max(1, min(_longest(ends_N), REPEATS_WITHIN))
    room = 16
    while room <= 2 * longest:
        room *= 2
    table = np.empty(room, np.uint64), np.zeros(room, np.int64), np.empty(room, np.int32)  # keys, owner, classes
    class_at = np.empty(longest, np.int32)  # of the n-gram that begins here
    alive = np.empty(longest, np.int32)  # positions, ascending, that may begin a repeated n-gram
    times, opening = np.empty(longest, np.int32), np.empty(longest, np.int32)  # by class: count, first position
    before = np.zeros(longest + 1, np.int64)  # weight before a position
    mark, begin = 0, 0
    for document in range(len(ends_N)):
        length = min(ends_N[document] - begin, REPEATS_WITHIN)
        symbols = symbols_T[begin : begin + length]
        for i in range(length):
            before[i + 1] = before[i] + weights_T[begin + i]
            class_at[i], alive[i] = 0, i
        total_N[document] = before[length]
        living = length
        for n in range(1, last + 1):
            mark += 1
            found, positions = _classify(symbols, n, alive, living, class_at, times, opening, table, mark)
            best = times[:found].argmax() if found else -1
            only = best if n <= top else -1
            living, weight = _cover(n, only, alive, positions, class_at, times, opening, before)
            if n > 1:
                covered[document, n - 2] = weight
                most[document, n - 2] = times[best] if found else length >= n
        begin = ends_N[document]
    return covered, most, total_N
