"""`ctllm corpus`: raw documents to MAP-CC, with every rejection accounted for.

    input files --filter--> kept + rejected + hashes --deduplicate--> survivors --TFDS--> map_cc/<subset>

Where benchmarks are named, survivors that hold their items are left out before TFDS.

Beam's elements are pointers to files and blocks of numbers (TFDS's own writer, which orders records by a hash
of their id, is the one place where documents are grouped). Each step's output per shard is written whole and
looked for first, so that a killed run goes on where it was and ends in the same bytes. `WORKDIR/work` is
deleted at the end. Runs on a local or shared file system.
"""

import dataclasses
import os
import pathlib
import shutil
import sys
from collections import Counter
from collections.abc import Callable

import apache_beam as beam

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import identity, place, shown, write_atomic, write_json
from ctllm_jax.common.manifest import open_stage
from ctllm_jax.common.progress import Watch
from data_pipeline import pilot, report
from data_pipeline.containers import TEXT
from data_pipeline.contamination.clean import clean
from data_pipeline.contamination.items import BenchmarkConfig, read_items
from data_pipeline.contamination.run import settings_of
from data_pipeline.dedup.corpora import Corpora, earlier_shards
from data_pipeline.dedup.minhash import DedupConfig
from data_pipeline.dedup.stage import deduplicate
from data_pipeline.documents import SUBSETS, Fields, InputFile, find_inputs
from data_pipeline.filters.rules import FilterConfig, Filters
from data_pipeline.filters.stage import FilterSettings, filter_file
from data_pipeline.report_page import page
from data_pipeline.runner import BeamConfig, make_pipeline, make_runner
from data_pipeline.shards import Layout

VERSION = 4


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """What `ctllm corpus` reads."""

    input: tuple[str, ...]  # globs or paths, PATTERN or SUBSET=PATTERN: see `documents.find_inputs`
    fields: Fields  # names of the records' keys
    default_source: str | None  # subset of records without one; None: they are rejected
    max_record_bytes: int  # [bytes] longer records are rejected unread
    filters: FilterConfig  # what is done to a document
    dedup: DedupConfig  # which documents count as the same
    benchmarks: BenchmarkConfig  # whose items no document may hold; none are looked for unless they are named
    beam: BeamConfig  # where it runs
    pilot: float  # [share] of the input to estimate the whole from; 0 builds it

    def __post_init__(self) -> None:
        if self.default_source is not None and self.default_source not in SUBSETS:
            raise UserError(f"default_source: {self.default_source!r} is not one of {', '.join(SUBSETS)}")
        if self.max_record_bytes < 1:
            raise UserError("max_record_bytes must be at least 1")


def run(config: CorpusConfig, workdir: str) -> dict:
    """Builds MAP-CC in `workdir`; returns the manifest's result (see `report.summary`), of a pilot `pilot.estimate`.

    Raises:
      UserError: no input file, another run's folder, an unknown runner, a list or model of the filters that cannot be
        read, or no document that survives.
    """
    if not config.input:
        raise UserError("input: no files named; give --config.input=PATTERN")
    make_runner(config.beam)  # what is wrong with it, or with a list or model, is said before anything is written
    Filters(config.filters)
    files = find_inputs(config.input)
    if config.pilot:
        return pilot.estimate(files, config.pilot, workdir, lambda some, folder: _build(some, config, folder))
    return _build(files, config, workdir)


def _input_of(file: InputFile) -> list[str | None]:
    """What identifies an input: name, subset and content; of texts also the paths as given, the documents' ids."""
    ids = map(shown, file.paths) if TEXT.search(file.path) else ()
    return [file.name, file.source, *map(identity, file.paths), *ids]


def _build(files: list[InputFile], config: CorpusConfig, workdir: str) -> dict:
    settings = {name: v for name, v in dataclasses.asdict(config).items() if name not in ("input", "beam", "pilot")}
    items, asked = read_items(config.benchmarks) if config.benchmarks.wanted else ([], [])
    settings["benchmarks"] = settings_of(config.benchmarks)
    settings["dedup"] = {name: v for name, v in settings["dedup"].items() if name != "earlier"}
    fingerprints, earlier = earlier_shards(config.dedup.earlier, config.dedup)
    inputs = [_input_of(file) for file in files] + fingerprints + asked
    stage = open_stage("corpus", VERSION, workdir, settings, inputs)
    layout = Layout(os.path.abspath(workdir))
    corpora = Corpora(earlier, layout, len(files))
    if not stage.done:
        _filter(files, config, layout)
        with Watch("corpus: deduplicate", len(files), "shards", lambda: _count(files, layout.outcome)):
            deduplicate(corpora, config.dedup, config.beam)
        seen = clean(items, len(files), config.benchmarks, layout, config.beam) if items else None
        found = report.collect(files, corpora, config.filters, seen)
        write_json(layout.report("json"), found)
        write_atomic(layout.report("html"), page(found))
        _print_summary(found, place(os.path.join(workdir, "report.html")))
        _write_map_cc(found, len(files), layout, config.beam)
        stage.finish(report.summary(found))
    shutil.rmtree(layout.work, ignore_errors=True)
    return stage.result


def _filter(files: list[InputFile], config: CorpusConfig, layout: Layout) -> None:
    settings = FilterSettings(
        config.fields, config.default_source, config.max_record_bytes, config.filters, config.dedup
    )
    waiting = [file for file in files if not layout.counts(file.index).exists()]
    for file in waiting:
        layout.progress(file.index).parent.mkdir(parents=True, exist_ok=True)
        layout.progress(file.index).write_text("0")  # a killed run counted further than it got
    if not waiting:
        return

    def read() -> int:
        return sum(layout.records_read(file.index) for file in files)

    with Watch("corpus: filter", 0, "records", read):
        with make_pipeline(config.beam) as pipeline:
            _ = pipeline | beam.Create(waiting) | beam.Reshuffle() | beam.Map(filter_file, settings, layout)
    print(f"corpus: filter: {_count(files, layout.counts)}/{len(files)} shards", file=sys.stderr)


def _write_map_cc(found: dict, shards: int, layout: Layout, runner: BeamConfig) -> None:
    from data_pipeline import map_cc  # takes seconds to import, so last

    subsets = [subset for subset in SUBSETS if found["subsets"].get(subset, {}).get("kept")]
    for leftover in layout.map_cc.glob("*/*incomplete*"):  # of a killed run
        shutil.rmtree(leftover)

    def written() -> int:
        return len(list(layout.map_cc.glob(f"*/*/{map_cc.INDEX}")))

    with Watch("corpus: write", len(subsets), "subsets", written):
        for subset in subsets:
            map_cc.write(subset, shards, layout, runner)


def _count(files: list[InputFile], where: Callable[[int], pathlib.Path]) -> int:
    """How many of the files have what `where` names."""
    return sum(where(file.index).exists() for file in files)


def _print_summary(found: dict, page: str) -> None:
    """Says on standard error what a reader must not overlook; no surviving document is an error."""
    for entry in found["damaged_files"]:
        print(f"corpus: {entry['file']} is damaged: {entry['damage']}; read up to there", file=sys.stderr)
    for path in found["empty_files"]:
        print(f"corpus: {path} holds no record", file=sys.stderr)
    totals = found["totals"]
    print(
        f"corpus: {totals['read']:,} records read, {totals['kept']:,} documents kept; report: {page}", file=sys.stderr
    )
    if not totals["kept"]:
        reasons = Counter(totals["malformed"]) + Counter(totals["rules"])
        worst = ", ".join(f"{rule} ({count:,})" for rule, count in reasons.most_common(4))
        raise UserError(
            f"no document survived; most frequent reasons: {worst or 'the files hold no records'}. "
            "rejected/*.jsonl.gz in the work folder lists every rejection with its value and threshold."
        )
