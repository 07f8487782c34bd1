"""What a tokenizer makes of a corpus: fertility, coverage of Chinese, texts that do not survive, its vocabulary.

One pass over the documents serves all measures. A character "has a piece" where some id decodes to it alone.
"""

import collections
import os.path
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ctllm_jax.common import html
from ctllm_jax.data.tokenizer import BYTE, SPECIAL, TEXT, Tokenizer

EXAMPLES = 10  # texts shown per subset that do not survive
_BATCH = 4_000_000  # characters encoded at a time
_AROUND = 20  # characters shown on either side of a difference
_LONGEST = 30  # longest pieces shown
_LENGTHS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 8), (9, 16), (17, 32), (33, None))  # classes of the histogram

# The characters of Chinese that a list exists for; GB 2312 is in the order of its code.
CHARACTER_LISTS = {
    "CJK Unified Ideographs (U+4E00 to U+9FFF)": [chr(i) for i in range(0x4E00, 0xA000)],
    "GB 2312 level 1 (common)": [
        bytes((row, cell)).decode("gb2312")
        for row in range(0xB0, 0xD8)
        for cell in range(0xA1, 0xFF if row < 0xD7 else 0xFA)
    ],
    "GB 2312 level 2": [bytes((row, cell)).decode("gb2312") for row in range(0xD8, 0xF8) for cell in range(0xA1, 0xFF)],
}


def measure(tokenizer: Tokenizer, subsets: Mapping[str, Iterable[tuple[str, str]]]) -> dict[str, Any]:
    """Measures a tokenizer on (id, text) of each subset.

    Returns a dict with
      subsets: {subset: {documents, characters, bytes (UTF-8), tokens, byte_tokens (parts of characters),
        unknown_tokens, round_trip_failures, failures: up to 10 {id, position (of the first character that differs),
        text, found}, han_characters, han_covered (those with a piece), han_types, han_types_covered, and derived:
        characters_per_token, bytes_per_token, tokens_per_document, byte_share, han_coverage, han_types_coverage}};
      vocabulary: see `composition`.
    """
    pieces = tokenizer.pieces()
    own_piece = {text for kind, text in pieces if kind == TEXT and len(text) == 1}
    kinds = np.array([{SPECIAL: 1, BYTE: 2, TEXT: 0}[kind] for kind, _ in pieces], np.int8)
    found = {name: _subset(tokenizer, kinds, own_piece, documents) for name, documents in subsets.items()}
    return {"subsets": found, "vocabulary": composition(pieces)}


def _subset(
    tokenizer: Tokenizer, kinds: np.ndarray, own_piece: set[str], documents: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    names = ("documents", "characters", "bytes", "tokens", "byte_tokens", "unknown_tokens", "round_trip_failures")
    counts = dict.fromkeys(names, 0)
    characters: collections.Counter[str] = collections.Counter()
    failures = []
    for batch in _batches(documents):
        for (document_id, text), ids in zip(batch, tokenizer.encode_arrays([text for _, text in batch]), strict=True):
            of_kind = np.bincount(kinds[ids], minlength=3)
            values = (1, len(text), len(text.encode()), len(ids), int(of_kind[2]), int(of_kind[1]))
            for name, value in zip(names, values, strict=False):
                counts[name] += value
            characters.update(text)
            decoded = tokenizer.decode(ids.tolist())
            if decoded != text:
                counts["round_trip_failures"] += 1
                if len(failures) < EXAMPLES:
                    failures.append({"id": document_id, **_difference(text, decoded)})
    return counts | _han(characters, own_piece) | _ratios(counts) | {"failures": failures}


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _difference(text: str, decoded: str) -> dict[str, Any]:
    position = len(os.path.commonprefix([text, decoded]))
    around = slice(max(0, position - _AROUND), position + _AROUND)
    return {"position": position, "text": text[around], "found": decoded[around]}


def _han(characters: collections.Counter[str], own_piece: set[str]) -> dict[str, Any]:
    han = {c: count for c, count in characters.items() if _is_han(c)}
    covered = {c: count for c, count in han.items() if c in own_piece}
    return {
        "han_characters": sum(han.values()),
        "han_covered": sum(covered.values()),
        "han_types": len(han),
        "han_types_covered": len(covered),
        "han_coverage": _ratio(sum(covered.values()), sum(han.values())),
        "han_types_coverage": _ratio(len(covered), len(han)),
    }


def _ratios(counts: Mapping[str, int]) -> dict[str, float | None]:
    return {
        "characters_per_token": _ratio(counts["characters"], counts["tokens"]),
        "bytes_per_token": _ratio(counts["bytes"], counts["tokens"]),
        "tokens_per_document": _ratio(counts["tokens"], counts["documents"]),
        "byte_share": _ratio(counts["byte_tokens"], counts["tokens"]),
    }


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _is_han(character: str) -> bool:
    return unicodedata.name(character, "").startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH"))


def _is_latin(character: str) -> bool:
    return "LATIN" in unicodedata.name(character, "")


def composition(pieces: list[tuple[str, str]]) -> dict[str, Any]:
    """What a vocabulary is made of, from `Tokenizer.pieces`.

    Returns a dict with
      classes: {class: number of ids}; a text piece is Chinese, Latin or digits if all of it but spaces is;
      lengths: {characters: number of text pieces};
      coverage: {list of characters: {size, covered}};
      longest_chinese: the longest all-Chinese pieces, longest first, then by id.
    """
    classes = collections.Counter(_class(kind, text) for kind, text in pieces)
    texts = [text for kind, text in pieces if kind == TEXT]
    lengths = {}
    for low, high in _LENGTHS:
        label = str(low) if low == high else f"{low} to {high}" if high else f"{low} or more"
        lengths[label] = sum(low <= len(text) <= (high or len(text)) for text in texts)
    present = set(texts)
    chinese = [text for kind, text in pieces if _class(kind, text) == "Chinese"]
    return {
        "classes": dict(classes.most_common()),
        "lengths": lengths,
        "coverage": {
            name: {"size": len(wanted), "covered": sum(c in present for c in wanted)}
            for name, wanted in CHARACTER_LISTS.items()
        },
        "longest_chinese": sorted(chinese, key=len, reverse=True)[:_LONGEST],
    }


def _class(kind: str, text: str) -> str:
    if kind == SPECIAL:
        return "special"
    if kind == BYTE:
        return "bytes"
    bare = text.strip()
    if not bare:
        return "whitespace"
    for name, belongs in (("Chinese", _is_han), ("Latin", _is_latin), ("digits", str.isdigit)):
        if all(map(belongs, bare)):
            return name
    return "other"


# ---- The page


def page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page."""
    vocabulary = report["vocabulary"]
    failures = sum(entry["round_trip_failures"] for entry in report["subsets"].values())
    cards = {"pieces": report["vocab_size"], "texts measured": _sum(report, "documents"), "texts changed": failures}
    sections = [
        ("Overview", html.cards(cards) + _notes(report)),
        ("Fertility", _table(report, _FERTILITY)),
        ("Chinese characters", _table(report, _CHINESE) + _lists(vocabulary["coverage"])),
        ("Texts that do not survive", _failures(report)),
        ("Vocabulary", _vocabulary(vocabulary)),
    ]
    if report["sample"]:
        sections.insert(1, ("Trained on", _sample(report["sample"])))
    return html.page("Tokenizer", f"{report['origin']}, {report['vocab_size']:,} pieces", sections)


_FERTILITY = (
    "documents",
    "characters",
    "tokens",
    "characters_per_token",
    "bytes_per_token",
    "tokens_per_document",
    "byte_share",
    "unknown_tokens",
)
_CHINESE = ("han_characters", "han_coverage", "han_types", "han_types_coverage")


def _sum(report: Mapping[str, Any], name: str) -> int:
    return sum(entry[name] for entry in report["subsets"].values())


def _table(report: Mapping[str, Any], names: tuple[str, ...]) -> str:
    rows = [[subset, *(entry[name] for name in names)] for subset, entry in report["subsets"].items()]
    return html.table(["subset", *(name.replace("_", " ") for name in names)], rows)


def _notes(report: Mapping[str, Any]) -> str:
    return "".join(html.paragraph(note, "bad") for note in report["notes"]) + html.paragraph(
        "Measured on documents chosen by the hash of their id, the same for every tokenizer; a trained tokenizer may "
        "have seen some of them.",
        "soft",
    )


def _sample(sample: Mapping[str, Any]) -> str:
    names = ("available_bytes", "wanted_bytes", "documents", "bytes")
    rows = [[subset, *(entry[name] for name in names)] for subset, entry in sample["subsets"].items()]
    note = f"{sample['cut_lines']:,} lines were longer than a training line and were cut, {sample['reserved']:,} "
    return html.table(["subset", *(name.replace("_", " ") for name in names)], rows) + html.paragraph(
        note + "characters are SentencePiece's own (U+2581, U+2585) and were left out of the training lines.", "soft"
    )


def _lists(coverage: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        [name, entry["size"], entry["covered"], entry["covered"] / entry["size"]] for name, entry in coverage.items()
    ]
    return html.heading("Lists") + html.table(["list", "characters", "with a piece", "share"], rows)


def _failures(report: Mapping[str, Any]) -> str:
    rows = [
        [subset, failure["id"], failure["position"], repr(failure["text"]), repr(failure["found"])]
        for subset, entry in report["subsets"].items()
        for failure in entry["failures"]
    ]
    if not rows:
        return html.paragraph("Every text measured comes back as it was.", "good")
    return html.table(["subset", "document", "first difference", "text there", "decoded"], rows)


def _vocabulary(vocabulary: Mapping[str, Any]) -> str:
    return html.charts(
        html.bar_chart("Pieces by what they hold", vocabulary["classes"]),
        html.bar_chart("Text pieces by length in characters", vocabulary["lengths"]),
    ) + html.details("The longest Chinese pieces", html.quote("\n".join(vocabulary["longest_chinese"])))
