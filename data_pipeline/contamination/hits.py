"""Hits: texts that have seen an item, as lines of `hits.jsonl`.

A hit is {document, source, task, item, coverage, longest, units, begin, end, found, asked} and where the text lies:
coverage is the share of the item's `units` in shared n-grams, longest the longest stretch of them, [begin, end) the
characters of the text from the first shared n-gram to the last, found and asked the beginnings of both.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
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
            if text.whole:
                enough = {item: match for item, match in matches.items() if match.coverage >= self._least}
                own = [self._hit(text.source, text.document, *placed) for placed in _placed(text, enough)]
            else:
                for item, match, place in _placed(text, matches):
                    self._pieces.setdefault((text.source, text.document, item), []).append((match, place))
            found.append(sorted(own, key=lambda hit: -hit["coverage"]))
        return found

    def hits_of_pieces(self) -> Iterator[dict[str, Any]]:
        """The hits of documents that came in pieces: what the pieces hold together, at the place of the fullest."""
        for (source, document, item), held in self._pieces.items():
            fullest, place = max(held, key=lambda pair: pair[0].coverage)
            whole = Match(join([match for match, _ in held]), fullest.begin, fullest.end)
            if whole.coverage >= self._least:
                yield self._hit(source, document, item, whole, place)
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


def _placed(text: Text, matches: Mapping[int, Match]) -> Iterator[tuple[int, Match, dict[str, Any]]]:
    """Each match with its place in the text, whose units are looked up once for all of them."""
    if not matches:
        return
    begin_U, end_U = characters_of(text.text)
    last = len(begin_U) - 1
    for item, match in matches.items():
        begin, end = int(begin_U[min(match.begin, last)]), int(end_U[min(match.end - 1, last)])
        yield item, match, {"begin": begin, "end": end, "found": text.text[begin:end][:EXCERPT], **text.where}
