"""What is measured on a document, gathered in one table per language family.

Every measure takes a TextBatch and gives one number per document. Limits stand in the configuration; a
measure without a limit is still recorded. Sources: the released CT-LLM filter (`filter/filter.py`), repaired where it
is known to be wrong; MAP-NEO's English filter (Gopher, C4, RefinedWeb); the file rules of StarCoder and RedPajama.
The Chinese measures are counted by compiled code (`kernels.py`) and written out plainly in `reference.py`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from data_pipeline.filters import tables
from data_pipeline.filters.batch import TextBatch, sum_per_document
from data_pipeline.filters.kernels import PREFIX
from data_pipeline.filters.repetition import NAMES, repetition

Measure = Callable[[TextBatch], np.ndarray]

_BULLETS = (*tables.BULLETS, "- ", "* ")
_STOP_WORDS = frozenset("the be to of and that have with".split())
_GENERATED = re.compile(
    r"auto-?generated|automatically generated|generated automatically|this file (?:is|was) generated"
    r"|\A(?>.*?code generated ).*do not edit",  # Go's own mark; behind the first is behind any
    re.IGNORECASE,
)
_HEAD = 5  # lines in which a file may say that it was generated
_ENCODED = (
    re.compile(r"[a-zA-Z0-9+/=\n]{64,}"),  # base64
    re.compile(r"(?:\b(?:0x|\\x)?[0-9a-fA-F]{2}(?:,|\b\s?)){8,}"),  # bytes
    re.compile(r"(?:\\u[0-9a-fA-F]{4}){8,}"),
)


def _each(function: Callable[[str], float], view: str = "texts") -> Measure:
    """A measure from a function of one document's view (an attribute of TextBatch)."""
    return lambda batch: np.array([function(item) for item in getattr(batch, view)], np.float64)


def _share(function: Callable[[str], float], view: str = "texts") -> Measure:
    """As `_each`, over the number of the view's items (characters, lines or words)."""
    return _each(lambda item: function(item) / len(item) if len(item) else 0.0, view)


def _per_character(name: str) -> Measure:
    """A count of kernels.TEXT_COUNTS over the characters."""
    return lambda batch: batch.counted[name] / np.maximum(batch.lengths, 1)


def _per_line(name: str) -> Measure:
    """A count of kernels.TEXT_COUNTS over the lines that are not empty."""
    return lambda batch: batch.counted[name] / np.maximum(batch.counted["lines"], 1)


def _count(name: str) -> Measure:
    """A count of kernels.TEXT_COUNTS."""
    return lambda batch: batch.counted[name].astype(np.float64)


def _characters(batch: TextBatch) -> np.ndarray:
    return batch.folded_lengths


def _punctuation(batch: TextBatch) -> np.ndarray:
    return batch.counted_folded["punctuation"].astype(np.float64)


def _digits(batch: TextBatch) -> np.ndarray:
    return batch.counted_folded["digits"] / np.maximum(batch.counted_folded["not_punctuation"], 1)


def _of_words(name: str) -> Measure:
    """A count of kernels.FOLDED_COUNTS over the letters and digits."""
    return lambda batch: batch.counted_folded[name] / np.maximum(batch.counted_folded["word_characters"], 1)


def _distinct_in_prefix(batch: TextBatch) -> np.ndarray:
    return batch.counted_folded["distinct_in_prefix"] / np.clip(batch.folded_lengths, 1, PREFIX)


def _distinct(batch: TextBatch) -> np.ndarray:
    return batch.counted_folded["distinct"] / np.maximum(batch.folded_lengths, 1)


def _category_share(letters: str) -> Measure:
    """Share of the NFKC copy's characters that are in any of these Unicode categories (first letters)."""
    wanted = np.frombuffer(letters.encode(), np.uint8)

    def measure(batch: TextBatch) -> np.ndarray:
        points_T, ends_N = batch.folded
        hits_T = np.isin(tables.categories()[points_T], wanted)
        return sum_per_document(hits_T, ends_N) / np.maximum(batch.folded_lengths, 1)

    return measure


def _not_alphabetic(batch: TextBatch) -> np.ndarray:
    """Characters that are no letters, over those that are no punctuation or symbol; white space is neither."""
    points_T, ends_N = batch.folded
    flags_T = tables.flags()[points_T]
    letters_T = tables.categories()[points_T] == ord("L")
    words_N = sum_per_document((flags_T & tables.WORD) != 0, ends_N)
    return (words_N - sum_per_document(letters_T, ends_N)) / np.maximum(words_N, 1)


def _entropy(items: str | list[str]) -> float:
    """Entropy of the items' distribution, in nats."""
    total = len(items)
    return -sum(count / total * math.log(count / total) for count in Counter(items).values())


def _ends(endings: tuple[str, ...]) -> Callable[[list[str]], int]:
    return lambda lines: sum(line.endswith(endings) for line in lines)


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


def _generated(lines: list[str]) -> int:
    return sum(_GENERATED.search(line) is not None for line in lines[:_HEAD])


def _encoded(text: str) -> list[int]:
    return [len(match.group()) for pattern in _ENCODED for match in pattern.finditer(text)]


def _character_repetition(batch: TextBatch) -> dict[str, np.ndarray]:
    """Character n-grams; a run of white space, or of one mark, counts as one character: a ruler is no repetition."""
    points_T, ends_N = batch.points
    flags_T = tables.flags()[points_T]
    space_T = (flags_T & tables.SPACE) != 0
    mark_T = ((flags_T & tables.WORD) == 0) | (points_T == ord("_"))
    same_T = (points_T[1:] == points_T[:-1]) & mark_T[1:]
    continues_T = np.concatenate([[False], (space_T[1:] & space_T[:-1]) | same_T])[: len(space_T)]
    continues_T[ends_N[:-1][ends_N[:-1] < len(space_T)]] = False  # a document's first character continues nothing
    run_T = np.concatenate([continues_T[1:], [False]]) & ~continues_T & space_T
    symbols_T = np.where(run_T, np.uint32(ord(" ")), points_T)[~continues_T]
    return repetition(symbols_T, np.ones(len(symbols_T), np.int64), np.cumsum(sum_per_document(~continues_T, ends_N)))


def _word_repetition(batch: TextBatch) -> dict[str, np.ndarray]:
    """Word n-grams, weighted by the words' characters."""
    words = [word for document in batch.words for word in document]
    ids = {}
    symbols_T = np.array([ids.setdefault(word, len(ids)) for word in words], np.uint32)
    ends_N = np.cumsum([len(document) for document in batch.words], dtype=np.int64)
    return repetition(symbols_T, np.array([len(word) for word in words], np.int64), ends_N)


CHINESE: dict[str, Measure] = {
    "bracketed": lambda batch: batch.bracketed,
    "sentences": _count("sentences"),
    "characters": _characters,
    "mean_word_length": lambda batch: batch.chinese_word_length,
    "hash_runs": _per_character("hash_runs"),
    "ellipsis_runs": _per_character("ellipsis_runs"),
    "digits": _digits,
    "han": _of_words("han"),
    "kana_hangul": _of_words("kana_hangul"),
    "read_more_lines": _per_line("read_more_lines"),
    "bullet_lines": _per_line("bullet_lines"),
    "mean_line_length": _per_line("line_characters"),
    "punctuation": _punctuation,
    "ascii_punctuation": _count("ascii_punctuation"),
    "distinct_characters": _distinct_in_prefix,
    "distinct_in_all": _distinct,
    "character_entropy": lambda batch: batch.counted_folded["entropy"],
    "duplicate_sentences": lambda batch: batch.repeated_sentences[0],
    "duplicate_sentence_characters": lambda batch: batch.repeated_sentences[1],
}
ENGLISH: dict[str, Measure] = {
    "characters": _characters,
    "lines": _count("lines"),
    "sentences": _count("sentences"),
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
    "lorem_ipsum": _share(lambda text: text.lower().count("lorem ipsum")),
    "hash_runs": _per_character("hash_runs"),
    "ellipsis_runs": _per_character("ellipsis_runs"),
    "punctuation": _punctuation,
    "not_alphabetic": _not_alphabetic,
    "digits": _digits,
    "ellipsis_lines": _share(_ends(("...", "…")), "lines"),
    "bullet_lines": _share(_begins(_BULLETS), "lines"),
    "read_more_lines": _per_line("read_more_lines"),
    "duplicate_lines": _share(_repeated_lines, "lines"),
    "duplicate_line_characters": _each(_repeated_line_share, "lines"),
}
CODE: dict[str, Measure] = {
    "characters": _characters,
    "lines": _count("lines"),
    "longest_line": _each(lambda lines: max(map(len, lines), default=0), "lines"),
    "mean_line_length": _per_line("line_characters"),
    "alphanumeric": _category_share("LN"),
    "alphabetic": _category_share("L"),
    "generated": _each(_generated, "lines"),
    "encoded": _share(lambda text: sum(_encoded(text))),
    "longest_encoded": _each(lambda text: max(_encoded(text), default=0)),
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
