"""SeqIO tasks of instruction and preference records: one per source, through a chat template.

A record's source is its `source`, else its `language`, else the kind of the records.
"""

import itertools
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import orjson
import seqio
import tensorflow as tf

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.chat import ChatTemplate, CtllmTemplate
from ctllm_jax.data.record import id_hash
from ctllm_jax.data.tokenizer import Tokenizer
from data_pipeline.shards import json_line, save_array, save_bytes
from data_pipeline.splits import is_held_out
from data_pipeline.tasks import BATCH, SPLITS

_HAN = re.compile(r"[\u3400-\u9fff]")


def with_languages(records: Sequence[dict]) -> list[dict]:
    """Records that have a `language` each: where none is given, it is told by the script of what is said.

    "zh" where a fifth of the letters or more are Chinese characters (code and names among them are Latin), "en" where
    most are ASCII, "other" elsewhere.
    """
    return [record if record.get("language") else {**record, "language": _language(record)} for record in records]


def _language(record: dict) -> str:
    said = record.get("messages", record.get("prompt"))
    letters = [letter for message in said for letter in message["content"] if letter.isalpha()]
    if 5 * sum(_HAN.match(letter) is not None for letter in letters) >= len(letters) > 0:
        return "zh"
    return "en" if 2 * sum(letter.isascii() for letter in letters) > len(letters) else "other"


def in_ratio(records: Sequence[dict], ratio: Mapping[str, float]) -> list[dict]:
    """As many records as have their languages in an exact ratio, to the record; the others are left out.

    Which ones of a language stay is decided by the hash of their ids, so a smaller part lies within a larger one.

    Args:
      records: each with its `language`.
      ratio: {language: its part}; any positive scale.

    Raises:
      UserError: a record's language is not in the ratio, or one with a part has no record.
    """
    by_language: dict[str, list[dict]] = {}
    for record in records:
        by_language.setdefault(record.get("language", "none"), []).append(record)
    parts = {name: part for name, part in ratio.items() if part}
    if by_language.keys() - ratio.keys() or parts.keys() - by_language.keys():
        counts = ", ".join(f"{name} {len(own):,}" for name, own in sorted(by_language.items()))
        raise UserError(
            f"ratio has parts for {', '.join(sorted(parts))}; the records' languages are: {counts}. Name them all; a "
            "part of 0 leaves a language out"
        )
    scale = min(len(by_language[name]) / part for name, part in parts.items())
    kept = set()
    for name, part in parts.items():
        ids = sorted((record["id"] for record in by_language[name]), key=id_hash)
        kept.update(ids[: math.floor(part * scale + 1e-9)])
    return [record for record in records if record["id"] in kept]


class StoredRecords(Sequence[dict]):
    """Records in a file of JSON lines, each read when it is asked for."""

    def __init__(self, path: pathlib.Path):
        self._path, self._ends = path, np.load(path.with_suffix(".npy"), mmap_mode="r")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> dict:
        begin, end = int(self._ends[i - 1]) if i else 0, int(self._ends[i])
        with open(self._path, "rb") as file:
            file.seek(begin)
            return orjson.loads(file.read(end - begin))


Divided = Mapping[str, Mapping[str, Sequence[dict]]]  # {source: {split: records}}


def divide(records: Sequence[dict], kind: str, share: float) -> Divided:
    """The records by source and split, in their order; `share` of them are held out, by the hash of the id."""
    held_out = is_held_out(tf.constant([record["id"] for record in records], tf.string), share).numpy()
    sources: dict[str, dict[str, list[dict]]] = {}
    for record, held in zip(records, held_out, strict=True):
        own = sources.setdefault(record.get("source", record.get("language", kind)), {split: [] for split in SPLITS})
        own["validation" if held else "train"].append(record)
    return sources


def write_divided(records: Divided, folder: pathlib.Path) -> None:
    """Writes them to where `read_divided` finds them, in other processes too."""
    for source, splits in records.items():
        for split, own in splits.items():
            path, ends = folder / f"{source}.{split}.jsonl", []
            with save_bytes(path) as file:
                for record in own:
                    file.write(json_line(record))
                    ends.append(file.tell())
            save_array(path.with_suffix(".npy"), np.array(ends, np.int64))


def read_divided(folder: pathlib.Path) -> Divided:
    """What `write_divided` wrote; records are read when they are asked for."""
    found: dict[str, dict[str, StoredRecords]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        source, split, _ = path.name.split(".")
        found.setdefault(source, {})[split] = StoredRecords(path)
    return found


def chat_tasks(
    records: Divided, tokenizer: Tokenizer, template: ChatTemplate | None = None, learn: str = "assistant"
) -> dict[str, str]:
    """Registers a task per source of instruction records; {source: task name}. A shard of a task reads and renders its
    own records alone.

    Examples: targets and loss_mask int32 [tokens], whole, as the template renders them; id and bytes (of all messages),
    scalars.

    Args:
      records: as `records.read_records` gives them, divided.
      tokenizer: any of ours.
      template: None is ours.
      learn: what the mask marks, one of `chat.LEARN`.
    """
    template = template or CtllmTemplate(tokenizer)

    def example(record: dict) -> dict:
        ids, mask = template.render(record["messages"], learn)
        text_bytes = sum(len(message["content"].encode()) for message in record["messages"])
        return {"targets": ids, "loss_mask": mask, "bytes": text_bytes}

    return _record_tasks("chat", records, example, ("targets", "loss_mask"), tokenizer)


def preference_tasks(records: Divided, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> dict[str, str]:
    """Registers a task per source of preference records; {source: task name}.

    Examples: chosen, chosen_mask, rejected, rejected_mask int32 [tokens]; id and bytes (of the two answers), scalars.
    The prompt's own answers, if it has several turns, are given, not learned. Arguments as for `chat_tasks`.
    """
    template = template or CtllmTemplate(tokenizer)

    def example(record: dict) -> dict:
        features = {}
        for side in ("chosen", "rejected"):
            answer = {"role": "assistant", "content": record[side]}
            features[side], features[f"{side}_mask"] = template.render([*record["prompt"], answer], "last")
        return {**features, "bytes": sum(len(record[side].encode()) for side in ("chosen", "rejected"))}

    features = ("chosen", "chosen_mask", "rejected", "rejected_mask")
    return _record_tasks("preference", records, example, features, tokenizer)


def _record_tasks(
    kind: str, records: Divided, example: Callable[[dict], dict], features: Sequence[str], tokenizer: Tokenizer
) -> dict[str, str]:
    names = {}
    for source in sorted(records):
        name = f"{kind}_{source.replace('-', '.')}"  # SeqIO's names know no hyphen
        vocabulary = seqio.PassThroughVocabulary(tokenizer.vocab_size, eos_id=tokenizer.eos_id)
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=_RecordSource(records[source], example, features),
            preprocessors=[],
            output_features={f: seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32) for f in features},
            metric_fns=[],
        )
        names[source] = name
    return names


class _RecordSource(seqio.DataSource):
    """Examples of one source's records. ShardInfo may name any number of shards: of n, each has every n-th record."""

    def __init__(self, records: Mapping[str, Sequence[dict]], example: Callable[[dict], dict], features: Sequence[str]):
        super().__init__(splits=SPLITS)
        self._records, self._example, self._features = records, example, features

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> list[str]:
        return [split]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_,
    ) -> tf.data.Dataset:
        """Examples cross into tf.data by the batch, in the records' order; the store and the reader shuffle."""
        shard, own = shard_info or seqio.ShardInfo(0, 1), self._records[split]
        signature = {name: tf.RaggedTensorSpec([None, None], tf.int32) for name in self._features}
        signature |= {"id": tf.TensorSpec([None], tf.string), "bytes": tf.TensorSpec([None], tf.int32)}

        def generate():
            indices = range(shard.index, len(own), shard.num_shards)
            for start in range(0, len(indices), BATCH):
                batch = [own[i] for i in indices[start : start + BATCH]]
                found = [self._example(record) for record in batch]
                ragged = {name: _ragged([one[name] for one in found]) for name in self._features}
                yield {**ragged, "id": [record["id"] for record in batch], "bytes": [one["bytes"] for one in found]}

        def dense(found: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            return found | {name: tf.ensure_shape(found[name], [None]) for name in self._features}

        return tf.data.Dataset.from_generator(generate, output_signature=signature).unbatch().map(dense)


def _ragged(rows: Sequence[Sequence[int]]) -> tf.RaggedTensor:
    values = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
    return tf.RaggedTensor.from_row_lengths(values, [len(row) for row in rows])
