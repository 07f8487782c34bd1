"""`ctllm tokenize`: documents or conversations, through SeqIO tasks, into a token store of packed rows.

A Beam job evaluates the tasks. Its element is a window: a part of one source's documents, which becomes one shard of
the store, packed within itself in a seeded order. A window is the unit of memory (its documents and its rows are held
at once) and of resuming: a shard's note is written last, so a killed job goes on with the windows that have none.
What a window holds depends on the inputs and the config alone, never on workers.
"""

import collections
import dataclasses
import functools
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import apache_beam as beam
import numpy as np
import seqio
import tensorflow as tf

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import (
    atomic_file,
    expand,
    file_digest,
    identity,
    is_remote,
    place,
    read_json,
    shown,
    write_atomic,
    write_json,
)
from ctllm_jax.common.manifest import open_stage, stage_fingerprint
from ctllm_jax.common.progress import Watch
from ctllm_jax.data.chat import LEARN, load_template
from ctllm_jax.data.order import keyed
from ctllm_jax.data.record import FORMAT, KINDS, Row, ids_name, shard_name, write_ids, write_shard
from ctllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from data_pipeline import answers, chat_tasks, map_cc, records, tasks
from data_pipeline.packing import chunks, pack, wrap
from data_pipeline.runner import BeamConfig, make_pipeline, make_runner

PACKINGS = {"best_fit": pack, "wrapped": wrap}


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """What goes into a store."""

    kind: str  # "pretrain" (a corpus), "chat" or "preference" (jsonl files)
    corpus: str | None  # folder of `ctllm corpus`, for pretrain
    input: tuple[str, ...]  # jsonl files or globs, for chat and preference
    tokenizer: str  # folder of `ctllm tokenizer`, or a model file
    template: str  # of chats: "ctllm" (ours), "tokenizer" (that came with it), "chatml", "llama2", or a Jinja file
    learn: str  # of a conversation, kind chat: "assistant" (every answer), "last" (the final one) or "all"
    ratio: dict[str, float]  # [share] kinds chat and preference: records by language, exactly; empty takes all
    sequence_length: int  # [tokens] of a row
    keep: str  # kinds chat and preference: of an example longer than a row the "start" or the "end" (the last answer)
    packing: str  # of documents: "best_fit", or "wrapped" (end to end and cut at row ends, as the released models saw)
    validation_share: float  # [share] part of the documents held out, by the hash of their id
    shards: int  # [shards] of each source and split; 0: as many as the source has files
    seed: int  # [1] of the order in which documents are packed
    beam: BeamConfig  # where it runs

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is unknown; there are: {', '.join(KINDS)}")
        if (self.kind == "pretrain") != (self.corpus is not None):
            raise ValueError("kind pretrain needs corpus (a folder of `ctllm corpus`), the other kinds take none")
        if (self.kind == "pretrain") == bool(self.input):
            raise ValueError("kinds chat and preference need input (jsonl files), kind pretrain takes none")
        if self.learn not in LEARN:
            raise ValueError(f"learn {self.learn!r} is unknown; there are: {', '.join(LEARN)}")
        if self.kind != "chat" and self.learn != "assistant":
            raise ValueError(f"learn {self.learn!r} is for kind chat; of kind {self.kind} what is learned is fixed")
        if self.kind == "pretrain" and self.ratio:
            raise ValueError("ratio is for kinds chat and preference; mixture rates of documents belong to training")
        if any(part < 0 for part in self.ratio.values()) or (self.ratio and not any(self.ratio.values())):
            raise ValueError(f"ratio {self.ratio}: its parts must not be negative, nor all 0")
        if self.keep not in ("start", "end"):
            raise ValueError(f"keep {self.keep!r} is unknown; there are: start, end")
        if self.kind == "pretrain" and self.keep != "start":
            raise ValueError("keep is for kinds chat and preference; of documents nothing is cut away")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing {self.packing!r} is unknown; there are: {', '.join(PACKINGS)}")
        if self.kind != "pretrain" and self.packing != "best_fit":
            raise ValueError(f"packing {self.packing!r} would cut conversations; kind {self.kind} is packed best_fit")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share {self.validation_share} must lie between 0 and 1")
        if self.sequence_length < 2:  # a row predicts every token but its first
            raise ValueError(f"sequence_length {self.sequence_length} must be at least 2")
        if self.shards < 0:
            raise ValueError(f"shards {self.shards} must not be negative (0: as many as a source has files)")


@dataclasses.dataclass(frozen=True)
class Window:
    """One element of the job: a part of a task, and the shard that it becomes."""

    task: str
    split: str
    source: str
    index: int
    count: int

    @property
    def shard(self) -> str:
        """File name of the shard."""
        return shard_name(self.split, self.source, self.index, self.count)


def run(config: TokenizeConfig, workdir: str) -> dict:
    """Writes the store; returns its manifest's result (see `ctllm_jax.data.record`).

    Raises:
      UserError: an input or the tokenizer is missing or no such thing, another run's folder, an unknown runner, or
        nothing to train on.
    """
    make_runner(config.beam)  # a wrong name is said before anything is written
    tokenizer = load_tokenizer(config.tokenizer)
    settings = dataclasses.asdict(config)
    for name in ("corpus", "input", "tokenizer", "template", "beam"):
        settings.pop(name)
    if config.kind == "pretrain":
        files = [config.corpus]
        inputs = stage_fingerprint(config.corpus, "corpus")
        made_with = [tokenizer.digest, tokenizer.bos_id, tokenizer.eos_id]  # a tokenizer.json leaves the ids to others
    else:
        files = expand(config.input)
        inputs = [file_digest(file) for file in files]
        settings["template"] = load_template(config.template, tokenizer).jinja
        made_with = [file_digest(file) for file in tokenizer.files]  # a template may name any special piece
    stage = open_stage("tokenize", FORMAT, workdir, settings, {"data": inputs, "tokenizer": made_with})
    if stage.done:
        return stage.result

    found = _read_records(config, tokenizer, stage.folder)
    names = _register(config, tokenizer, stage.folder)
    write_json(stage.folder / "rejected.json", found.rejected)
    if found.rejected:
        print(
            f"tokenize: {len(found.rejected)} records rejected, see {place(stage.folder)}/rejected.json",
            file=sys.stderr,
        )
    windows = _windows(names, config.shards)
    _build(windows, _inputs_of(names) or len(found.kept), config, stage.folder)
    shutil.rmtree(_records(stage.folder), ignore_errors=True)
    tokenizer.copy_to(stage.folder / "tokenizer")  # whoever has the store can read it
    if config.kind != "pretrain":  # what is trained on it speaks this template
        write_atomic(stage.folder / "tokenizer" / "chat_template.jinja", settings["template"])
    result = {
        "format": FORMAT,
        "kind": config.kind,
        "sequence_length": config.sequence_length,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest},
        "made_from": [shown(file if is_remote(file) else place(os.path.abspath(file))) for file in files],
        "splits": _collect(stage.folder, windows, config),
        "rejected_records": len(found.rejected),
    }
    _print_summary(result["splits"])
    if config.kind != "pretrain":
        for sentence in answers.warnings(result["splits"]["train"], config.kind, config.sequence_length, tokenizer):
            print(f"tokenize: {sentence}", file=sys.stderr)
    if not any(entry["rows"] for entry in result["splits"]["train"].values()):
        raise UserError(f"{workdir}: nothing is left to train on (validation_share {config.validation_share})")
    return stage.finish(result)


def _read_records(config: TokenizeConfig, tokenizer: Tokenizer, folder: pathlib.Path) -> records.Records:
    """Reads and checks the records of kinds chat and preference, and writes the usable ones to where workers find them:
    each of them reads its own alone."""
    if config.kind == "pretrain":
        return records.Records([], [])
    files = expand(config.input)
    template = load_template(config.template, tokenizer)
    if config.kind == "chat":
        check = functools.partial(records.check_chat, template=template, learn=config.learn)
    else:
        check = functools.partial(records.check_preference, template=template)
    found = records.read_records(files, check)
    if not found.kept:
        raise UserError(f"{', '.join(files)}: no usable {config.kind} record among {len(found.rejected)}")
    if config.ratio:
        found = dataclasses.replace(
            found, kept=chat_tasks.in_ratio(chat_tasks.with_languages(found.kept), config.ratio)
        )
    shutil.rmtree(_records(folder), ignore_errors=True)  # of a killed run
    chat_tasks.write_divided(chat_tasks.divide(found.kept, config.kind, config.validation_share), _records(folder))
    return found


def _register(config: TokenizeConfig, tokenizer: Tokenizer, folder: pathlib.Path) -> dict[str, str]:
    """Registers the tasks with SeqIO, as every process that evaluates them must; {source: task}."""
    if config.kind == "pretrain":
        folders = map_cc.subset_folders(config.corpus)
        return tasks.corpus_tasks(folders, tokenizer, config.validation_share)
    divided, template = chat_tasks.read_divided(_records(folder)), load_template(config.template, tokenizer)
    if config.kind == "chat":
        return chat_tasks.chat_tasks(divided, tokenizer, template, config.learn)
    return chat_tasks.preference_tasks(divided, tokenizer, template)


def _records(folder: pathlib.Path) -> pathlib.Path:
    """Usable records by source and split, until the store is finished."""
    return folder / "records"


def _windows(names: Mapping[str, str], shards: int) -> list[Window]:
    return [
        Window(task, split, source, index, count)
        for source, task in sorted(names.items())
        for count in [shards or len(seqio.get_mixture_or_task(task).source.list_shards("train"))]
        for split in tasks.SPLITS
        for index in range(count)
    ]


def _inputs_of(names: Mapping[str, str]) -> int:
    """Documents of all tasks over both splits; 0 where the sources do not know."""
    return sum(seqio.get_mixture_or_task(task).num_input_examples("train") or 0 for task in names.values())


def _build(windows: Sequence[Window], documents: int, config: TokenizeConfig, folder: pathlib.Path) -> None:
    """Runs the Beam job over the windows that have no note yet."""
    shutil.rmtree(folder / "progress", ignore_errors=True)  # a killed run counted further than it got
    (folder / "progress").mkdir()
    waiting = [window for window in windows if not _note(folder, window).exists()]
    earlier = sum(read_json(_note(folder, window))["documents"] for window in set(windows) - set(waiting))

    def count() -> int:
        return earlier + sum(_documents_done(folder, window) for window in waiting)

    with Watch(f"tokenize {config.kind}", documents, "documents", count):
        with make_pipeline(config.beam) as pipeline:
            _ = pipeline | beam.Create(waiting) | beam.Reshuffle() | beam.ParDo(BuildShard(config, str(folder)))
    shutil.rmtree(folder / "progress")


_registering = threading.Lock()  # a worker process may hold several windows at once


class BuildShard(beam.DoFn):
    """Evaluates one window and writes its shard, its index of ids, and last its note. Deterministic."""

    def __init__(self, config: TokenizeConfig, folder: str):
        self._config, self._folder = config, folder

    def process(self, window: Window) -> Iterator[None]:
        config, folder = self._config, pathlib.Path(self._folder)
        with _registering:
            if window.task not in seqio.TaskRegistry.names():  # a process of its own
                _register(config, load_tokenizer(config.tokenizer), folder)
        counts = collections.Counter()
        with open(_progress(folder, window), "w") as progress:
            documents = list(_documents(window, config, counts, progress))
        if config.kind == "preference":
            rows = documents
        else:
            seed = keyed(config.seed, window.source, window.split, window.index)
            rows = PACKINGS[config.packing](documents, config.sequence_length, seed)
        for row in rows:
            counts.update(rows=1, tokens=len(row.tokens), learned=_learned(row), bytes=row.bytes)
        note = {"file": window.shard, **{key: counts[key] for key in _counted(config.kind)}}
        if rows:
            shard = folder / window.shard
            with atomic_file(shard) as temporary:
                write_shard(temporary, rows)
            with atomic_file(folder / ids_name(window.shard)) as temporary:
                write_ids(temporary, rows)
            note["identity"] = identity(shard)
        write_json(_note(folder, window), note)
        yield


def _counted(kind: str) -> tuple[str, ...]:
    """What is counted of each source and split. `tokens_chosen` and `tokens_rejected` are answers' tokens."""
    counts = ("rows", "documents", "tokens", "learned", "bytes", "truncated", "dropped")
    return (*counts, "tokens_chosen", "tokens_rejected") if kind == "preference" else counts


def _documents(window: Window, config: TokenizeConfig, counts: collections.Counter, progress: TextIO) -> Iterator[Row]:
    """What a window packs, each at most a row long unless wrapped; counts documents, truncations and drops."""
    length = config.sequence_length
    sides = ("chosen", "rejected") if config.kind == "preference" else ("targets",)
    for example in _examples(window, counts, progress):
        document_id, text_bytes = example["id"].decode(), int(example["bytes"])
        if config.kind == "pretrain":
            tokens = example["targets"]
            row = Row(tokens, [len(tokens)], [document_id], None, text_bytes)
            yield from chunks(row, length) if config.packing == "best_fit" else [row]
            continue
        kept = slice(length) if config.keep == "start" else slice(-length, None)
        tokens = [example[side][kept] for side in sides]
        masks = [example["loss_mask" if side == "targets" else f"{side}_mask"][kept] for side in sides]
        counts["truncated"] += any(len(example[side]) > length for side in sides)
        learned = [int(mask[1:].sum()) for mask in masks]
        if not all(learned) or (len(sides) == 2 and np.array_equal(*tokens)):  # nothing would be learned
            counts["dropped"] += 1
            continue
        if len(sides) == 2:
            counts.update(tokens_chosen=learned[0], tokens_rejected=learned[1])
        lengths = [len(part) for part in tokens]
        mask = np.concatenate(masks).astype(np.uint8)
        yield Row(np.concatenate(tokens), lengths, [document_id] * len(sides), mask, text_bytes)


def _examples(window: Window, counts: collections.Counter, progress: TextIO) -> Iterator[dict[str, Any]]:
    """A window's examples, read from SeqIO by batches, as one by one costs as much as their tokens; counts them."""
    dataset = seqio.get_mixture_or_task(window.task).get_dataset(
        sequence_length=None,
        split=window.split,
        shuffle=False,
        num_epochs=1,
        shard_info=seqio.ShardInfo(window.index, window.count),
        trim_output_features=False,
        try_in_mem_cache=False,
    )
    for batch in dataset.ragged_batch(tasks.BATCH).as_numpy_iterator():
        columns = {name: _column(values) for name, values in batch.items()}
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
        counts["documents"] += len(columns["id"])
        progress.seek(0)
        progress.write(str(counts["documents"]))
        progress.flush()


def _column(values: np.ndarray | tf.compat.v1.ragged.RaggedTensorValue) -> Sequence[Any]:
    """A feature's value in each example of a batch."""
    return values if isinstance(values, np.ndarray) else np.split(values.values, values.row_splits[1:-1])


def _learned(row: Row) -> int:
    """Tokens of a row that are predicted: those that count, but the first of a segment."""
    if row.mask is None:
        return len(row.tokens) - len(row.lengths)
    firsts = np.cumsum(row.lengths) - row.lengths
    return int(row.mask.sum()) - int(row.mask[firsts].sum())


def _note(folder: pathlib.Path, window: Window) -> pathlib.Path:
    return folder / "shards" / f"{window.shard}.json"


def _progress(folder: pathlib.Path, window: Window) -> pathlib.Path:
    """Documents of a window read so far; only for the progress display."""
    return folder / "progress" / window.shard


def _documents_done(folder: pathlib.Path, window: Window) -> int:
    try:
        return int(_progress(folder, window).read_text() or 0)
    except FileNotFoundError:  # not begun
        return 0


def _collect(folder: pathlib.Path, windows: Sequence[Window], config: TokenizeConfig) -> dict:
    """{split: {source: shards, summed counts, share of positions that are padding}} from the notes."""
    splits: dict[str, dict] = {split: {} for split in tasks.SPLITS}
    counted = _counted(config.kind)
    for window in windows:
        note = read_json(_note(folder, window))
        entry = splits[window.split].setdefault(window.source, {"shards": [], **dict.fromkeys(counted, 0)})
        if note["rows"]:
            entry["shards"].append({name: note[name] for name in ("file", "rows", "identity")})
        for key in counted:
            entry[key] += note[key]
    sequences = 2 if config.kind == "preference" else 1  # of a row
    for entry in (entry for sources in splits.values() for entry in sources.values()):
        positions = entry["rows"] * sequences * config.sequence_length
        entry["padding"] = round(1 - entry["tokens"] / positions, 6) if positions else 0.0
    return splits


def _print_summary(splits: Mapping[str, Mapping[str, Mapping]]) -> None:
    """Prints what a store holds as a table on standard error."""
    names = ("documents", "rows", "tokens", "padding", "truncated", "dropped")
    print(f"{'':24}" + "".join(f"{name:>15}" for name in names), file=sys.stderr)
    for split, sources in splits.items():
        for source, entry in sources.items():
            cells = [f"{entry[name]:.2%}" if name == "padding" else f"{entry[name]:,}" for name in names]
            print(f"{f'{source}, {split}':24}" + "".join(f"{cell:>15}" for cell in cells), file=sys.stderr)
