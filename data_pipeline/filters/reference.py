"""The measures on Chinese text once more, written as the rules read: one short function each, no arrays, no sharing.

This is what the compiled ones are held to, and where to look up what a rule means. Nothing here is fast. Sources: the
released CT-LLM filter, EvalWeb (mean line length), Gopher (repetition). "Folded" is the NFKC form.
"""

import collections
import math
import re
import string
import unicodedata

from data_pipeline.filters.batch import MeasureConfig, segmenter, utf8
from data_pipeline.filters.repetition import DUPLICATED, TOP

_HAN = re.compile(r"(?=\w)[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA_HANGUL = re.compile(r"(?=\w)[\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\uac00-\ud7af]")


def chinese(text: str, config: MeasureConfig, original: str | None = None) -> dict[str, float]:
    """Every measure of a document by name; `original` is its text before links or punctuation were rewritten."""
    folded = unicodedata.normalize("NFKC", text)
    return {
        "bracketed": bracketed(unicodedata.normalize("NFKC", text if original is None else original)),
        "sentences": len(sentences(text)),
        "characters": len(folded),
        "mean_word_length": mean_word_length(folded, config),
        "hash_runs": hash_runs(text),
        "ellipsis_runs": ellipsis_runs(text),
        "digits": digits(folded),
        "han": share(len(_HAN.findall(folded)), len(re.findall(r"\w", folded))),
        "kana_hangul": share(len(_KANA_HANGUL.findall(folded)), len(re.findall(r"\w", folded))),
        "read_more_lines": read_more_lines(text, config),
        "bullet_lines": bullet_lines(text),
        "mean_line_length": mean_line_length(text),
        "punctuation": punctuation(folded),
        "ascii_punctuation": ascii_punctuation(text),
        "distinct_characters": distinct(folded[:1000]),
        "distinct_in_all": distinct(folded),
        "character_entropy": entropy(folded),
        "duplicate_sentences": duplicate_sentences(text),
        "duplicate_sentence_characters": duplicate_sentence_characters(text),
        **character_repetition(text),
    }


def bracketed(folded: str) -> float:
    """Share of the characters that stand between 【 and 】 on one line."""
    return share(sum(len(inside) for inside in re.findall("【(.*?)】", folded)), len(folded))


def sentences(text: str) -> list[str]:
    """What stands between marks that end a sentence, where it is not empty."""
    return [part.strip() for part in re.split('[.!?;"…。！？；”]', text) if part.strip()]


def mean_word_length(folded: str, config: MeasureConfig) -> float:
    """Mean characters of the segmenter's words, after everything but letters, digits, _ and white space is gone."""
    letters = re.sub(r"[^\w\s]", "", folded[: config.segmented_characters])
    words = [word for word in segmenter(config.segmenter)(utf8(letters)) if word.strip()]
    return share(sum(map(len, words)), len(words))


def hash_runs(text: str) -> float:
    """Runs of # per character."""
    return share(len(re.findall("#+", text)), len(text))


def ellipsis_runs(text: str) -> float:
    """Runs of …, of two or more full stops, or of two or more 。, per character."""
    return share(len(re.findall(r"…+|\.{2,}|。{2,}", text)), len(text))


def digits(folded: str) -> float:
    """Digits over letters, digits, _ and white space."""
    return share(len(re.findall(r"\d", folded)), len(re.findall(r"[\w\s]", folded)))


def lines(text: str) -> list[str]:
    """The lines that are not empty, without the white space around them."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def read_more_lines(text: str, config: MeasureConfig) -> float:
    """Share of the lines that end in an invitation to read on."""
    return share(sum(line.endswith(config.read_more) for line in lines(text)), len(lines(text)))


def bullet_lines(text: str) -> float:
    """Share of the lines that begin with a bullet."""
    return share(sum(line[0] in "•●○■□▪▫※·➢‣▶◀◦–" for line in lines(text)), len(lines(text)))


def mean_line_length(text: str) -> float:
    """Mean characters of the lines."""
    return share(sum(map(len, lines(text))), len(lines(text)))


def punctuation(folded: str) -> float:
    """Number of punctuation characters."""
    return sum(unicodedata.category(character)[0] == "P" for character in folded)


def ascii_punctuation(text: str) -> float:
    """Number of ASCII punctuation characters and …."""
    return sum(character in string.punctuation + "…" for character in text)


def distinct(folded: str) -> float:
    """Share of distinct characters."""
    return share(len(set(folded)), len(folded))


def entropy(folded: str) -> float:
    """Entropy of the characters' distribution, in nats."""
    shares = [count / len(folded) for count in collections.Counter(folded).values()]
    return -sum(p * math.log(p) for p in shares)


def _sentences_and_lines(text: str) -> list[str]:
    return [part.strip() for part in re.split('[.!?;"…。！？；”\n]', text) if part.strip()]


def duplicate_sentences(text: str) -> float:
    """Share of the sentences (a line ends one, too) that stood before."""
    parts = _sentences_and_lines(text)
    return share(len(parts) - len(set(parts)), len(parts))


def duplicate_sentence_characters(text: str) -> float:
    """Share of the sentences' characters that lie in sentences that stood before."""
    parts = _sentences_and_lines(text)
    total = sum(map(len, parts))
    return share(total - sum(map(len, set(parts))), total)


def character_repetition(text: str) -> dict[str, float]:
    """`repetition` of the first million characters; a run of white space, or of one mark, counts as one."""
    characters = re.sub(r"([\W_])\1+", r"\1", re.sub(r"\s{2,}", " ", text))[:1_000_000]
    return repetition([*characters], [1] * len(characters))


def repetition(symbols: list[str], weights: list[int]) -> dict[str, float]:
    """`top_ngram`, `duplicate_ngram` and `counted_ngram` of characters, or of words weighted by their length."""
    shares = {}
    for n in (*TOP, *DUPLICATED):
        grams = [tuple(symbols[i : i + n]) for i in range(len(symbols) - n + 1)]
        counts = collections.Counter(grams)
        most, times = counts.most_common(1)[0] if counts else ((), 1)  # among equals, the first to occur
        seen, covered = set(), set()
        for i, gram in enumerate(grams):
            if gram in seen and (n in DUPLICATED or gram == most):
                covered.update(range(i, i + n))
            seen.add(gram)
        covered_share = share(sum(weights[i] for i in covered), sum(weights))
        shares[f"duplicate_{n}gram" if n in DUPLICATED else f"top_{n}gram"] = covered_share
        if n in TOP:
            shares[f"counted_{n}gram"] = share((times - 1) * n, len(symbols))
    return shares


def share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing."""
    return part / whole if whole else 0.0
