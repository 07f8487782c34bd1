"""Several documents seen together, so that counting runs over one array.

Shapes: N documents, T code points in all of them one after the other, L lines of one document.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import rjieba

_NON_WORD = re.compile(r"\W+")


@functools.cache
def categories() -> np.ndarray:
    """[0x110000] uint8: first letter of each code point's Unicode category (L letter, N number, P ...)."""
    table = np.empty(0x110000, np.uint8)
    for code in range(len(table)):
        table[code] = ord(unicodedata.category(chr(code))[0])
    return table


def code_points(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(points_T uint32, ends_N): document i is points[ends[i-1]:ends[i]]."""
    encoded = [text.encode("utf-32-le") for text in texts]
    ends = np.cumsum([len(item) // 4 for item in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint32), ends


def sum_per_document(values_T: np.ndarray, ends_N: np.ndarray) -> np.ndarray:
    """[N] sums of `values` over each document; 0 for an empty one."""
    running = np.concatenate([[0], np.cumsum(values_T)])
    return np.diff(running[np.concatenate([[0], ends_N])])


class TextBatch:
    """Texts and the views that the measures share; each view is made once, when first asked for."""

    def __init__(self, texts: Sequence[str]):
        self.texts = list(texts)

    def __len__(self) -> int:
        return len(self.texts)

    @functools.cached_property
    def folded(self) -> list[str]:
        """NFKC copies: full-width forms count as their ASCII twins. The documents stay as they are."""
        return [unicodedata.normalize("NFKC", text) for text in self.texts]

    @functools.cached_property
    def lines(self) -> list[list[str]]:
        """The non-empty lines of each text, stripped."""
        return [[line for line in map(str.strip, text.split("\n")) if line] for text in self.texts]

    @functools.cached_property
    def words(self) -> list[list[str]]:
        """White-space separated words, for languages that have them."""
        return [text.split() for text in self.texts]

    @functools.cached_property
    def chinese_word_length(self) -> np.ndarray:
        """[N] mean length of jieba's words in the NFKC copy, without punctuation; 0 without words."""
        means = []
        for text in self.folded:
            letters = _NON_WORD.sub("", text)
            means.append(len(letters) / len(rjieba.cut(letters)) if letters else 0.0)
        return np.array(means)

    @functools.cached_property
    def folded_points(self) -> tuple[np.ndarray, np.ndarray]:
        """Code points of the NFKC copies."""
        return code_points(self.folded)

    @functools.cached_property
    def folded_lengths(self) -> np.ndarray:
        """[N] characters of the NFKC copies."""
        return np.array([len(text) for text in self.folded], np.float64)

    @functools.cached_property
    def _folded_categories(self) -> np.ndarray:
        return categories()[self.folded_points[0]]

    def count_category(self, letters: str) -> np.ndarray:
        """[N] characters of the NFKC copy in any of these Unicode categories (first letters)."""
        hit = np.isin(self._folded_categories, np.frombuffer(letters.encode(), np.uint8))
        return sum_per_document(hit, self.folded_points[1])
