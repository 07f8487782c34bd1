"""A few clusters of duplicates for people to judge: with the least similar copies that still count, and exact ones."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_pipeline.dedup.corpora import Corpora
from data_pipeline.shards import read_lines

SHOWN = {"near": 6, "exact": 2}  # clusters
_COPIES = 3  # of a cluster
_WINDOW, _LEAD = 500, 80  # characters shown of a document, of which so many before the first difference
_SHARDS = 8  # of a step whose removals are looked at
Place = tuple[int, int]  # shard of this corpus, row
Cluster = tuple[str, Place, list[tuple[Place, float]]]  # step, what stays, its copies with their similarity


def examples(corpora: Corpora) -> list[dict[str, Any]]:
    """Clusters [{kind, first: {id, excerpt}, copies: [{id, excerpt, similarity}]}]; needs the folder `work`.

    Excerpts begin shortly before the first difference. Clusters are taken from the first shards with any: whole shards
    are read, so as few as possible. Those whose first document is an earlier corpus's are left out, for its text is not
    at hand.
    """
    chosen = [cluster for step in SHOWN for cluster in _clusters(corpora, step)]
    texts = _texts(corpora, {place for _, first, copies in chosen for place in (first, *(copy for copy, _ in copies))})
    return [_example(cluster, texts) for cluster in chosen]


def _example(cluster: Cluster, texts: Mapping[Place, Mapping[str, str]]) -> dict[str, Any]:
    step, first, copies = cluster
    shared = len(os.path.commonprefix([texts[place]["text"] for place in (first, *(copy for copy, _ in copies))]))
    begin = max(0, shared - _LEAD)

    def excerpt(place: Place) -> dict[str, Any]:
        return {"id": texts[place]["id"], "excerpt": texts[place]["text"][begin : begin + _WINDOW]}

    shown = [excerpt(place) | {"similarity": round(similarity, 4)} for place, similarity in copies]
    return {"kind": step, "first": excerpt(first), "copies": shown}


def _clusters(corpora: Corpora, step: str) -> list[Cluster]:
    """Those with the least similar copies; within one shard, where there are any."""
    across: list[Cluster] = []
    for shard in range(min(corpora.shards, _SHARDS)):
        removals = np.load(corpora.layout.removals(step, shard))
        removals = removals[np.argsort(removals["similarity"], kind="stable")]
        own = removals["of_shard"] == len(corpora.earlier) + shard
        if own.any():
            return _some(removals[own], shard, corpora, step)
        across += _some(removals[removals["of_shard"] >= len(corpora.earlier)], shard, corpora, step)
    return across[: SHOWN[step]]


def _some(removals: np.ndarray, shard: int, corpora: Corpora, step: str) -> list[Cluster]:
    """Clusters of one shard's removals, in their order."""
    found: dict[Place, list[tuple[Place, float]]] = {}
    for row, of_shard, of_row, similarity in removals.tolist():
        first = (corpora.own(of_shard), of_row)
        if first in found or len(found) < SHOWN[step]:
            found.setdefault(first, []).append(((shard, row), similarity))
    return [(step, first, copies[:_COPIES]) for first, copies in found.items()]


def _texts(corpora: Corpora, wanted: set[Place]) -> Mapping[Place, dict[str, str]]:
    shards = sorted({shard for shard, _ in wanted})
    return {place: record for shard in shards for place, record in _rows(corpora, shard, wanted)}


def _rows(corpora: Corpora, shard: int, wanted: set[Place]) -> Iterator[tuple[Place, dict[str, str]]]:
    last = max(row for s, row in wanted if s == shard)
    for path in corpora.layout.kept_files(shard):
        for record in read_lines(path):
            if record["row"] > last:
                break
            if (shard, record["row"]) in wanted:
                yield (shard, record["row"]), {name: record[name] for name in ("id", "text")}
