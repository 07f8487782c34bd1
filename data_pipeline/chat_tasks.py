"""SeqIO tasks of instruction and preference records: one per language, through the chat template."""

from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf

from ctllm_jax.data.chat import marker, render
from ctllm_jax.data.tokenizer import CHAT_PIECES, Tokenizer
from data_pipeline.splits import is_held_out
from data_pipeline.tasks import SPLITS


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
