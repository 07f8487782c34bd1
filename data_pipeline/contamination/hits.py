"""Hits: texts that have seen an item, as lines of `hits.jsonl`.

A hit is {document, source, task, item, coverage, longest, units, begin, end, found, asked} and where the text lies:
coverage is the share of the item's `units` in shared n-grams, longest the longest stretch of them, [begin, end) the
characters of the text from the first shared n-gram to the last, found and asked the beginnings of both.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.contamination.index import load_index
from data_pipeline.contamination.search import Match, find, join
from data_pipeline.contamination.sources import Text
from data_pipeline.contamination.units import characters_of
from data_pipeline.documents import EXCERPT


class Finder:
    """Looks for the items of an index; the index is read once in a process."""

    def __init__(self, folder: pathlib.Path, min_coverage: float):
        self._index, self._items = load_index(folder)
        self._least = min_coverage
        self._pieces: dict[tuple[str, str, int], list[tuple[Match, dict]]] = {}

    def hits(self, texts: Sequence[Text]) -> list[list[dict[str, Any]]]:
        """The hits of each text, the most covered item first; those of pieces come from `hits_of_pieces`."""
        found = []
        for text, matches in zip(texts, find([text.text for text in texts], self._index), strict=True):
            own = []
            for item, match in matches.items():
                if not text.whole:
                    held = self._pieces.setdefault((text.source, text.document, item), [])
                    held.append((match, self._place(text, match)))
                elif match.coverage >= self._least:
                    own.append(self._hit(text.source, text.document, item, match, self._place(text, match)))
            found.append(sorted(own, key=lambda hit: -hit["coverage"]))
        return found

    def hits_of_pieces(self) -> Iterator[list[dict[str, Any]]]:
        """The hits of documents that came in pieces: what the pieces hold together, at the place of the fullest."""
        for (source, document, item), held in self._pieces.items():
            fullest, place = max(held, key=lambda pair: pair[0].coverage)
            whole = Match(join([match for match, _ in held]), fullest.begin, fullest.end)
            if whole.coverage >= self._least:
                yield [self._hit(source, document, item, whole, place)]
        self._pieces.clear()

    def _hit(self, source: str, document: str, item: int, match: Match, place: dict[str, Any]) -> dict[str, Any]:
        asked = self._items[item]
        return {
            "document": document,
            "source": source,
            "task": asked.task,
            "item": asked.id,
            "coverage": match.coverage,
            "longest": match.longest,
            "units": len(match.covered_U),
            **place,
            "asked": asked.text,
        }

    @staticmethod
    def _place(text: Text, match: Match) -> dict[str, Any]:
        begin, end = characters_of(text.text, match.begin, match.end)
        return {"begin": begin, "end": end, "found": text.text[begin:end][:EXCERPT], **text.where}
