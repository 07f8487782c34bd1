"""Inside `ctllm corpus`: documents that hold items of benchmarks are left out, after deduplication and by the shard."""

import contextlib
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam

from ctllm_jax.common.files import write_json
from ctllm_jax.common.progress import Watch
from data_pipeline.batches import batched
from data_pipeline.contamination.hits import Finder
from data_pipeline.contamination.items import BenchmarkConfig, Item
from data_pipeline.contamination.run import gather, make_index, print_summary
from data_pipeline.contamination.sources import Text
from data_pipeline.documents import EXCERPT, SUBSETS
from data_pipeline.filters.stage import EXAMPLES
from data_pipeline.runner import BeamConfig, make_pipeline
from data_pipeline.shards import CONTAMINATED, HITS, Layout, gzip_writer, json_line, read_lines, save_bytes, zstd_writer


def clean(items: Sequence[Item], shards: int, config: BenchmarkConfig, layout: Layout, runner: BeamConfig) -> dict:
    """Writes the survivors that hold none of the items, the documents that do, and `hits.jsonl`.

    Returns {documents, hits, tasks}, see `run.run`.
    """
    index = layout.work / "benchmarks"
    make_index(items, config.ngram, index)
    waiting = [shard for shard in range(shards) if not layout.cleaned(shard).exists()]

    def done() -> int:
        return sum(layout.cleaned(shard).exists() for shard in range(shards))

    with Watch("corpus: benchmarks", shards, "shards", done):
        with make_pipeline(runner) as pipeline:
            work = (index, config.min_coverage, layout)
            _ = pipeline | beam.Create(waiting) | beam.Reshuffle() | beam.Map(_clean_shard, *work)
    found = gather([layout.hits(n) for n in range(shards)], pathlib.Path(layout.root, HITS), items, index)
    print_summary(found)
    return found


def _clean_shard(shard: int, index: pathlib.Path, least: float, layout: Layout) -> int:
    finder = Finder(index, least)
    counts: dict[str, Any] = {"subsets": {}, "examples": {}}
    with contextlib.ExitStack() as stack:
        hits_file = stack.enter_context(save_bytes(layout.hits(shard)))
        rejected = stack.enter_context(gzip_writer(layout.rejected(shard, "benchmarks")))
        for subset in SUBSETS:
            if not layout.survivors(shard, subset).exists():
                continue
            count = counts["subsets"].setdefault(subset, Counter())
            kept = stack.enter_context(zstd_writer(layout.clean(shard, subset)))
            for record, hits in _with_hits(read_lines(layout.survivors(shard, subset)), finder):
                if hits:
                    hits_file.writelines(map(json_line, hits))
                    _reject(record, hits[0], least, rejected, counts["examples"])
                    count.update(_no_longer_kept(record["text"]))
                else:
                    kept.write(json_line(record))
    write_json(layout.cleaned(shard), counts)
    return shard


def _with_hits(records: Iterator[dict], finder: Finder) -> Iterator[tuple[dict, list[dict]]]:
    for batch in batched(records, lambda record: len(record["text"])):
        yield from zip(batch, finder.hits([_text(record) for record in batch]), strict=True)


def _no_longer_kept(text: str) -> dict[str, int]:
    """What to add to the counts of deduplication, which had kept the text."""
    return {CONTAMINATED: 1, "kept": -1, "characters": -len(text), "bytes": -len(text.encode())}


def _text(record: dict[str, Any]) -> Text:
    return Text(record["id"], record["source"], record["text"], {"file": record["file"], "line": record["line"]})


def _reject(record: dict[str, Any], hit: dict[str, Any], least: float, rejected: Any, examples: dict) -> None:
    item = {"task": hit["task"], "item": hit["item"]}
    why = {"rule": CONTAMINATED, "value": hit["coverage"], "bound": "below", "threshold": least, **item}
    rejected.write(json_line(record | {"reasons": [why]}))
    shown = examples.setdefault(CONTAMINATED, [])
    if len(shown) < EXAMPLES:
        shown.append({"id": record["id"], "excerpt": hit["found"][:EXCERPT], **why})
