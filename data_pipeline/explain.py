"""`ctllm explain`: the whole story of a document of a corpus, told from what the run left behind.

Where it stood in the input, every measure with its limits, what it repeats and what repeats it, which benchmarks it
holds, and the text that went out. An id that the input holds several times has a story for each.

A document is found in the columns of ids, then its shard's lists of rejections are read. What repeats it may stand in
any shard, so all lists of duplicates are gone through, which takes as long as unpacking them.
"""

import dataclasses
import gzip
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json
from ctllm_jax.common.manifest import stage_fingerprint
from data_pipeline import map_cc
from data_pipeline.filters.rules import limits_of
from data_pipeline.shards import HITS, Layout
from data_pipeline.signals import columns, input_path, rows_of, signal_files

BY_FILTERS, BY_DEDUP, BY_BENCHMARKS, KEPT = "rejected", "duplicate", "contaminated", "kept"


@dataclasses.dataclass(frozen=True)
class ExplainConfig:
    """documents: ids; text_chars: [characters] most characters shown of a text; json: a JSON object a line."""

    documents: tuple[str, ...]
    text_chars: int
    json: bool

    def __post_init__(self) -> None:
        if not self.documents:
            raise ValueError("documents: name an id")
        if self.text_chars < 0:
            raise ValueError(f"text_chars {self.text_chars} is below 0")


def run(config: ExplainConfig, workdir: str) -> dict:
    """Prints the stories of the documents in the corpus `workdir`; writes nothing.

    Returns {id: [story]}; a story is {id, source, file, line, outcome, url, rules, language, reasons, repeats,
    repeated_by, dropped_lines, benchmarks, text}.

    Raises:
      UserError: no finished corpus there, or it has no well-formed document of that id.
    """
    stage_fingerprint(workdir, "corpus")
    corpus = _Corpus(workdir, read_json(pathlib.Path(workdir, "stage.json"))["settings"]["filters"])
    found = {identity: list(corpus.stories(identity)) for identity in config.documents}
    for identity, stories in found.items():
        if not stories:
            raise UserError(
                f"{workdir}: no well-formed document is called {identity!r}; records that are none are listed by file "
                "and line in rejected/*.filter.jsonl.gz"
            )
        for story in stories:
            if config.json:
                print(json.dumps(story, ensure_ascii=False))
            else:
                print("\n".join(map(_printable, _story_lines(story, config.text_chars))))
    return found


class _Corpus:
    """A finished corpus, as far as its documents' stories need it."""

    def __init__(self, folder: str, filters: Mapping[str, Any]):
        self._folder, self._filters, self._layout = folder, filters, Layout(folder)

    def stories(self, identity: str) -> Iterator[dict[str, Any]]:
        """One story for each place in the input that has the id."""
        repeated_by = [
            {name: record[name] for name in ("id", "kind", "similarity", "source", "file", "line")}
            for record in self._lines("*.dedup.jsonl.gz", identity)
            if record["duplicate_of"] == identity
        ]
        for subset, files in signal_files(self._folder).items():
            for path in files:
                for row in rows_of(path, identity):
                    yield self._story(identity, subset, path, row, repeated_by)

    def _story(self, identity: str, subset: str, path: pathlib.Path, row: dict, repeated_by: list) -> dict[str, Any]:
        shard, line = path.name.split(".")[0], row["line"]
        outcome, record = self._outcome(identity, shard, line, bool(row["failed"]), subset)
        repeats = {n: record[n] for n in ("duplicate_of", "kind", "similarity")} if outcome == BY_DEDUP else None
        compared = outcome != BY_FILTERS and not (repeats and repeats["kind"] == "id")  # with later documents
        return {
            "id": identity,
            "source": subset,
            "file": input_path(path),
            "line": line,
            "outcome": outcome,
            "url": record["url"],
            "rules": self._rules(subset, row),
            "language": row["language"],
            "reasons": record.get("reasons", []),
            "repeats": repeats,
            "repeated_by": repeated_by if compared else [],
            "dropped_lines": [
                {name: dropped[name] for name in ("sentence", "repeats", "distance")}
                for dropped in self._lines(f"{shard}.lines.jsonl.gz", identity)
                if (dropped["id"], dropped["line"]) == (identity, line)
            ],
            "benchmarks": self._hits(identity, line) if outcome == BY_BENCHMARKS else [],
            "text": record["text"],
        }

    def _outcome(self, identity: str, shard: str, line: int, failed: bool, subset: str) -> tuple[str, dict[str, Any]]:
        """What became of a document, and its record there: as it came if a rule rejected it, else as it was kept."""
        stages = ((BY_FILTERS, "filter"),) if failed else ((BY_DEDUP, "dedup"), (BY_BENCHMARKS, "benchmarks"))
        for outcome, stage in stages:
            for record in self._lines(f"{shard}.{stage}.jsonl.gz", identity):
                if (record.get("id"), record["line"]) == (identity, line):
                    return outcome, record
        kept = map_cc.find(self._layout.map_cc / subset, identity)
        if kept is None:
            raise UserError(
                f"{self._folder}: {identity} should be kept, but is not in map_cc/{subset}; was it changed?"
            )
        return KEPT, {"url": kept.url, "text": kept.text}

    def _rules(self, subset: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every measured value with its limits; no limits: it was measured and not judged."""
        limits, failed = limits_of(self._filters, subset), row["failed"].split(",")
        return [
            {"rule": name, "value": row[name], "broken": name in failed, **limits.get(name, {})}
            for name in columns(subset)
            if not _missing(row[name])
        ]

    def _hits(self, identity: str, line: int) -> list[dict[str, Any]]:
        with open(pathlib.Path(self._folder, HITS), "rb") as lines:
            found = [orjson.loads(own) for own in lines if _quoted(identity) in own]
        return [hit for hit in found if (hit["document"], hit["line"]) == (identity, line)]

    def _lines(self, pattern: str, identity: str) -> Iterator[dict[str, Any]]:
        """Records of rejection lists that mention an id; most lines are passed over unread."""
        mark = _quoted(identity)
        for path in sorted(pathlib.Path(self._folder, "rejected").glob(pattern)):
            with gzip.open(path, "rb") as lines:
                yield from (orjson.loads(line) for line in lines if mark in line)


def _quoted(identity: str) -> bytes:
    return orjson.dumps(identity)


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


# ---- Telling


def _printable(line: str) -> str:
    """A line without what would steer a terminal: texts come from the web."""
    return "".join(c if c.isprintable() else " " for c in line)


def _story_lines(story: Mapping[str, Any], text_chars: int) -> Iterator[str]:
    """The lines of a story."""
    yield f"{story['id']}: {story['outcome']}"
    yield f"  came from   {story['file']}, line {story['line']}, as {story['source']}"
    if story["url"]:
        yield f"  URL         {story['url']}"
    yield from _why(story)
    if story["language"]:
        yield f"  language    {story['language']}"
    yield "  measured"
    for rule in story["rules"]:
        bounds = ", ".join(f"{bound} {rule[bound]:g}" for bound in ("min", "above", "max") if bound in rule)
        yield f"    {rule['rule']:<32} {rule['value']:>12,.6g}  {bounds or '-'}{'  BROKEN' if rule['broken'] else ''}"
    for copy in story["repeated_by"]:
        similarity = "" if copy["similarity"] is None else f", similarity {copy['similarity']:.2f}"
        yield f"  repeated by {copy['id']} ({copy['kind']}{similarity}), {copy['file']}, line {copy['line']}"
    for dropped in story["dropped_lines"]:
        yield f"  line left out, {dropped['distance']} edits from an earlier one: {dropped['sentence']}"
    went = "that went out" if story["outcome"] == KEPT else "that was left out"
    yield f"  text {went}, {len(story['text']):,} characters"
    yield from (f"    {line}" for line in story["text"][:text_chars].splitlines())


def _why(story: Mapping[str, Any]) -> Iterator[str]:
    if story["repeats"]:
        of = story["repeats"]
        similarity = "" if of["similarity"] is None else f", similarity {of['similarity']:.2f}"
        yield f"  repeats     {of['duplicate_of']} ({of['kind']}{similarity})"
    elif story["reasons"]:
        yield f"  because of  {', '.join(reason['rule'] for reason in story['reasons'])}"
    for hit in story["benchmarks"]:
        yield f"  holds       {hit['coverage']:.0%} of {hit['task']} {hit['item']}: {hit['found']}"
