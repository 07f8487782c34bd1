"""Several documents seen together, so that counting runs over one array.

Shapes: N documents, T code points in all of them one after the other, L lines of one document.
"""

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import rjieba

from ctllm_jax.common.errors import UserError
from data_pipeline.filters import kernels, tables

_ENCODING = "utf-32-le"
_MARKS_TOGETHER = 256  # of characters that join with the one before, normalised together at most
_SENTENCE_OR_LINE = re.compile(f"[{re.escape(tables.SENTENCE_ENDS)}\\n]")


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """What measures need to know.

    read_more: endings of lines that only ask to read on, as they are written.
    segmenter: 'jieba', or 'rjieba', which is twenty times faster and cuts one document in twenty a little otherwise.
    segmented_characters: [characters] so many of a text are cut into words; None: all.
    """

    read_more: tuple[str, ...]
    segmenter: str
    segmented_characters: int | None

    def __post_init__(self) -> None:
        if self.segmenter not in ("jieba", "rjieba"):
            raise UserError(f"filters.measures.segmenter: {self.segmenter!r} is neither 'jieba' nor 'rjieba'")
        if self.segmented_characters is not None and self.segmented_characters < 1:
            raise UserError("filters.measures.segmented_characters must be at least 1, or None for the whole text")


def segmenter(name: str) -> Callable[[str], list[str]]:
    """The function that cuts Chinese text into words; white space comes as words, too."""
    if name == "rjieba":
        return rjieba.cut
    import jieba

    jieba.setLogLevel(60)  # it tells how long it took to load its dictionary
    return jieba.lcut


def utf8(text: str) -> str:
    """The text with lone surrogates, which no encoder takes, turned into replacement characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def code_points(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(points_T uint32, ends_N): document i is points[ends[i-1]:ends[i]]."""
    encoded = [text.encode(_ENCODING, "surrogatepass") for text in texts]
    ends = np.cumsum([len(item) // 4 for item in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint32), ends


def sum_per_document(values_T: np.ndarray, ends_N: np.ndarray) -> np.ndarray:
    """[N] sums of `values` over each document; 0 for an empty one."""
    running = np.concatenate([[0], np.cumsum(values_T)])
    return np.diff(running[np.concatenate([[0], ends_N])])


class TextBatch:
    """Texts and the views that the measures share; each view is made once, when first asked for.

    originals: the texts as they came, before anything was rewritten (None: they are the texts).
    """

    def __init__(self, texts: Sequence[str], config: MeasureConfig, originals: Sequence[str] | None = None):
        self.texts = list(texts)
        self._config = config
        self._originals = self.texts if originals is None else list(originals)

    def __len__(self) -> int:
        return len(self.texts)

    @functools.cached_property
    def lines(self) -> list[list[str]]:
        """The non-empty lines of each text, stripped."""
        return [[line for line in map(str.strip, text.split("\n")) if line] for text in self.texts]

    @functools.cached_property
    def words(self) -> list[list[str]]:
        """White-space separated words, for languages that have them."""
        return [text.split() for text in self.texts]

    @functools.cached_property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Code points of the texts."""
        return code_points(self.texts)

    @functools.cached_property
    def folded(self) -> tuple[np.ndarray, np.ndarray]:
        """Code points of NFKC copies: full-width forms count as their ASCII twins. The documents stay as they are."""
        return fold(self.texts, *self.points)

    @functools.cached_property
    def folded_originals(self) -> tuple[np.ndarray, np.ndarray]:
        """Code points of NFKC copies of the texts as they came."""
        return self.folded if self._originals == self.texts else fold(self._originals, *code_points(self._originals))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[N] characters of the texts."""
        return _lengths(self.points[1])

    @functools.cached_property
    def folded_lengths(self) -> np.ndarray:
        """[N] characters of the NFKC copies."""
        return _lengths(self.folded[1])

    @functools.cached_property
    def counted(self) -> dict[str, np.ndarray]:
        """What is counted in the texts: {name of kernels.TEXT_COUNTS: [N]}."""
        width = max(map(len, self._config.read_more), default=0)
        suffixes = np.zeros((len(self._config.read_more), width), np.uint32)
        for i, suffix in enumerate(self._config.read_more):
            suffixes[i, : len(suffix)] = [ord(character) for character in suffix]
        counts = kernels.count_text(*self.points, tables.flags(), suffixes)
        return dict(zip(kernels.TEXT_COUNTS, counts.T, strict=True))

    @functools.cached_property
    def counted_folded(self) -> dict[str, np.ndarray]:
        """What is counted in the NFKC copies: {name of kernels.FOLDED_COUNTS, or 'entropy': [N]}."""
        counts, entropy_N = kernels.count_folded(*self.folded, tables.flags())
        return dict(zip(kernels.FOLDED_COUNTS, counts.T, strict=True)) | {"entropy": entropy_N}

    @functools.cached_property
    def bracketed(self) -> np.ndarray:
        """[N] share of the characters inside 【】, in the texts as they came."""
        points_T, ends_N = self.folded_originals
        return kernels.count_bracketed(points_T, ends_N) / np.maximum(_lengths(ends_N), 1)

    @functools.cached_property
    def repeated_sentences(self) -> tuple[np.ndarray, np.ndarray]:
        """([N], [N]): share of the sentences that stood before, and of their characters; a line ends one, too."""
        shares = np.zeros((2, len(self)))
        for i, text in enumerate(self.texts):
            parts = [part for part in map(str.strip, _SENTENCE_OR_LINE.split(text)) if part]
            distinct = set(parts)
            if len(distinct) < len(parts):
                total = sum(map(len, parts))
                shares[:, i] = 1 - len(distinct) / len(parts), 1 - sum(map(len, distinct)) / total
        return shares[0], shares[1]

    @functools.cached_property
    def chinese_word_length(self) -> np.ndarray:
        """[N] mean length of the words in the NFKC copy, without punctuation and symbols; 0 without words."""
        cut, means = segmenter(self._config.segmenter), []
        points_T, ends_N = self.folded
        wanted_T = (tables.flags()[points_T] & (tables.WORD | tables.SPACE)) != 0
        for end, length in zip(ends_N, self.folded_lengths.astype(int), strict=True):
            begin = end - length
            sample = slice(begin, min(end, begin + (self._config.segmented_characters or length)))
            letters = points_T[sample][wanted_T[sample]].tobytes().decode(_ENCODING, "replace")
            words = [word for word in cut(letters) if not word.isspace()]
            means.append(sum(map(len, words)) / len(words) if words else 0.0)
        return np.array(means)


def fold(texts: Sequence[str], points_T: np.ndarray, ends_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Code points of the texts' NFKC forms: by table, but for texts whose characters may join with one another."""
    table = tables.compatibility()
    sizes_N = kernels.folded_sizes(points_T, ends_N, table.image, table.starts, table.joins)
    simple_N = sizes_N >= 0
    joining = {}
    for i in np.flatnonzero(~simple_N):
        begin, end = ends_N[i] - len(texts[i]), ends_N[i]
        joining[i] = code_points([_nfkc(texts[i], table.joins[points_T[begin:end]])])[0]
        sizes_N[i] = len(joining[i])
    folded_ends_N = np.cumsum(sizes_N)
    out = np.empty(sizes_N.sum(), np.uint32)
    kernels.fold(points_T, ends_N, simple_N, table.image, table.text, table.starts, folded_ends_N, out)
    for i, points in joining.items():
        out[folded_ends_N[i] - len(points) : folded_ends_N[i]] = points
    return out, folded_ends_N


def _nfkc(text: str, joins_T: np.ndarray) -> str:
    """The NFKC form. Python takes the square of a run of marks: one that no script has is cut in pieces."""
    edges = np.concatenate([[-1], np.flatnonzero(~joins_T), [len(text)]])  # runs of marks lie between them
    runs = np.flatnonzero(np.diff(edges) > _MARKS_TOGETHER + 1)
    cuts = [cut for run in runs for cut in range(edges[run] + 1 + _MARKS_TOGETHER, edges[run + 1], _MARKS_TOGETHER)]
    return "".join(unicodedata.normalize("NFKC", text[a:b]) for a, b in itertools.pairwise([0, *cuts, len(text)]))


def _lengths(ends_N: np.ndarray) -> np.ndarray:
    return np.diff(ends_N, prepend=0).astype(np.float64)
