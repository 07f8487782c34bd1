"""The token store's record and manifest: written by `data_pipeline`, read by training. No JAX here.

A store is a stage folder (`ctllm_jax.common.manifest`):

    manifest.json            result: format, kind, sequence_length, tokenizer, splits -> source -> shards and counts
    tokenizer/               the tokenizer that made it
    <split>-<source>-00000-of-00004.array_record

Record: msgpack of {tokens: uint32 little-endian bytes, lengths, ids, mask (bytes) or None, bytes}. Kinds: "pretrain"
and "chat" rows are packed documents; a "preference" row holds exactly two segments, chosen and rejected.

Legend: L tokens of a row before padding.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Iterator, Sequence

import msgpack
import numpy as np

FORMAT = 1
KINDS = ("pretrain", "chat", "preference")


@dataclasses.dataclass(frozen=True)
class Row:
    """One packed sequence, unpadded.

    Attributes:
      tokens: int32 [L], the segments one after the other.
      lengths: tokens of each segment; they add up to L.
      ids: document id of each segment.
      mask: uint8 [L], 1 where the token is learned; None where all are.
      bytes: UTF-8 bytes of text that the tokens stand for (special tokens none).
    """

    tokens: np.ndarray
    lengths: Sequence[int]
    ids: Sequence[str]
    mask: np.ndarray | None
    bytes: int


def encode_row(row: Row) -> bytes:
    """Record bytes of a row; equal rows give equal bytes."""
    return msgpack.packb(
        {
            "tokens": row.tokens.astype("<u4").tobytes(),
            "lengths": [int(n) for n in row.lengths],
            "ids": list(row.ids),
            "mask": None if row.mask is None else row.mask.astype(np.uint8).tobytes(),
            "bytes": int(row.bytes),
        }
    )


def decode_row(record: bytes) -> Row:
    """The row of record bytes."""
    fields = msgpack.unpackb(record)
    mask = fields["mask"]
    return Row(
        tokens=np.frombuffer(fields["tokens"], "<u4").astype(np.int32),
        lengths=fields["lengths"],
        ids=fields["ids"],
        mask=None if mask is None else np.frombuffer(mask, np.uint8),
        bytes=fields["bytes"],
    )


def shard_name(split: str, source: str, index: int, count: int) -> str:
    """File name of a shard."""
    return f"{split}-{source}-{index:05d}-of-{count:05d}.array_record"


def write_shard(path: pathlib.Path, rows: Iterator[Row] | Sequence[Row]) -> None:
    """Writes an ArrayRecord shard that can be read row by row. The caller renames it into place."""
    module = importlib.import_module("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(encode_row(row))
    writer.close()
