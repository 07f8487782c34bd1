"""SeqIO tasks over a finished token store, for trainers that read SeqIO (T5X, or one's own).

A row of the store is read in either of two ways:

packed      one example a row, with the features that `seqio.LMFeatureConverter(pack=True)` gives; converted by
            `seqio.PrePackedLMFeatureConverter()`. How they answer to what `ctllm_jax.data.batches` reads of the row
            (documents masked from each other), at place i:

                decoder_target_tokens[i]  =  tokens[i]
                decoder_segment_ids[i]    =  segments[i]
                decoder_positions[i]      =  positions[i]
                decoder_input_tokens[i]   =  tokens[i - 1], and 0 where a segment or the padding begins
                decoder_loss_weights[i]   =  weights[i - 1], and 0 where i = 0

            The loss is of the same tokens. SeqIO shows a model the token before the one to predict, and 0 before a
            segment's first; our trainer shows a segment from its first token on. SeqIO's converter would also give
            weight to each segment's first token (`<s>`, or the token that a cut document repeats) and none to id 0.

segments    one example a segment, a document or a piece of one that was cut, for any converter of `targets`.

Rows come in the order of the store, or shuffled as SeqIO shuffles files: shards, then a buffer of examples.
"""

import functools
import os
from collections.abc import Iterator, Mapping

import seqio
import tensorflow as tf

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.record import Row
from ctllm_jax.data.store import TokenStore, open_store
from data_pipeline.tasks import SPLITS
from data_pipeline.vocabulary import vocabulary

PACKED_FEATURES = seqio.PrePackedLMFeatureConverter.BATCH_FEATURES
_READ_TOGETHER = 64  # rows
_SHARDS_TOGETHER = 16  # that are read by turns when shuffled, as in seqio.FileDataSource
_ROW = {
    "tokens": tf.TensorSpec([None], tf.int32),
    "mask": tf.TensorSpec([None], tf.int32),
    "lengths": tf.TensorSpec([None], tf.int64),
    "ids": tf.TensorSpec([None], tf.string),
    "starts": tf.TensorSpec([None], tf.int64),
}


class StoreSource(seqio.DataSource):
    """Rows of one source of a token store: tokens, mask [tokens]; lengths, ids, starts [segments].

    Its shards are the store's. SeqIO divides by examples where more shards are asked for.
    """

    def __init__(self, store: TokenStore, source: str):
        sizes = {split: store.size(split, source) for split in SPLITS if source in store.sources(split)}
        super().__init__(splits=sizes, num_input_examples=sizes)
        self._store, self._source = store, source

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [entry["file"] for entry in self._shards(split)]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_,
    ) -> tf.data.Dataset:
        shards = tf.data.Dataset.range(len(self._shards(split)))
        if shard_info:
            shards = shards.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            shards = shards.shuffle(len(self._shards(split)), seed)

        def rows(shard: tf.Tensor) -> tf.data.Dataset:
            read = functools.partial(self._rows, split)
            return tf.data.Dataset.from_generator(read, output_signature=_ROW, args=(shard,))

        return shards.interleave(rows, cycle_length=_SHARDS_TOGETHER if shuffle else 1)

    def _shards(self, split: str) -> list[dict]:
        return self._store.info["splits"][split][self._source]["shards"]

    def _rows(self, split: str, shard: int) -> Iterator[dict]:
        sizes = [entry["rows"] for entry in self._shards(split)]
        first = sum(sizes[:shard])
        indices = range(first, first + sizes[shard])
        for start in indices[::_READ_TOGETHER]:
            together = range(start, min(start + _READ_TOGETHER, indices.stop))
            yield from map(_fields, self._store.read(split, self._source, together))


def store_tasks(folder: str | os.PathLike, packed: bool, prefix: str = "store") -> dict[str, str]:
    """Registers a task for each source of a store; {source: task name}, PREFIX_rows_SOURCE or PREFIX_segments_SOURCE.

    Examples, with L tokens of a row and n of a segment:
      packed: PACKED_FEATURES, int32 [L].
      otherwise: targets, loss_mask int32 [n]; id and start (place of the first token in its document), scalars.

    Raises:
      UserError: the store is missing, unfinished, of another format, or one of preferences, which are pairs of
        sequences and no rows of text.
    """
    store = open_store(folder)
    if store.kind == "preference":
        raise UserError(f"{folder}: a store of preferences; `chat_tasks.preference_tasks` gives the pairs to SeqIO")
    ids = seqio.Feature(vocabulary(store.tokenizer), add_eos=False, dtype=tf.int32)
    names = {}
    for source in sorted({source for split in SPLITS for source in store.sources(split)}):
        name = f"{prefix}_{'rows' if packed else 'segments'}_{source.replace('-', '.')}"  # SeqIO knows no hyphen
        prepare = functools.partial(pack_row, length=store.sequence_length) if packed else split_rows
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=StoreSource(store, source),
            preprocessors=[prepare],
            # T5X takes the vocabulary from whichever feature comes first: they all have it.
            output_features=dict.fromkeys(PACKED_FEATURES if packed else ["targets"], ids),
            metric_fns=[],
        )
        names[source] = name
    return names


def pack_row(
    dataset: tf.data.Dataset, length: int, sequence_length: Mapping[str, int] | None = None
) -> tf.data.Dataset:
    """Rows to PACKED_FEATURES, padded with 0 to `length`; UserError if SeqIO asks for targets of another length."""
    asked = (sequence_length or {}).get("targets", length)
    if asked != length:
        raise UserError(f"the store's rows have {length} tokens, task_feature_lengths asks for targets of {asked}")

    def pack(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        segments = tf.repeat(tf.range(1, tf.size(row["lengths"]) + 1), row["lengths"])
        positions = tf.cast(tf.ragged.range(row["lengths"]).values, tf.int32)
        features = {
            "decoder_target_tokens": row["tokens"],
            "decoder_input_tokens": seqio.utils.make_autoregressive_inputs(row["tokens"], sequence_id=segments),
            "decoder_loss_weights": row["mask"] * tf.cast(positions > 0, tf.int32),
            "decoder_segment_ids": segments,
            "decoder_positions": positions,
        }
        padding = [[0, length - tf.size(row["tokens"])]]
        return {name: tf.ensure_shape(tf.pad(values, padding), [length]) for name, values in features.items()}

    return dataset.map(pack, num_parallel_calls=tf.data.AUTOTUNE)


def split_rows(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Rows to one example a segment, in order."""

    def split(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        def parts(values: tf.Tensor) -> tf.RaggedTensor:
            return tf.RaggedTensor.from_row_lengths(values, row["lengths"])

        return {
            "targets": parts(row["tokens"]),
            "loss_mask": parts(row["mask"]),
            "id": row["ids"],
            "start": row["starts"],
        }

    return dataset.map(split, num_parallel_calls=tf.data.AUTOTUNE).unbatch()


def _fields(row: Row) -> dict:
    return {
        "tokens": row.tokens,
        "mask": [1] * len(row.tokens) if row.mask is None else row.mask.astype("int32"),
        "lengths": row.lengths,
        "ids": row.ids,
        "starts": row.starts or [0] * len(row.lengths),
    }
