"""Sentences that repeat an earlier one of their document, by CT-LLM's rules.

paper     as the paper draws it: the edit distance is below a tenth of the shorter sentence
released  as its script decides: at most a tenth of the longer one; up to 15 characters only the same
The paper and the script ask first whether more than a third of the characters, or at least a third, are shared, and the
script whether the lengths are close; two sentences at such a distance always are.

A sentence is compared with the 2,000 before it, dropped or not, where the script takes them all: time stays linear in
the length of a book. Newlines end no sentence, as in the script.
"""

import dataclasses
import re

import numba
import numpy as np

from data_pipeline.filters.batch import code_points

RULES = ("paper", "released")
WITHIN = 2000  # sentences before one with which it is compared
_SAME_UP_TO = 15  # characters of the shorter sentence
_SENTENCE = re.compile(r"[\[【]?[^.!?。！？\\…\]】\[【]*(?:……|[.!?。！？\\…\]】])?")
_BUCKETS = 32
_compiled = numba.njit(cache=True, nogil=True)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A sentence that was dropped, the first one that it repeats, and their edit distance."""

    sentence: str
    repeats: str
    distance: int


def similar_lines(text: str, rule: str) -> tuple[str, list[Dropped]]:
    """The text without its repeated sentences, and these. rule: one of RULES."""
    sentences = split(text)
    of_S, distance_S = _find(*code_points(sentences), rule == "paper", WITHIN)
    kept = [sentence for sentence, of in zip(sentences, of_S, strict=True) if of < 0]
    dropped = [
        Dropped(sentences[i], sentences[of_S[i]], int(distance_S[i])) for i in np.flatnonzero(of_S >= 0).tolist()
    ]
    return "".join(kept), dropped


def split(text: str) -> list[str]:
    """Sentences, which joined give the text: each ends with a mark or before an opening bracket."""
    return [sentence for sentence in _SENTENCE.findall(text) if sentence]


@_compiled
def _find(points_T, ends_S, paper, within):
    """(of_S, distance_S): the first earlier sentence that each one repeats, -1 for none, and their distance."""
    count = len(ends_S)
    of_S, distance_S = np.full(count, -1, np.int64), np.zeros(count, np.int64)
    begins_S = np.zeros(count, np.int64)
    begins_S[1:] = ends_S[:-1]
    bags = np.zeros((count, _BUCKETS), np.int32)
    longest = 0
    for s in range(count):
        longest = max(longest, ends_S[s] - begins_S[s])
        for i in range(begins_S[s], ends_S[s]):
            bags[s, points_T[i] % _BUCKETS] += 1
    row, above = np.empty(longest + 1, np.int64), np.empty(longest + 1, np.int64)
    for later in range(1, count):
        own = points_T[begins_S[later] : ends_S[later]]
        for earlier in range(max(0, later - within), later):
            other = points_T[begins_S[earlier] : ends_S[earlier]]
            shorter, longer = min(len(own), len(other)), max(len(own), len(other))
            if paper:
                most = (shorter - 1) // 10
            else:
                most = 0 if shorter <= _SAME_UP_TO else longer // 10
            if longer - shorter > most:
                continue
            differing = 0  # an edit changes two counts by one at most
            for bucket in range(_BUCKETS):
                differing += abs(bags[earlier, bucket] - bags[later, bucket])
            if differing > 2 * most:
                continue
            distance = _edit_distance(other, own, most, row, above)
            if distance <= most:
                of_S[later], distance_S[later] = earlier, distance
                break
    return of_S, distance_S


@_compiled
def _edit_distance(first, second, most, row, above):
    """Levenshtein's distance of two arrays where it is at most `most`, else something larger."""
    for j in range(len(second) + 1):
        above[j] = j
    for i in range(1, len(first) + 1):
        begin, end = max(1, i - most), min(len(second), i + most)
        row[begin - 1] = i if begin == 1 else most + 1
        least = row[begin - 1]
        for j in range(begin, end + 1):
            change = above[j - 1] + (first[i - 1] != second[j - 1])
            delete = above[j] + 1 if j < i + most else most + 1
            row[j] = min(change, delete, row[j - 1] + 1)
            least = min(least, row[j])
        if least > most:
            return most + 1
        row, above = above, row
    return above[len(second)]
