"""`ctllm tokenize`: documents or conversations, through SeqIO tasks, into a token store of packed rows.

A Beam job evaluates the tasks: its elements are (task, split, shard) pointers, and each becomes one ArrayRecord shard,
packed from its documents within a seeded order. A shard's note beside it is written last, so a killed job goes on
with the shards that are missing.
"""

import collections
import dataclasses
import shutil
import sys
from collections.abc import Iterator

import apache_beam as beam
import numpy as np
import seqio

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, atomic_file, expand, identity, read_json, write_json
from ctllm_jax.common.manifest import open_stage, stage_fingerprint
from ctllm_jax.common.progress import Watch
from ctllm_jax.data.order import keyed
from ctllm_jax.data.record import FORMAT, KINDS, Row, shard_name, write_shard
from ctllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from data_pipeline import chat_tasks, map_cc, records, tasks
from data_pipeline.packing import chunks, pack
from data_pipeline.runner import BeamConfig, make_pipeline


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """What goes into a store."""

    kind: str  # "pretrain" (a corpus), "chat" or "preference" (jsonl files)
    corpus: str | None  # folder of `ctllm corpus`, for pretrain
    input: tuple[str, ...]  # jsonl files or globs, for chat and preference
    tokenizer: str  # folder of `ctllm tokenizer`, or a model file
    sequence_length: int
    validation_share: float  # part of the documents held out, by the hash of their id
    seed: int
    beam: BeamConfig

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is unknown; there are: {', '.join(KINDS)}")
        if (self.kind == "pretrain") != (self.corpus is not None):
            raise ValueError("kind pretrain needs corpus (a folder of `ctllm corpus`), the other kinds take none")
        if (self.kind == "pretrain") == bool(self.input):
            raise ValueError("kinds chat and preference need input (jsonl files), kind pretrain takes none")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share {self.validation_share} must lie between 0 and 1")
        if self.sequence_length < 2:  # a row predicts every token but its first
            raise ValueError(f"sequence_length {self.sequence_length} must be at least 2")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One element of the job: a part of a task, and where it goes."""

    task: str
    split: str
    source: str
    index: int
    count: int


def run(config: TokenizeConfig, workdir: str) -> dict:
    """Writes the store; returns its manifest's result (see `ctllm_jax.data.record`)."""
    tokenizer = load_tokenizer(config.tokenizer)
    settings = dataclasses.asdict(config)
    for name in ("corpus", "input", "tokenizer", "beam"):
        settings.pop(name)
    if config.kind == "pretrain":
        made_from = stage_fingerprint(config.corpus, "corpus")
    else:
        files = expand(config.input)
        made_from = [identity(file) for file in files]
    stage = open_stage("tokenize", FORMAT, workdir, settings, {"data": made_from, "tokenizer": tokenizer.digest})
    if stage.done:
        return stage.result

    found = records.Records([], [])
    if config.kind == "pretrain":
        names = tasks.corpus_tasks(map_cc.subset_folders(config.corpus), tokenizer, config.validation_share)
    else:
        check = {"chat": records.check_chat, "preference": records.check_preference}[config.kind]
        found = records.read_records(files, check)
        if not found.kept:
            raise UserError(f"{', '.join(files)}: no usable {config.kind} record among {len(found.rejected)}")
        register = {"chat": chat_tasks.chat_tasks, "preference": chat_tasks.preference_tasks}[config.kind]
        names = register(found.kept, tokenizer, config.validation_share)
    write_json(stage.folder / "rejected.json", found.rejected)
    if found.rejected:
        print(
            f"tokenize: {len(found.rejected)} records rejected, see {stage.folder}/rejected.json",
            file=sys.stderr,
        )

    shards = [
        Shard(task, split, source, index, count)
        for source, task in sorted(names.items())
        for count in [len(seqio.get_mixture_or_task(task).source.list_shards("train"))]
        for split in tasks.SPLITS
        for index in range(count)
    ]
    notes = [_note(stage.folder, shard) for shard in shards]
    with Watch(f"tokenize {config.kind}", len(shards), "shards", lambda: sum(note.exists() for note in notes)):
        with make_pipeline(config.beam) as pipeline:
            _ = pipeline | beam.Create(shards) | beam.Reshuffle() | beam.ParDo(BuildShard(config, str(stage.folder)))
    _keep_tokenizer(tokenizer, stage.folder / "tokenizer")
    result = {
        "format": FORMAT,
        "kind": config.kind,
        "sequence_length": config.sequence_length,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest},
        "splits": _collect(stage.folder, shards),
        "rejected_records": len(found.rejected),
    }
    if not any(entry["rows"] for entry in result["splits"]["train"].values()):
        raise UserError(f"{workdir}: nothing is left to train on (validation_share {config.validation_share})")
    return stage.finish(result)


class BuildShard(beam.DoFn):
    """Evaluates one part of a task and writes its store shard. Deterministic; a finished shard is not redone."""

    def __init__(self, config: TokenizeConfig, folder: str):
        self._config, self._folder = config, folder

    def process(self, shard: Shard) -> Iterator[None]:
        folder = as_path(self._folder)
        note = _note(folder, shard)
        if note.exists():
            return
        counts = collections.Counter()
        documents = list(_documents(shard, self._config, counts))
        if self._config.kind == "preference":
            rows = documents
        else:
            seed = keyed(self._config.seed, shard.source, shard.split, shard.index)
            rows = pack(documents, self._config.sequence_length, seed)
        counts["rows"] = len(rows)
        counts["tokens"] = sum(len(row.tokens) for row in rows)
        counts["bytes"] = sum(row.bytes for row in rows)
        name = shard_name(shard.split, shard.source, shard.index, shard.count)
        if rows:
            with atomic_file(folder / name) as temporary:
                write_shard(temporary, rows)
        write_json(note, {"file": name, **{key: counts[key] for key in COUNTS}})
        yield


COUNTS = ("rows", "documents", "tokens", "bytes", "truncated", "dropped")


def _documents(shard: Shard, config: TokenizeConfig, counts: collections.Counter) -> Iterator[Row]:
    """The rows-to-be of a part of a task, each at most a row long; counts documents, truncations and drops."""
    dataset = seqio.get_mixture_or_task(shard.task).get_dataset(
        sequence_length=None,
        split=shard.split,
        shuffle=False,
        num_epochs=1,
        shard_info=seqio.ShardInfo(shard.index, shard.count),
    )
    length = config.sequence_length
    for example in dataset.as_numpy_iterator():
        document_id, text_bytes = example["id"].decode(), int(example["bytes"])
        counts["documents"] += 1
        if config.kind == "pretrain":
            tokens = example["targets"]
            yield from chunks(Row(tokens, [len(tokens)], [document_id], None, text_bytes), length)
            continue
        sides = ("targets",) if config.kind == "chat" else ("chosen", "rejected")
        tokens = [example[side][:length] for side in sides]
        masks = [example["loss_mask" if side == "targets" else f"{side}_mask"][:length] for side in sides]
        counts["truncated"] += any(len(example[side]) > length for side in sides)
        if not all(mask[1:].any() for mask in masks):  # nothing would be learned
            counts["dropped"] += 1
            continue
        lengths = [len(part) for part in tokens]
        mask = np.concatenate(masks).astype(np.uint8)
        yield Row(np.concatenate(tokens), lengths, [document_id] * len(sides), mask, text_bytes)


def _note(folder, shard: Shard):
    return folder / "shards" / f"{shard_name(shard.split, shard.source, shard.index, shard.count)}.json"


def _collect(folder, shards: list[Shard]) -> dict:
    """{split: {source: shards and summed counts}} from the notes."""
    splits: dict[str, dict] = {split: {} for split in tasks.SPLITS}
    for shard in shards:
        note = read_json(_note(folder, shard))
        entry = splits[shard.split].setdefault(shard.source, {"shards": [], **dict.fromkeys(COUNTS, 0)})
        if note["rows"]:
            entry["shards"].append({"file": note["file"], "rows": note["rows"]})
        for key in COUNTS:
            entry[key] += note[key]
    return splits


def _keep_tokenizer(tokenizer: Tokenizer, folder) -> None:
    """Copies the tokenizer into the store: whoever has the store can read it."""
    folder.mkdir(exist_ok=True)
    for name in {tokenizer.file.name, "tokenizer_config.json"}:
        source = tokenizer.file.with_name(name)
        if source.exists():
            target = "tokenizer.model" if source.suffix == ".model" else name
            with atomic_file(folder / target) as temporary:
                shutil.copyfile(source, temporary)
