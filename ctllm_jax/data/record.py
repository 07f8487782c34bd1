"""The token store's record and manifest: written by `data_pipeline`, read by training. No JAX here.

A store is a stage folder (`ctllm_jax.common.manifest`):

    manifest.json            result: format, kind, sequence_length, tokenizer, splits -> source -> shards and counts
    tokenizer/               the tokenizer that made it
    <split>-<source>-00000-of-00004.array_record
    <split>-<source>-00000-of-00004.ids.npy         which rows of the shard hold which document (see `write_ids`)

Record: msgpack of {tokens: int32 little-endian bytes, lengths, ids, starts, mask (bytes) or None, bytes}. Kinds:
"pretrain" and "chat" rows are packed documents; a "preference" row holds exactly two segments, chosen and rejected.

Legend: L tokens of a row before padding.
"""

import dataclasses
import hashlib
import importlib
import pathlib
from collections.abc import Iterable, Sequence

import msgpack
import numpy as np

FORMAT = 2
KINDS = ("pretrain", "chat", "preference")
ID_ENTRY = np.dtype([("hash", "<u8"), ("row", "<u4")])


@dataclasses.dataclass(frozen=True)
class Row:
    """One packed sequence, unpadded.

    Attributes:
      tokens: int32 [L], the segments one after the other.
      lengths: tokens of each segment; they add up to L.
      ids: document id of each segment.
      mask: uint8 [L], 1 where the token is learned; None where all are.
      bytes: UTF-8 bytes of text that the tokens stand for (special tokens none).
      starts: place of each segment's first token within its document; empty where all are 0.
      reference: of a pair, the answers' log-probabilities under a reference; not part of the record, see
        `ctllm_jax.reference`.
    """

    tokens: np.ndarray
    lengths: Sequence[int]
    ids: Sequence[str]
    mask: np.ndarray | None
    bytes: int
    starts: Sequence[int] = ()
    reference: Sequence[float] = (0.0, 0.0)


def encode_row(row: Row) -> bytes:
    """Record bytes of a row; equal rows give equal bytes."""
    return msgpack.packb(
        {
            "tokens": row.tokens.astype("<i4").tobytes(),
            "lengths": [int(n) for n in row.lengths],
            "ids": list(row.ids),
            "starts": [int(n) for n in row.starts],
            "mask": None if row.mask is None else row.mask.astype(np.uint8).tobytes(),
            "bytes": int(row.bytes),
        }
    )


def decode_row(record: bytes) -> Row:
    """The row of record bytes."""
    fields = msgpack.unpackb(record)
    mask = fields["mask"]
    return Row(
        tokens=np.frombuffer(fields["tokens"], "<i4"),
        lengths=fields["lengths"],
        ids=fields["ids"],
        mask=None if mask is None else np.frombuffer(mask, np.uint8),
        bytes=fields["bytes"],
        starts=fields["starts"],
    )


def shard_name(split: str, source: str, index: int, count: int) -> str:
    """File name of a shard."""
    return f"{split}-{source}-{index:05d}-of-{count:05d}.array_record"


def write_shard(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Writes an ArrayRecord shard that can be read row by row. The caller renames it into place."""
    module = importlib.import_module("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(encode_row(row))
    writer.close()


def ids_name(shard: str) -> str:
    """File name of the id index of the shard of that name."""
    return shard.removesuffix(".array_record") + ".ids.npy"


def id_hash(document_id: str) -> int:
    """64-bit hash of a document id."""
    return int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "little")


def write_ids(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Writes a shard's id index: ID_ENTRY (hash of the id, row within the shard), sorted, each pair once."""
    pairs = {(id_hash(name), number) for number, row in enumerate(rows) for name in row.ids}
    with open(path, "wb") as file:
        np.save(file, np.array(sorted(pairs), ID_ENTRY), allow_pickle=False)
