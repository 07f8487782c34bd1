"""`ctllm contamination`: which documents, conversations or stored tokens hold items of benchmarks.

    benchmarks --index--> n-grams on disk; shards of text --search--> hits.jsonl

Beam's elements are shards (files, or shards of a store); each writes its hits whole and is passed over when they are
there, so a killed run goes on. A worker holds the index, a batch of texts and, of a store's shard, its matches.
"""

import dataclasses
import pathlib
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import orjson

from ctllm_jax.common.files import read_json, shown, write_json
from ctllm_jax.common.manifest import open_stage
from ctllm_jax.common.progress import Watch
from data_pipeline.batches import batched
from data_pipeline.contamination.hits import Finder
from data_pipeline.contamination.index import build_index, load_index, save_index
from data_pipeline.contamination.items import BenchmarkConfig, Item, read_items
from data_pipeline.contamination.sources import Shard, SourceConfig, Text, Unreadable, read, shards_of
from data_pipeline.documents import Fields
from data_pipeline.runner import BeamConfig, make_pipeline, make_runner
from data_pipeline.shards import HITS, json_line, save_bytes

VERSION = 1


@dataclasses.dataclass(frozen=True)
class ContaminationConfig(SourceConfig):
    """What is looked for, in what (see SourceConfig), and where it runs."""

    benchmarks: BenchmarkConfig  # what is looked for, and from what on it counts as seen
    beam: BeamConfig  # where it runs


def run(config: ContaminationConfig, workdir: str) -> dict:
    """Writes `hits.jsonl` (see hits.py); returns the manifest's result: texts, unreadable (records without a text),
    damaged_files ([{file, damage}]: looked through up to there), documents (with a hit), hits, and tasks: {task:
    {items, too_short, seen, documents}}, `seen` the items that a text has, `too_short` those with fewer units than an
    n-gram, which cannot be found.

    Raises:
      UserError: no item to look for, nothing to look through, or another run's folder.
    """
    make_runner(config.beam)
    items, asked = read_items(config.benchmarks)
    shards, given = shards_of(config)
    stage = open_stage("contamination", VERSION, workdir, settings_of(config.benchmarks), [asked, given])
    if not stage.done:
        work = stage.folder / "work"
        make_index(items, config.benchmarks.ngram, work)
        search(shards, config, work)
        result = _collect(shards, items, work, stage.folder)
        _print_unread(result)
        print_summary(result)
        stage.finish(result)
    shutil.rmtree(stage.folder / "work", ignore_errors=True)
    return stage.result


def settings_of(config: BenchmarkConfig) -> dict[str, Any]:
    """The settings that decide a result; what was read is told by hashes."""
    return {name: getattr(config, name) for name in ("field", "ngram", "min_coverage")}


def make_index(items: Sequence[Item], ngram: int, folder: pathlib.Path) -> None:
    """Writes the index to `folder`; it is small, so a run that goes on makes it anew."""
    save_index(folder, build_index(items, ngram), items)


def search(shards: Sequence[Shard], config: ContaminationConfig, work: pathlib.Path) -> None:
    """Runs the Beam job over the shards that have no counts yet."""
    waiting = [shard for shard in shards if not _counts(work, shard.index).exists()]

    def done() -> int:
        return sum(_counts(work, shard.index).exists() for shard in shards)

    with Watch("contamination", len(shards), "shards", done):
        with make_pipeline(config.beam) as pipeline:
            least, fields = config.benchmarks.min_coverage, config.fields
            _ = pipeline | beam.Create(waiting) | beam.Reshuffle() | beam.Map(_search_shard, work, least, fields)


def _search_shard(shard: Shard, work: pathlib.Path, least: float, fields: Fields) -> Shard:
    finder = Finder(work, least)
    counts: dict[str, Any] = {"texts": 0, "unreadable": 0, "damage": ""}
    with save_bytes(_hits(work, shard.index)) as out:
        for batch in batched(_readable(read(shard, fields), counts), lambda text: len(text.text)):
            for hits in finder.hits(batch):
                out.writelines(map(json_line, hits))
        out.writelines(map(json_line, finder.hits_of_pieces()))
    write_json(_counts(work, shard.index), counts)
    return shard


def _readable(items: Iterator[Text | Unreadable], counts: dict[str, Any]) -> Iterator[Text]:
    """The texts that there are; counts `texts` and `unreadable`, and notes `damage`."""
    for item in items:
        if isinstance(item, Text):
            counts["texts"] += 1
            yield item
        else:
            counts["unreadable"] += 1
            counts["damage"] = item.damage


def _hits(work: pathlib.Path, index: int) -> pathlib.Path:
    return work / "hits" / f"{index:05d}.jsonl"


def _counts(work: pathlib.Path, index: int) -> pathlib.Path:
    return work / "hits" / f"{index:05d}.json"


def _collect(shards: Sequence[Shard], items: Sequence[Item], work: pathlib.Path, folder: pathlib.Path) -> dict:
    counts = [read_json(_counts(work, shard.index)) for shard in shards]
    read = {name: sum(own[name] for own in counts) for name in ("texts", "unreadable")}
    read["damaged_files"] = [
        {"file": shown(shard.file), "damage": own["damage"]}
        for shard, own in zip(shards, counts, strict=True)
        if own["damage"]
    ]
    return read | gather([_hits(work, shard.index) for shard in shards], folder / HITS, items, work)


def _print_unread(result: dict) -> None:
    """Says on standard error what was not looked through."""
    for entry in result["damaged_files"]:
        print(f"contamination: {entry['file']} is damaged: {entry['damage']}; read up to there", file=sys.stderr)
    if result["unreadable"]:
        print(f"contamination: {result['unreadable']:,} records hold no text that can be read", file=sys.stderr)


def gather(parts: Sequence[pathlib.Path], out: pathlib.Path, items: Sequence[Item], index: pathlib.Path) -> dict:
    """Joins files of hits to one, and says what is in it: {documents, hits, tasks}, see `run`."""
    sizes = load_index(index)[0]
    tasks: dict[str, dict[str, Any]] = {}
    for item, units in zip(items, sizes.units_I.tolist(), strict=True):
        entry = tasks.setdefault(item.task, {"items": 0, "too_short": 0, "seen": set(), "documents": 0})
        entry["items"] += 1
        entry["too_short"] += units < sizes.n
    hits = documents = 0
    with save_bytes(out) as whole:
        for part in parts:
            seen_by: dict[str, set[str]] = defaultdict(set)
            with open(part, "rb") as lines:
                for line in lines:
                    hit = orjson.loads(line)
                    hits += 1
                    tasks[hit["task"]]["seen"].add(hit["item"])
                    seen_by[hit["document"]].add(hit["task"])
                    whole.write(line)
            documents += len(seen_by)
            for task in (task for own in seen_by.values() for task in own):
                tasks[task]["documents"] += 1
    return {
        "documents": documents,
        "hits": hits,
        "tasks": {name: entry | {"seen": len(entry["seen"])} for name, entry in tasks.items()},
    }


def print_summary(result: dict) -> None:
    """Says on standard error what was found."""
    for name, entry in result["tasks"].items():
        print(
            f"contamination: {name}: {entry['seen']:,} of {entry['items']:,} items in {entry['documents']:,} documents"
            + (f"; {entry['too_short']:,} are too short to look for" if entry["too_short"] else ""),
            file=sys.stderr,
        )
