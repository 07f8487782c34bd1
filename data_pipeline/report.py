"""What happened to the corpus: a JSON-able summary of the shards' counts, and some texts to look at."""

import dataclasses
import heapq
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import xxhash

from ctllm_jax.common.files import read_json
from data_pipeline import clusters
from data_pipeline.dedup.corpora import Corpora
from data_pipeline.documents import SUBSETS, UNKNOWN, InputFile
from data_pipeline.filters.rules import FilterConfig, limits_of
from data_pipeline.filters.stage import EXAMPLES
from data_pipeline.shards import CONTAMINATED, DUPLICATES, Layout, read_lines

_COUNTED = (
    "read",
    "well_formed",
    "passed_rules",
    "passed_language",
    *DUPLICATES,
    CONTAMINATED,
    "similar_lines",
    "kept",
    "characters",
    "bytes",
)
_SHOWN = ("histograms", "limits", "examples", "samples", "duplicates")  # what is only for the page
_SAMPLES, _EXCERPT, _CANDIDATES = 4, 600, 4096  # kept documents shown, characters of each, documents to choose from
FUNNEL = ("read", "well-formed", "rules", "language", "unique id", "exact dedup", "near dedup")


def collect(
    files: list[InputFile], corpora: Corpora, filters: FilterConfig, benchmarks: dict[str, Any] | None
) -> dict[str, Any]:
    """Adds up the counts of all shards, and takes some texts to look at from the folder `work`.

    benchmarks: what `contamination.clean` found; None: no benchmark was looked for.

    Returns a dict with
      subsets: {subset: {read, well_formed, passed_rules, passed_language, duplicate_id, duplicate_exact,
        duplicate_near, contaminated, similar_lines (sentences dropped), kept (documents), characters, bytes (of kept
        text, UTF-8), malformed: {reason: n},
        rules: {rule: n}, masked: {kind: n, in documents that passed the filters},
        funnel: [[stage, documents left], ...]}}; 'unknown': no source can be told;
      totals: the same over all subsets;
      histograms: {subset: {measure: {bin: documents}}}, see `signals.bin_edge`;
      limits: {subset: {measure: {bound: limit}}};
      examples: {rule: up to 3 rejected {id, excerpt, value, threshold, ...}};
      samples: {subset: some kept {id, url, excerpt}}; duplicates: see `clusters.examples`;
      files, empty_files, damaged_files, benchmarks.
    """
    layout, with_benchmarks = corpora.layout, benchmarks is not None
    subsets: dict[str, dict[str, Any]] = {}
    examples: dict[str, list] = {}
    histograms: dict[str, dict[str, Counter]] = {}
    empty, damaged = [], []
    for file in files:
        counts = read_json(layout.counts(file.index))
        if counts["damage"]:
            damaged.append({"file": file.label, "damage": counts["damage"], "records": counts["records"]})
        elif not counts["records"]:
            empty.append(file.label)
        later = [layout.outcome(file.index), *([layout.cleaned(file.index)] if with_benchmarks else [])]
        for part in (counts, *map(read_json, later)):
            for subset, values in part["subsets"].items():
                _add(subsets.setdefault(subset, _zero()), values)
            for rule, found in part["examples"].items():
                kept = examples.setdefault(rule, [])
                kept.extend(found[: EXAMPLES - len(kept)])
        for subset, measures in counts["histograms"].items():
            for name, bins in measures.items():
                histograms.setdefault(subset, {}).setdefault(name, Counter()).update(bins)
    totals = _zero()
    for values in subsets.values():
        _add(totals, values)
    order = [name for name in (*SUBSETS, UNKNOWN) if name in subsets]
    return {
        "map_cc": layout.map_cc.name,
        "totals": _finished(totals, with_benchmarks),
        "subsets": {name: _finished(subsets[name], with_benchmarks) for name in order},
        "histograms": {name: histograms[name] for name in order if name in histograms},
        "limits": {name: limits_of(dataclasses.asdict(filters), name) for name in order if name in histograms},
        "examples": dict(sorted(examples.items())),
        "samples": {name: _samples(layout, name, len(files)) for name in order if subsets[name]["kept"]},
        "duplicates": clusters.examples(corpora),
        "files": len(files),
        "empty_files": empty,
        "damaged_files": damaged,
        "benchmarks": benchmarks,
    }


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's result: `collect` without what is only for the page."""
    return {key: value for key, value in found.items() if key not in _SHOWN}


def _samples(layout: Layout, subset: str, shards: int) -> list[dict[str, str]]:
    """Kept documents of the first shard that has any: of its first thousands, those with the least hashes of ids."""
    for shard in range(shards):
        if layout.written(shard, subset).exists():
            records = itertools.islice(read_lines(layout.written(shard, subset)), _CANDIDATES)
            chosen = heapq.nsmallest(_SAMPLES, records, key=lambda r: xxhash.xxh3_64_intdigest(r["id"].encode()))
            if chosen:
                return [{"id": r["id"], "url": r["url"], "excerpt": r["text"][:_EXCERPT]} for r in chosen]
    return []


def _zero() -> dict[str, Any]:
    return {name: 0 for name in _COUNTED} | {name: Counter() for name in ("malformed", "rules", "masked")}


def _add(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            target[name].update(value)
        else:
            target[name] += value


def _finished(values: dict[str, Any], with_benchmarks: bool) -> dict[str, Any]:
    """Sorted by frequency, with the funnel: documents left after each stage, that of benchmarks only if asked for."""
    left = [values["read"], values["well_formed"], values["passed_rules"], values["passed_language"]]
    for name in (*DUPLICATES, *([CONTAMINATED] if with_benchmarks else [])):
        left.append(left[-1] - values[name])
    if left[-1] != values["kept"]:
        raise AssertionError(f"documents lost: {left[-1]} should be left, {values['kept']} are")
    stages = (*FUNNEL, *(["no benchmark"] if with_benchmarks else []))
    ordered = {
        name: dict(sorted(values[name].items(), key=lambda item: (-item[1], item[0])))
        for name in ("malformed", "rules", "masked")
    }
    return values | ordered | {"funnel": [list(step) for step in zip(stages, left, strict=True)]}
