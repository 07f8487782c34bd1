"""SeqIO tasks: what a source of documents is, from its files to token ids.

`corpus_tasks` gives one task per MAP-CC subset, `chat_tasks` and `preference_tasks` one per language of a set of
jsonl files. Their examples carry, beside the output features, the id of the document and its UTF-8 bytes, so that
whatever is made of them can be traced and measured. The Beam job of `token_store` evaluates them; they work with
`seqio.get_dataset` like any other task.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence

import seqio
import tensorflow as tf

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path
from ctllm_jax.data.chat import check_messages, marker, render
from ctllm_jax.data.tokenizer import CHAT_PIECES, SentencePieceTokenizer, Tokenizer
from data_pipeline.splits import is_held_out

SPLITS = ("train", "validation")
_LANGUAGE = re.compile(r"[\w-]+")  # it becomes part of task and file names


class HeldOutTfdsSource(seqio.TfdsDataSource):
    """A TFDS data set with one split, divided into train and validation by the hash of the document id."""

    def __init__(self, folder: str, share: float):
        """`folder` ends in NAME/CONFIG/VERSION, as TFDS lays data sets out."""
        *_, name, config, version = (path := as_path(folder)).parts
        super().__init__(
            tfds_name=f"{name}/{config}:{version}",
            tfds_data_dir=str(path.parent.parent.parent),
            splits=dict.fromkeys(SPLITS, "train"),
        )
        self._share = share

    def get_dataset(self, split: str, **kwargs) -> tf.data.Dataset:
        held_out = split == "validation"
        return (
            super()
            .get_dataset(split, **kwargs)
            .filter(lambda example: tf.equal(is_held_out(example["id"], self._share), held_out))
        )


def corpus_tasks(folders: Mapping[str, str], tokenizer: Tokenizer, share: float) -> dict[str, str]:
    """Registers a task per subset; {subset: task name}.

    Args:
      folders: MAP-CC data set folder of each subset.
      tokenizer: a SentencePiece tokenizer; SeqIO's vocabulary reads its file.
      share: part of the documents held out.

    Raises:
      UserError: the tokenizer is no SentencePiece model.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise UserError(f"{tokenizer.file}: pretraining stores need a SentencePiece .model")
    vocabulary = seqio.SentencePieceVocabulary(str(tokenizer.file))
    names = {}
    for subset, folder in folders.items():
        name = f"map_cc_{subset}"
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=HeldOutTfdsSource(folder, share),
            preprocessors=[
                _measure_text,
                functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text", "id": "id", "bytes": "bytes"}),
                functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
                functools.partial(_mark_ends, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id),
            ],
            output_features={"targets": seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32)},
            metric_fns=[],
        )
        names[subset] = name
    return names


@seqio.map_over_dataset
def _measure_text(example: dict) -> dict:
    return {**example, "bytes": tf.strings.length(example["text"], unit="BYTE")}


@seqio.map_over_dataset
def _mark_ends(example: dict, bos_id: int | None, eos_id: int) -> dict:
    """`<s>` text `</s>`: the end is inside the vocabulary, which the released model's was not."""
    start = [] if bos_id is None else [bos_id]
    targets = tf.concat([tf.constant(start, tf.int32), example["targets"], tf.constant([eos_id], tf.int32)], axis=0)
    return {**example, "targets": targets}


@dataclasses.dataclass(frozen=True)
class Records:
    """Instruction or preference records of some files: the usable ones, and why the others are not."""

    kept: list[dict]
    rejected: list[dict]  # {file, line, reason}


def read_records(files: Sequence[str], check: Callable[[dict], str | None]) -> Records:
    """Reads jsonl files line by line; what cannot be used is listed with its reason."""
    kept, rejected, seen = [], [], set()
    for file in files:
        for number, line in enumerate(as_path(file).read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
                reason = check(record) if isinstance(record, dict) else "not a JSON object"
            except UnicodeDecodeError:
                reason = "not UTF-8"
            except ValueError:
                reason = "not valid JSON"
            if reason is None:
                reason = _identify(record, f"{as_path(file).stem}:{number}", seen)
            if reason is None:
                seen.add(record["id"])
                kept.append(record)
            else:
                rejected.append({"file": str(file), "line": number, "reason": reason})
    return Records(kept, rejected)


def _identify(record: dict, default_id: str, seen: set[str]) -> str | None:
    """Makes the id a text and drops an empty language; what is wrong with them, or None."""
    if record.get("id") in (None, ""):
        record["id"] = default_id
    if not isinstance(record["id"], (str, int)) or isinstance(record["id"], bool):
        return "the id is neither text nor number"
    record["id"] = str(record["id"])
    if record.get("language") in (None, ""):
        record.pop("language", None)
    elif not isinstance(record["language"], str) or not _LANGUAGE.fullmatch(record["language"]):
        return "the language is not a word"
    return "the id was seen before" if record["id"] in seen else None


def check_chat(record: dict) -> str | None:
    """What is wrong with an instruction record {messages}, or None."""
    reason = check_messages(record.get("messages"))
    if reason is None and record["messages"][-1]["role"] != "assistant":
        reason = "the last message is not the assistant's"
    return reason


def check_preference(record: dict) -> str | None:
    """What is wrong with a preference record {prompt (messages), chosen, rejected}, or None."""
    reason = check_messages(record.get("prompt"))
    if reason:
        return f"prompt: {reason}"
    if record["prompt"][-1]["role"] != "user":
        return "the prompt does not end with the user's message"
    answers = record.get("chosen"), record.get("rejected")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        return "chosen or rejected is missing or empty"
    return "chosen and rejected are the same" if answers[0] == answers[1] else None


def chat_tasks(records: Sequence[dict], tokenizer: Tokenizer, share: float) -> dict[str, str]:
    """Registers a task per language of instruction records; {language: task name}. Feature `loss_mask` marks
    what is learned."""

    def example(record: dict) -> dict:
        ids, mask = render(record["messages"], tokenizer)
        text_bytes = sum(len(message["content"].encode()) for message in record["messages"])
        return {"targets": ids, "loss_mask": mask, "bytes": text_bytes}

    return _record_tasks("chat", records, example, ("targets", "loss_mask"), tokenizer, share)


def preference_tasks(records: Sequence[dict], tokenizer: Tokenizer, share: float) -> dict[str, str]:
    """Registers a task per language of preference records; {language: task name}. Features `chosen`, `rejected`
    and a mask for each."""

    def example(record: dict) -> dict:
        features = {}
        for side in ("chosen", "rejected"):
            answer = {"role": "assistant", "content": record[side]}
            # The prompt's own answers, if it has several turns, are given, not learned.
            given = len(render(record["prompt"], tokenizer)[0])
            ids, mask = render([*record["prompt"], answer], tokenizer)
            features |= {side: ids, f"{side}_mask": [0] * given + mask[given:]}
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
    for piece in CHAT_PIECES:
        marker(tokenizer, piece)  # a vocabulary without chat markers is refused here, not deep inside a worker
    names = {}
    for language in sorted({record.get("language", kind) for record in records}):
        chosen = [record for record in records if record.get("language", kind) == language]

        def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None, chosen=chosen) -> tf.data.Dataset:
            del shuffle_files, seed  # read in file order; the store and the reader shuffle
            signature = {name: tf.TensorSpec([None], tf.int32) for name in features}
            signature |= {"id": tf.TensorSpec([], tf.string), "bytes": tf.TensorSpec([], tf.int32)}

            def generate():
                for record in chosen:
                    yield {**example(record), "id": record["id"]}

            dataset = tf.data.Dataset.from_generator(generate, output_signature=signature)
            held_out = split == "validation"
            return dataset.filter(lambda e: tf.equal(is_held_out(e["id"], share), held_out))

        name = f"{kind}_{language.replace('-', '.')}"  # SeqIO's names know no hyphen
        vocabulary = seqio.PassThroughVocabulary(tokenizer.vocab_size, eos_id=tokenizer.eos_id)
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(dataset_fn, splits=SPLITS),
            preprocessors=[],
            output_features={f: seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32) for f in features},
            metric_fns=[],
        )
        names[language] = name
    return names
