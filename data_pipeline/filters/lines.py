"""Sentence rules: lines that are dropped from a Chinese text.

CT-LLM's paper lists them as applied, its released code never calls them. They cost headings, lists and verse, so the
default configuration leaves them off.
"""

import dataclasses
import functools
import pathlib

from ctllm_jax.common.errors import UserError
from data_pipeline.filters.batch import segmenter, utf8


@dataclasses.dataclass(frozen=True)
class LineConfig:
    """A line stays if all hold; a neutral value switches a rule off.

    ends: it ends in one of these characters ('': any).
    min_words: [words] it has at least so many (0: any).
    phrases: it holds none of these, in whatever case.
    word_lists: it has no word of the .txt files in this folder, an entry a line ('': no lists).
    """

    ends: str
    min_words: int
    phrases: tuple[str, ...]
    word_lists: str


@functools.cache
def read_words(folder: str) -> frozenset[str]:
    """The entries of a folder's .txt files; none without a folder.

    Raises:
      UserError: the folder does not exist, has no list, or one that is not in UTF-8.
    """
    if not folder:
        return frozenset()
    files = sorted(pathlib.Path(folder).glob("*.txt"))
    if not files:
        raise UserError(f"filters.lines.word_lists: no .txt file in {folder!r}")
    words: set[str] = set()
    for file in files:
        try:
            words.update(map(str.strip, file.read_text(encoding="utf-8-sig").splitlines()))
        except UnicodeDecodeError as error:
            raise UserError(f"filters.lines.word_lists: {file} is not in UTF-8 ({error.reason})") from None
    return frozenset(filter(None, words))


class LineFilter:
    """Callable: text -> the text without the lines that break a rule; empty lines stay."""

    def __init__(self, config: LineConfig, segmenter_name: str):
        self._config = config
        self._words = read_words(config.word_lists)
        self._cut = segmenter(segmenter_name) if config.min_words or self._words else None
        self._phrases = tuple(phrase.lower() for phrase in config.phrases)
        self._idle = not (config.ends or config.min_words or config.phrases or self._words)

    def __call__(self, text: str) -> str:
        if self._idle:
            return text
        return "\n".join(line for line in text.split("\n") if not line.strip() or self._stays(line.strip()))

    def _stays(self, line: str) -> bool:
        if self._config.ends and line[-1] not in self._config.ends:
            return False
        if self._phrases and any(phrase in line.lower() for phrase in self._phrases):
            return False
        if self._cut is None:
            return True
        words = [word for word in self._cut(utf8(line)) if not word.isspace()]
        return len(words) >= self._config.min_words and self._words.isdisjoint(words)
