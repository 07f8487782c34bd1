"""Hashes of documents on disk: three files with one stem, written as they come and read by memory map.

    STEM.hashes       an array of RECORD, a document each
    STEM.signatures   [documents, permutations] uint32
    STEM.ids          all ids, UTF-8, one after the other

A corpus keeps those of its documents, so that a later one can be compared with it.
"""

import contextlib
import dataclasses
import pathlib
from types import TracebackType
from typing import Self

import numpy as np

from ctllm_jax.common.files import atomic_file

# id_end: where the id ends in STEM.ids; hashed: whether the text has a shingle, and so a signature
RECORD = np.dtype([("id", "<u8", 2), ("text", "<u8", 2), ("id_end", "<i8"), ("hashed", "?")])
_PARTS = ("hashes", "signatures", "ids")


@dataclasses.dataclass(frozen=True)
class Hashes:
    """Hashes of N documents in their order.

    records: [N] RECORD; signatures: [N, P] uint32; ids: their UTF-8, one after the other.
    """

    records: np.ndarray
    signatures: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    def id(self, row: int) -> str:
        """One document's id."""
        begin = self.records["id_end"][row - 1] if row else 0
        return self.ids[begin : self.records["id_end"][row]].tobytes().decode()

    def select(self, rows: np.ndarray) -> "Hashes":
        """Some of the documents, in ascending order."""
        sizes = np.diff(self.records["id_end"], prepend=0)
        selected = np.zeros(len(self), bool)
        selected[rows] = True
        records = self.records[rows]
        records["id_end"] = np.cumsum(sizes[rows])
        return Hashes(records, self.signatures[rows], self.ids[np.repeat(selected, sizes)])

    def part(self, begin: int, end: int) -> "Hashes":
        """Documents begin ... end - 1, without reading the others."""
        first = int(self.records["id_end"][begin - 1]) if begin else 0
        records = self.records[begin:end].copy()
        last = int(records["id_end"][-1]) if len(records) else first
        records["id_end"] -= first
        return Hashes(records, self.signatures[begin:end], self.ids[first:last])


class HashWriter:
    """Appends batches of hashes to files that are there when the block has ended well, and not before."""

    def __init__(self, stem: pathlib.Path):
        self._stem, self._stack, self._written = stem, contextlib.ExitStack(), 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._files = {
                part: stack.enter_context(open(stack.enter_context(atomic_file(_file(self._stem, part))), "wb"))
                for part in _PARTS
            }
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def append(self, hashes: Hashes) -> None:
        """Writes a batch; its ids go behind those before."""
        records = hashes.records.copy()
        records["id_end"] += self._written
        self._written = int(records["id_end"][-1]) if len(records) else self._written
        self._files["hashes"].write(records.tobytes())
        self._files["signatures"].write(np.ascontiguousarray(hashes.signatures).tobytes())
        self._files["ids"].write(hashes.ids.tobytes())


def open_hashes(stem: pathlib.Path) -> Hashes:
    """The hashes of a stem, mapped into memory.

    Pages that were read count as the process's memory while the mapping lives: who goes through a whole shard opens it
    anew for each chunk.
    """
    records = _mapped(_file(stem, "hashes"), RECORD)
    signatures = _mapped(_file(stem, "signatures"), np.dtype("<u4"))
    width = len(signatures) // max(len(records), 1)
    return Hashes(records, signatures.reshape(len(records), width), _mapped(_file(stem, "ids"), np.dtype("u1")))


def _file(stem: pathlib.Path, part: str) -> pathlib.Path:
    return stem.with_name(f"{stem.name}.{part}")


def _mapped(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
