"""What n-grams are made of: characters of scripts that part no words, words of the others, on folded text.

A unit is one letter without case (Unicode's Lo: Han, kana, Hangul, Thai), or a run of other letters, marks and numbers.
So 13 units are 13 characters of Chinese and 13 words of English, in the same text too. The folding is deduplication's:
width, case, script, punctuation and spacing do not count.
Shapes: N texts, T folded code points, U units.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Sequence

import numpy as np

from data_pipeline.contamination import kernels
from data_pipeline.dedup.folding import fold_words
from data_pipeline.filters import tables

_PIECE = 1 << 16  # characters whose places are looked up together


@dataclasses.dataclass(frozen=True)
class Units:
    """hash_U: of each unit; begin_U, end_U: its code points in the folded text; ends_N: where each text's units end."""

    hash_U: np.ndarray
    begin_U: np.ndarray
    end_U: np.ndarray
    ends_N: np.ndarray


def units_of(texts: Sequence[str]) -> Units:
    """The units of some texts, one after the other."""
    return Units(*kernels.units(*fold_words(texts), _alone()))


def characters_of(text: str) -> tuple[np.ndarray, np.ndarray]:
    """([U], [U]): where each unit of a text begins and ends in it, in characters as they are.

    Each character is folded by itself; where characters join (a letter and its accent) that may be a unit off.
    """
    folded, sizes = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)]
    for start in range(0, len(text), _PIECE):
        points, ends = fold_words(text[start : start + _PIECE])  # a text is a sequence of its characters
        folded.append(points)
        sizes.append(np.diff(ends, prepend=0))
    ends_C, points_T = np.cumsum(np.concatenate(sizes)), np.concatenate(folded)
    _, begin_U, end_U, _ = kernels.units(points_T, np.array([len(points_T)]), _alone())
    return np.searchsorted(ends_C, begin_U, "right"), np.searchsorted(ends_C, end_U, "left") + 1


@functools.cache
def _alone() -> np.ndarray:
    """[CODES] bool: characters that are units by themselves."""
    alone = np.zeros(tables.CODES, bool)
    for code in np.flatnonzero(tables.categories() == ord("L")).tolist():
        alone[code] = unicodedata.category(chr(code)) == "Lo"
    return alone
