"""SeqIO tasks of documents: what a subset is, from its files to token ids.

Examples carry, beside the output features, the id of the document and its UTF-8 bytes, so that whatever is made of
them can be traced and measured. The Beam job of `token_store` evaluates them; they work with `seqio.get_dataset` like
any other task.

Reading, holding out and encoding work on batches inside: element by element, tf.data's own steps cost more than the
tokens do.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from ctllm_jax.common.files import as_path
from ctllm_jax.data.tokenizer import Tokenizer
from data_pipeline.splits import is_held_out
from data_pipeline.vocabulary import vocabulary

SPLITS = ("train", "validation")
BATCH = 256  # documents handled at once


class HeldOutTfdsSource(seqio.TfdsDataSource):
    """`id` and `text` of a TFDS data set in TFRecord, divided into train and validation by the hash of the id.

    The data set has one split. ShardInfo may name any number of shards: they are runs of documents, equal to within
    one before the division, and each reads its own files only. Beyond one shard a document some are empty.
    """

    def __init__(self, folder: str, share: float):
        """`folder` ends in NAME/CONFIG/VERSION, as TFDS lays data sets out."""
        *_, name, config, version = (path := as_path(folder)).parts
        super().__init__(
            tfds_name=f"{name}/{config}:{version}",
            tfds_data_dir=str(path.parent.parent.parent),
            splits=dict.fromkeys(SPLITS, "train"),
        )
        self._folder, self._share = folder, share

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def get_dataset(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_,
    ) -> tf.data.Dataset:
        shard = shard_info or seqio.ShardInfo(0, 1)
        part = tfds.even_splits("train", shard.num_shards)[shard.index]
        # Read here, for SeqIO goes by what it has read of an earlier corpus in the same folder.
        info = tfds.builder_from_directory(self._folder).info
        pieces = info.splits[part].file_instructions
        files = tf.data.Dataset.from_tensor_slices(
            (
                tf.constant([str(piece.filename) for piece in pieces], tf.string),
                tf.constant([piece.skip for piece in pieces], tf.int64),
                tf.constant([piece.take for piece in pieces], tf.int64),
            )
        )
        if shuffle and pieces:
            files = files.shuffle(len(pieces), seed)
        records = files.flat_map(lambda file, skip, take: tf.data.TFRecordDataset(file).skip(skip).take(take))
        features = {name: tf.io.FixedLenFeature([], tf.string) for name in ("id", "text")}

        def read(batch: tf.Tensor) -> dict[str, tf.Tensor]:
            examples = tf.io.parse_example(batch, features)
            chosen = tf.equal(is_held_out(examples["id"], self._share), split == "validation")
            return {name: tf.boolean_mask(values, chosen) for name, values in examples.items()}

        return records.batch(BATCH).map(read).unbatch()


def corpus_tasks(folders: Mapping[str, str], tokenizer: Tokenizer, share: float) -> dict[str, str]:
    """Registers a task per subset; {subset: task name}.

    Examples: targets int32 [tokens], `<s>` text `</s>`; id and bytes, scalars.

    Args:
      folders: MAP-CC data set folder of each subset.
      tokenizer: any of ours.
      share: part of the documents held out.
    """
    names = {}
    for subset, folder in folders.items():
        name = f"map_cc_{subset}"
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=HeldOutTfdsSource(folder, share),
            preprocessors=[functools.partial(tokenize_documents, tokenizer=tokenizer)],
            output_features={"targets": seqio.Feature(vocabulary(tokenizer), add_eos=False, dtype=tf.int32)},
            metric_fns=[],
        )
        names[subset] = name
    return names


def tokenize_documents(dataset: tf.data.Dataset, tokenizer: Tokenizer) -> tf.data.Dataset:
    """{id, text} to {id, bytes, targets}: the ids of the text between start and end of document.

    The end is inside the vocabulary, which the released model's was not. Texts of any length are encoded whole, since
    ids could change at a cut; SentencePiece's time per byte grows slowly with the length.
    """
    start = np.array(tokenizer.start_ids, np.int32)
    end = np.array([tokenizer.eos_id], np.int32)

    def flat(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        documents = tokenizer.encode_arrays([text.decode() for text in texts])
        lengths = np.array([len(start) + len(ids) + len(end) for ids in documents], np.int64)
        return np.concatenate([part for ids in documents for part in (start, ids, end)]), lengths

    def tokenize(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        values, lengths = tf.numpy_function(flat, [batch["text"]], [tf.int32, tf.int64], stateful=False)
        values, lengths = tf.ensure_shape(values, [None]), tf.ensure_shape(lengths, [None])
        return {
            "id": batch["id"],
            "bytes": tf.strings.length(batch["text"], unit="BYTE"),
            "targets": tf.RaggedTensor.from_row_lengths(values, lengths, validate=False),
        }

    return dataset.batch(BATCH).map(tokenize).unbatch()
