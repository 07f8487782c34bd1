"""SeqIO tasks of documents: what a subset is, from its files to token ids.

Examples carry, beside the output features, the id of the document and its UTF-8 bytes, so that whatever is made of
them can be traced and measured. The Beam job of `token_store` evaluates them; they work with `seqio.get_dataset` like
any other task.
"""

import functools
from collections.abc import Mapping

import seqio
import tensorflow as tf

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path
from ctllm_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer
from data_pipeline.splits import is_held_out

SPLITS = ("train", "validation")


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
