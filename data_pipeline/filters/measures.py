"""What is measured on a document: small pure functions, gathered in one table per language family.

Every measure takes a TextBatch and gives one number per document. Limits stand in the configuration; a
measure without a limit is still recorded. Sources: spec of the released CT-LLM filter (`filter/filter.py`),
repaired where it is known to be wrong; MAP-NEO's English filter (Gopher, C4, RefinedWeb); StarCoder's code
filter.
"""

import math
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from data_pipeline.filters.batch import TextBatch, code_points
from data_pipeline.filters.repetition import NAMES, repetition

Measure = Callable[[TextBatch], np.ndarray]

_SENTENCE_END = re.compile(r'[.!?;"…。！？；”]+')
_ELLIPSIS = re.compile(r"…+|\.{2,}|。{2,}")
_HASHES = re.compile(r"#+")
_BRACKETS = re.compile(r"【[^【】\n]*】")  # stops at the next bracket: linear time on any text
_DIGITS = re.compile(r"\d")
_SPACES = re.compile(r"\s{2,}")
_READ_MORE = ("readmore", "read more", "展开", "更多", "。。。")
_BULLETS = tuple("•●○■□▪▫※·➢‣▶◀◦–")
_STOP_WORDS = frozenset("the be to of and that have with".split())
_PREFIX = 1000  # characters on which distinct characters are counted, so that long texts are not punished


def _each(function: Callable[[str], float], view: str = "texts") -> Measure:
    """A measure from a function of one document's view (an attribute of TextBatch)."""
    return lambda batch: np.array([function(item) for item in getattr(batch, view)], np.float64)


def _share(function: Callable[[str], float], view: str = "texts") -> Measure:
    """As `_each`, over the number of the view's items (characters, lines or words)."""
    return _each(lambda item: function(item) / len(item) if len(item) else 0.0, view)


def _characters(batch: TextBatch) -> np.ndarray:
    return batch.folded_lengths


def _sentences(text: str) -> int:
    return sum(1 for part in _SENTENCE_END.split(text) if part.strip())


def _digit_share(batch: TextBatch) -> np.ndarray:
    digits = np.array([len(_DIGITS.findall(text)) for text in batch.folded])
    return digits / np.maximum(batch.folded_lengths - batch.count_category("P"), 1)


def _distinct_share(text: str) -> float:
    return len(set(text[:_PREFIX])) / min(len(text), _PREFIX)


def _entropy(items: str | list[str]) -> float:
    """Entropy of the items' distribution, in nats."""
    total = len(items)
    return -sum(count / total * math.log(count / total) for count in Counter(items).values())


def _bracketed(text: str) -> int:
    return sum(len(match) - 2 for match in _BRACKETS.findall(text))


def _ends(endings: tuple[str, ...]) -> Callable[[list[str]], int]:
    return lambda lines: sum(line.lower().endswith(endings) for line in lines)


def _begins(beginnings: tuple[str, ...]) -> Callable[[list[str]], int]:
    return lambda lines: sum(line.startswith(beginnings) for line in lines)


def _mean_length(items: list[str]) -> float:
    return sum(map(len, items)) / len(items) if items else 0.0


def _repeated_lines(lines: list[str]) -> int:
    return len(lines) - len(set(lines))


def _repeated_line_share(lines: list[str]) -> float:
    """Characters in lines that stood before, over the characters of all lines."""
    total = sum(map(len, lines))
    return (total - sum(map(len, set(lines)))) / total if total else 0.0


def _stop_words(words: list[str]) -> int:
    return sum(word.strip(".,;:!?\"'()").lower() in _STOP_WORDS for word in words)


def _without_letter(words: list[str]) -> int:
    return sum(not any(map(str.isalpha, word)) for word in words)


def _capitals(words: list[str]) -> int:
    return sum(len(word) > 1 and word.isupper() for word in words)


def _symbol_words(words: list[str]) -> int:
    return sum(word.startswith("#") or word.endswith(("...", "…")) for word in words)


def _character_repetition(batch: TextBatch) -> dict[str, np.ndarray]:
    """Character n-grams; a run of white space counts as one character, so that padding is no repetition."""
    points_T, ends_N = code_points([_SPACES.sub(" ", text) for text in batch.texts])
    return repetition(points_T, np.ones(len(points_T), np.int64), ends_N)


def _word_repetition(batch: TextBatch) -> dict[str, np.ndarray]:
    """Word n-grams, weighted by the words' characters."""
    words = [word for document in batch.words for word in document]
    ids = {}
    symbols_T = np.array([ids.setdefault(word, len(ids)) for word in words], np.uint64)
    ends_N = np.cumsum([len(document) for document in batch.words], dtype=np.int64)
    return repetition(symbols_T, np.array([len(word) for word in words], np.int64), ends_N)


CHINESE: dict[str, Measure] = {
    "sentences": _each(_sentences),
    "characters": _characters,
    "mean_word_length": lambda batch: batch.chinese_word_length,
    "hash_runs": _share(lambda text: len(_HASHES.findall(text))),
    "ellipsis_runs": _share(lambda text: len(_ELLIPSIS.findall(text))),
    "bracketed": _share(_bracketed),
    "digits": _digit_share,
    "read_more_lines": _share(_ends(_READ_MORE), "lines"),
    "bullet_lines": _share(_begins(_BULLETS), "lines"),
    "mean_line_length": _each(_mean_length, "lines"),
    "punctuation": lambda batch: batch.count_category("P").astype(np.float64),
    "distinct_characters": _each(_distinct_share, "folded"),
    "character_entropy": _each(_entropy, "folded"),
}
ENGLISH: dict[str, Measure] = {
    "characters": _characters,
    "sentences": _each(_sentences),
    "words": _each(len, "words"),
    "mean_word_length": _each(_mean_length, "words"),
    "stop_words": _each(_stop_words, "words"),
    "stop_word_share": _share(_stop_words, "words"),
    "words_without_letter": _share(_without_letter, "words"),
    "symbol_words": _share(_symbol_words, "words"),
    "capital_words": _share(_capitals, "words"),
    "distinct_words": _share(lambda words: len(set(words)), "words"),
    "word_entropy": _each(_entropy, "words"),
    "curly_braces": _share(lambda text: text.count("{") + text.count("}")),
    "lorem_ipsum": _each(lambda text: text.lower().count("lorem ipsum")),
    "digits": _digit_share,
    "ellipsis_lines": _share(_ends(("...", "…")), "lines"),
    "bullet_lines": _share(_begins((*_BULLETS, "- ", "* ")), "lines"),
    "read_more_lines": _share(_ends(_READ_MORE), "lines"),
    "duplicate_lines": _share(_repeated_lines, "lines"),
    "duplicate_line_characters": _each(_repeated_line_share, "lines"),
}
CODE: dict[str, Measure] = {
    "characters": _characters,
    "longest_line": _each(lambda lines: max(map(len, lines), default=0), "lines"),
    "mean_line_length": _each(_mean_length, "lines"),
    "alphanumeric": lambda batch: batch.count_category("LN") / np.maximum(batch.folded_lengths, 1),
}
FAMILIES: dict[str, dict[str, Measure]] = {"chinese": CHINESE, "english": ENGLISH, "code": CODE}
REPETITION = {"chinese": _character_repetition, "english": _word_repetition}


def family(subset: str) -> str:
    """The language family whose rules a subset's documents meet."""
    return {"en": "english", "code": "code"}.get(subset, "chinese")


def names(family_name: str) -> tuple[str, ...]:
    """All measures of a family, in the order in which they are recorded."""
    return (*FAMILIES[family_name], *(NAMES if family_name in REPETITION else ()))


def measure(family_name: str, batch: TextBatch) -> dict[str, np.ndarray]:
    """{measure: [N]} for a batch of one family."""
    values = {name: function(batch) for name, function in FAMILIES[family_name].items()}
    if family_name in REPETITION:
        values.update(REPETITION[family_name](batch))
    return values
