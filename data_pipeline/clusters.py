"""A few duplicates with what they repeat, for people to judge: the least similar that still count, and exact ones."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_pipeline.dedup.corpora import Corpora
from data_pipeline.shards import read_lines

SHOWN = {"near": 6, "exact": 2}
_WINDOW, _LEAD = 500, 80  # characters shown of a document, of which so many before the first difference
_SHARDS = 8  # of a step whose removals are looked at
Place = tuple[int, int]  # shard of this corpus, row


def examples(corpora: Corpora) -> list[dict[str, Any]]:
    """Pairs [{kind, similarity, first, second}], each side {id, excerpt}; needs the folder `work`.

    Excerpts begin shortly before the first difference.

    They are taken from the first shards with any: whole shards are read, so as few as possible. Pairs whose first
    document is an earlier corpus's are left out, for its text is not at hand.
    """
    pairs = [pair for step in SHOWN for pair in _pairs(corpora, step)]
    texts = _texts(corpora, {place for pair in pairs for place in pair[2:]})
    return [
        {"kind": kind, "similarity": similarity} | _excerpts(texts[first], texts[second])
        for kind, similarity, first, second in pairs
    ]


def _excerpts(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, dict[str, str]]:
    shared = len(os.path.commonprefix([first["text"], second["text"]]))
    window = slice(max(0, shared - _LEAD), max(0, shared - _LEAD) + _WINDOW)
    sides = {"first": first, "second": second}
    return {side: {"id": record["id"], "excerpt": record["text"][window]} for side, record in sides.items()}


def _pairs(corpora: Corpora, step: str) -> list[tuple[str, float, Place, Place]]:
    """(step, similarity, first, second) of the least similar pairs; within one shard, where there are any."""
    across: list[tuple[str, float, Place, Place]] = []
    for shard in range(min(corpora.shards, _SHARDS)):
        removals = np.load(corpora.layout.removals(step, shard))
        removals = removals[np.argsort(removals["similarity"], kind="stable")]
        own = removals["of_shard"] == len(corpora.earlier) + shard
        if own.any():
            return _some(removals[own], shard, corpora, step)
        across += _some(removals[removals["of_shard"] >= len(corpora.earlier)], shard, corpora, step)
    return across[: SHOWN[step]]


def _some(removals: np.ndarray, shard: int, corpora: Corpora, step: str) -> list[tuple[str, float, Place, Place]]:
    return [
        (step, round(similarity, 4), (corpora.own(of_shard), of_row), (shard, row))
        for row, of_shard, of_row, similarity in removals[: SHOWN[step]].tolist()
    ]


def _texts(corpora: Corpora, wanted: set[Place]) -> Mapping[Place, dict[str, Any]]:
    return {
        place: record for shard in sorted({s for s, _ in wanted}) for place, record in _rows(corpora, shard, wanted)
    }


def _rows(corpora: Corpora, shard: int, wanted: set[Place]) -> Iterator[tuple[Place, dict[str, Any]]]:
    last = max(row for s, row in wanted if s == shard)
    for path in corpora.layout.kept_files(shard):
        for record in read_lines(path):
            if record["row"] > last:
                break
            if (shard, record["row"]) in wanted:
                yield (shard, record["row"]), {name: record[name] for name in ("id", "text")}
