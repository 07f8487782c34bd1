"""`ctllm trace`: which documents a training step saw, and which steps saw a document.

Nothing was logged for this: what a step sees is a pure function of the run's config and its token store, so it is
computed again, in both directions. Steps count from 1, as in metrics.jsonl and in checkpoints; epochs count from 0.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import orbax.checkpoint as ocp

from ctllm_jax.checkpoint import checkpoints_folder
from ctllm_jax.common import html
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, read_json
from ctllm_jax.common.manifest import stage_fingerprint
from ctllm_jax.common.quiet import quiet_libraries
from ctllm_jax.data.batches import DataConfig, Stream, make_stream
from ctllm_jax.data.order import Place
from ctllm_jax.data.record import Row
from ctllm_jax.data.store import TokenStore, open_store
from ctllm_jax.metrics import read_metrics
from ctllm_jax.mirror import fetched

MAP_CC = "data_pipeline.map_cc"  # the corpus side; loaded only where a corpus is at hand
SPIKE_WINDOW = 64  # logged steps that a loss is compared with
SPIKE_FEWEST = 4  # of them, before a loss is judged

Lookup = Callable[[str, str], dict]  # (source, document id) -> {"url", "meta", "signals"}, or {} if it is not known


@dataclasses.dataclass(frozen=True)
class TraceConfig:
    """What `ctllm trace` is asked: exactly one of step, spike and document."""

    step: int | None  # [steps] what this step saw
    spike: int | None  # [steps] what this many steps saw whose loss jumped most
    document: str | None  # which steps saw the document of this id
    store: str | None  # the run's token store; None: where the run read it
    corpus: str | None  # folder of `ctllm corpus`; None: where the store was made from
    text_chars: int  # [characters] most characters shown of a document's text
    json: bool  # a JSON object a line instead of a table

    def __post_init__(self):
        if sum(asked is not None for asked in (self.step, self.spike, self.document)) != 1:
            raise ValueError("give exactly one of step, spike and document")
        for name in ("step", "spike"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} {value} is below 1")
        if self.text_chars < 0:
            raise ValueError(f"text_chars {self.text_chars} is below 0")


@dataclasses.dataclass(frozen=True)
class Segment:
    """A document, or a piece of one, as a step saw it.

    Attributes:
      step: from 1.
      row: of the step's global batch.
      begin, end: the tokens [begin, end) of the row; in a pair, of the side's own row.
      epoch: how often the source had been gone through before.
      source: name of the store's source, a subset for documents.
      document: its id.
      start: place of the first token within the document; not 0 in a later piece of a long one.
      store_row: which row of the source, in the store.
      side: "chosen" or "rejected" in a preference store, else None.
      text: the first characters of what the tokens say.
    """

    step: int
    row: int
    begin: int
    end: int
    epoch: int
    source: str
    document: str
    start: int
    store_row: int
    side: str | None
    text: str

    @property
    def tokens(self) -> int:
        """How many tokens of the document the step saw here."""
        return self.end - self.begin


@dataclasses.dataclass(frozen=True)
class Spike:
    """A step whose loss jumped: `jump` = (loss - median) / max(1.4826 MAD, 0.01 |median|).

    Median and MAD (median absolute deviation) are those of the finite losses among the 64 logged steps before; steps
    with fewer than 4 of them are not judged. A loss that is not finite is an infinite jump. The lower bound of the
    deviation keeps a curve that stood still from making a spike of every ripple.
    """

    step: int
    loss: float
    median: float
    jump: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, as far as tracing needs it: its stream of batches and the last step that is known of it."""

    folder: str
    stream: Stream
    last_step: int


# ---- Looking


def open_run(folder: str, store: str | None = None) -> Run:
    """The run in `folder`, with the store that it read or the same one elsewhere.

    Raises:
      UserError: no training run there; its store is missing or is not the one that it was trained on.
    """
    root = fetched(folder)
    claim = root / "stage.json"
    stage = read_json(claim) if claim.exists() else {}
    if stage.get("stage") != "train":
        raise UserError(f"{folder}: not a folder of `ctllm train`")
    config = read_json(claim.with_name("run.json"))["config"]
    location = store or config["data"]["store"]
    if not (as_path(location) / "manifest.json").exists():
        raise UserError(f"{location}: the run's token store is not there; if it has moved, give --store=DIR")
    opened, trained_on = open_store(location), stage["inputs"]["store"]
    if opened.fingerprint != trained_on:
        raise UserError(
            f"{location} is not the store that {folder} was trained on (fingerprint {opened.fingerprint}, the run has "
            f"{trained_on}); give --store=DIR"
        )
    data = build(DataConfig, config["data"], f"{folder}/run.json: config.data")
    return Run(str(root), make_stream(data, opened, config["batch_size"], config["seed"]), _last_step(root))


def _last_step(folder: pathlib.Path) -> int:
    """The last step that left a mark: a line of metrics or a checkpoint; 0 where there is none."""
    steps, metrics, checkpoints = [0], folder / "metrics.jsonl", checkpoints_folder(folder)
    if metrics.exists():
        steps += [entry["step"] for kind in ("train", "eval") for entry in read_metrics(folder, kind)]
    if checkpoints.exists():
        steps += ocp.utils.checkpoint_steps(checkpoints)
    return max(steps)


def segments(stream: Stream, examples: Sequence[int], text_chars: int) -> Iterator[Segment]:
    """What examples of the stream show, in their order."""
    places = stream.mixture.places(examples)
    for example, place, record in zip(examples, places, stream.read(places), strict=True):
        step, row = divmod(example, stream.batch_size)
        yield from _segments_of_row(stream.store, step + 1, row, place, record, text_chars)


def examples_of_step(stream: Stream, step: int) -> range:
    """The examples that a step (from 1) sees."""
    return range((step - 1) * stream.batch_size, step * stream.batch_size)


def examples_of_document(stream: Stream, rows: Mapping[str, Sequence[int]], last_step: int) -> list[int]:
    """The examples up to a step that show any of the rows, which are given by source (see `rows_of`)."""
    stop = last_step * stream.batch_size
    return sorted(
        example
        for source, indices in rows.items()
        for index in indices
        for example in stream.mixture.examples(source, index, stop)
    )


def _segments_of_row(
    store: TokenStore, step: int, row: int, place: Place, record: Row, text_chars: int
) -> Iterator[Segment]:
    pair = store.kind == "preference"
    sides = ("chosen", "rejected") if pair else [None] * len(record.ids)
    stops = itertools.accumulate(record.lengths)
    starts = record.starts or [0] * len(record.ids)
    for document, length, stop, start, side in zip(record.ids, record.lengths, stops, starts, sides, strict=True):
        tokens = record.tokens[stop - length : stop]
        begin = 0 if pair else stop - length
        # Enough tokens for the text: 4 are a character at most, its UTF-8 bytes; special ones give none.
        text = store.tokenizer.decode(tokens[: 4 * text_chars + 16])[:text_chars]
        yield Segment(
            step=step,
            row=row,
            begin=begin,
            end=begin + length,
            epoch=place.epoch,
            source=place.source,
            document=document,
            start=start,
            store_row=place.index,
            side=side,
            text=text,
        )


def rows_of(store: TokenStore, split: str, document: str) -> dict[str, list[int]]:
    """{source: its rows that hold the document}, sources without it left out."""
    found = {source: store.find(split, source, document) for source in store.sources(split)}
    return {source: rows for source, rows in found.items() if rows}


def spikes(losses: Sequence[tuple[int, float]], most: int) -> list[Spike]:
    """The `most` largest jumps above 0 of (step, loss) pairs in the order of steps; the largest first."""
    found = []
    for number, (step, loss) in enumerate(losses):
        before = np.array([value for _, value in losses[max(0, number - SPIKE_WINDOW) : number]])
        before = before[np.isfinite(before)]
        if len(before) < SPIKE_FEWEST:
            continue
        median = float(np.median(before))
        deviation = max(1.4826 * float(np.median(np.abs(before - median))), 0.01 * abs(median), 1e-12)
        jump = (loss - median) / deviation if math.isfinite(loss) else math.inf
        if jump > 0:
            found.append(Spike(step, loss, median, jump))
    return sorted(found, key=lambda spike: (-spike.jump, spike.step))[:most]


# ---- The corpus


def open_corpus(folder: str | None, store: TokenStore) -> Lookup:
    """Looks documents up in MAP-CC. Without a corpus documents have no URL, and standard error says why.

    Args:
      folder: of `ctllm corpus`; None takes the one that the store says it was made from, if it is still there.
      store: what is traced.

    Raises:
      UserError: `folder` is not the corpus that the store was made from.
    """
    if store.kind != "pretrain" and folder is None:
        return lambda source, document: {}  # conversations and pairs come from files, and have no URL
    try:
        folder = _checked_corpus(folder or next(iter(store.info["made_from"]), ""), store)
    except UserError as error:
        if folder is not None:
            raise
        return _without_urls(f"{error}; give --corpus=DIR")
    try:
        with quiet_libraries():
            map_cc = importlib.import_module(MAP_CC)
    except ModuleNotFoundError as error:
        return _without_urls(f"{error.name} is not installed: pip install 'ctllm-jax[data]'")

    @functools.lru_cache(maxsize=4096)
    def look_up(source: str, document: str) -> dict:
        found = map_cc.find(as_path(folder) / "map_cc" / source, document)
        return {name: getattr(found, name) for name in ("url", "meta", "signals")} if found else {}

    return look_up


def _checked_corpus(folder: str, store: TokenStore) -> str:
    """`folder`, if the store was made from this corpus."""
    found, wanted = stage_fingerprint(folder, "corpus"), read_json(store.folder / "stage.json")["inputs"].get("data")
    if found != wanted:
        raise UserError(f"{folder} (fingerprint {found}) is not what {store.folder} was made from ({wanted})")
    return folder


def _without_urls(why: str) -> Lookup:
    print(f"trace: no URLs: {why}", file=sys.stderr)
    return lambda source, document: {}


# ---- Telling


@dataclasses.dataclass(frozen=True)
class Answer:
    """A step or a document: what is to be said of it, as a line and as a JSON object, and the segments that it saw."""

    line: str
    entry: dict
    segments: list[Segment]


def run(config: TraceConfig, workdir: str) -> dict:
    """Prints what was asked of the run in `workdir`, and returns it. Writes nothing.

    Returns {"segments": how many, "answers": [what --json says of each step, or of the document, with its "segments"]}.

    Raises:
      UserError: run, store and corpus do not belong together; the document is not in the training split.
    """
    traced = open_run(workdir, config.store)
    if config.document is not None:
        answers = [_trace_document(traced, config)]
    else:
        answers = _trace_steps(traced, config)
    look_up = open_corpus(config.corpus, traced.stream.store)
    total, told = 0, []
    for answer in answers:
        entries = [
            {"kind": "segment", **dataclasses.asdict(segment), "tokens": segment.tokens}
            | look_up(segment.source, segment.document)
            for segment in answer.segments
        ]
        if config.json:
            lines = [json.dumps(e, ensure_ascii=False, allow_nan=False) for e in (answer.entry, *entries)]
        else:
            lines = [*([""] if total else []), answer.line, *_table(entries)]
        print("\n".join(lines))
        total += len(entries)
        told.append({**answer.entry, "segments": entries})
    return {"segments": total, "answers": told}


def _trace_steps(traced: Run, config: TraceConfig) -> Iterator[Answer]:
    if config.spike is None:
        reached = config.step <= traced.last_step
        line = f"step {config.step}" + ("" if reached else f", not reached yet: the run is at step {traced.last_step}")
        wanted = [(config.step, line, {"reached": reached})]
    else:
        wanted = [_describe(spike) for spike in _spikes_of(traced.folder, config.spike)]
    for step, line, entry in wanted:
        seen = segments(traced.stream, examples_of_step(traced.stream, step), config.text_chars)
        yield Answer(line, {"kind": "step", "step": step, **entry}, list(seen))


def _describe(spike: Spike) -> tuple[int, str, dict]:
    """(step, line, entry) of a spike; JSON has no infinity, so a loss that is not finite is null."""
    line = f"step {spike.step}: loss {spike.loss:.4f}, median before {spike.median:.4f}, jump {spike.jump:.1f}"
    figures = {"loss": spike.loss, "median": spike.median, "jump": spike.jump}
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return spike.step, line, {"reached": True, **finite}


def _spikes_of(folder: str, most: int) -> list[Spike]:
    losses = [(entry["step"], entry["loss"]) for entry in read_metrics(folder, "train")]
    found = spikes(losses, most)
    if not found:
        print(f"trace: none of {len(losses)} logged losses lies above those before it", file=sys.stderr)
    return found


def _trace_document(traced: Run, config: TraceConfig) -> Answer:
    store, split, document = traced.stream.store, traced.stream.split, config.document
    rows = rows_of(store, split, document)
    if not rows:
        if held_out := rows_of(store, "validation", document):
            raise UserError(f"{document} is held out: no step sees the validation split ({_places(held_out)})")
        raise UserError(f"{document} is not in the token store {store.folder}; the id must be written in full")
    last = traced.last_step
    examples = examples_of_document(traced.stream, rows, last)
    own = [segment for segment in segments(traced.stream, examples, config.text_chars) if segment.document == document]
    steps = sorted({segment.step for segment in own})
    entry = {"kind": "document", "document": document, "split": split, "store_rows": rows, "steps": steps}
    line = f"{document}: {split} split, {_places(rows)}; seen by {len(steps)} of {last} steps"
    return Answer(line, {**entry, "last_step": last}, own)


def _places(rows: dict[str, list[int]]) -> str:
    return "; ".join(f"{source}, store row {', '.join(map(str, own))}" for source, own in rows.items())


COLUMNS = ("step", "row", "begin", "end", "tokens", "epoch", "source", "side", "document", "start", "url", "text")


def _table(segments: list[dict]) -> list[str]:
    """Aligned columns: a heading, then a line a segment. A column with nothing in it is left out."""
    cells = {name: [_one_line(segment.get(name)) for segment in segments] for name in COLUMNS}
    columns = [[name, *own] for name, own in cells.items() if any(own)]
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*columns, strict=True)]


def drawn(answer: Mapping) -> str:
    """An answer of `run` as an HTML table that fits a page: what was seen, and not which tokens of it."""
    names = ("step", "row", "tokens", "source", "document", "url", "text")
    return html.table(names, [[segment.get(name) for name in names] for segment in answer["segments"]])


def _one_line(value: object) -> str:
    """A value for a terminal: no line breaks, and nothing that would steer it (texts come from the web)."""
    text = "" if value is None else str(value)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
