"""SeqIO tasks of instruction and preference records: one per source, through a chat template.

A record's source is its `source`, else its `language`, else the kind of the records.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.chat import ChatTemplate, CtllmTemplate
from ctllm_jax.data.record import id_hash
from ctllm_jax.data.tokenizer import Tokenizer
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


def chat_tasks(
    records: Sequence[dict],
    tokenizer: Tokenizer,
    share: float,
    template: ChatTemplate | None = None,
    learn: str = "assistant",
) -> dict[str, str]:
    """Registers a task per source of instruction records; {source: task name}.

    Examples: targets and loss_mask int32 [tokens], whole, as the template renders them; id and bytes (of all messages),
    scalars.

    Args:
      records: as `records.read_records` gives them.
      tokenizer: any of ours.
      share: part of the records held out, by the hash of the id.
      template: None is ours.
      learn: what the mask marks, one of `chat.LEARN`.
    """
    template = template or CtllmTemplate(tokenizer)

    def example(record: dict) -> dict:
        ids, mask = template.render(record["messages"], learn)
        text_bytes = sum(len(message["content"].encode()) for message in record["messages"])
        return {"targets": ids, "loss_mask": mask, "bytes": text_bytes}

    return _record_tasks("chat", records, example, ("targets", "loss_mask"), tokenizer, share)


def preference_tasks(
    records: Sequence[dict], tokenizer: Tokenizer, share: float, template: ChatTemplate | None = None
) -> dict[str, str]:
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
    return _record_tasks("preference", records, example, features, tokenizer, share)


def _record_tasks(
    kind: str,
    records: Sequence[dict],
    example: Callable[[dict], dict],
    features: Sequence[str],
    tokenizer: Tokenizer,
    share: float,
) -> dict[str, str]:
    sources: dict[str, list[dict]] = {}
    for record in records:
        sources.setdefault(record.get("source", record.get("language", kind)), []).append(record)
    names = {}
    for source in sorted(sources):
        name = f"{kind}_{source.replace('-', '.')}"  # SeqIO's names know no hyphen
        vocabulary = seqio.PassThroughVocabulary(tokenizer.vocab_size, eos_id=tokenizer.eos_id)
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(_dataset_fn(sources[source], example, features, share), splits=SPLITS),
            preprocessors=[],
            output_features={f: seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32) for f in features},
            metric_fns=[],
        )
        names[source] = name
    return names


def _dataset_fn(
    records: Sequence[dict], example: Callable[[dict], dict], features: Sequence[str], share: float
) -> Callable[..., tf.data.Dataset]:
    """What SeqIO calls for a split's data set. Examples cross into tf.data by the batch."""
    signature = {name: tf.RaggedTensorSpec([None, None], tf.int32) for name in features}
    signature |= {"id": tf.TensorSpec([None], tf.string), "bytes": tf.TensorSpec([None], tf.int32)}

    def dense(found: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return found | {name: tf.ensure_shape(found[name], [None]) for name in features}

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # read in file order; the store and the reader shuffle
        held_out = is_held_out(tf.constant([record["id"] for record in records]), share).numpy()
        own = [record for record, held in zip(records, held_out, strict=True) if held == (split == "validation")]

        def generate():
            for start in range(0, len(own), BATCH):
                batch = own[start : start + BATCH]
                found = [example(record) for record in batch]
                ragged = {name: _ragged([one[name] for one in found]) for name in features}
                yield {**ragged, "id": [record["id"] for record in batch], "bytes": [one["bytes"] for one in found]}

        return tf.data.Dataset.from_generator(generate, output_signature=signature).unbatch().map(dense)

    return dataset_fn


def _ragged(rows: Sequence[Sequence[int]]) -> tf.RaggedTensor:
    values = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
    return tf.RaggedTensor.from_row_lengths(values, [len(row) for row in rows])
