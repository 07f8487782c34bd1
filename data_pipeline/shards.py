"""Names and formats of the files that the stages of `ctllm corpus` hand to one another.

Every input file is one shard. All files are written under another name and renamed; a shard's `counts` are
written last, so their presence means that the shard is whole.
"""

import contextlib
import dataclasses
import gzip
import io
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import orjson

from ctllm_jax.common.files import atomic_file

STEPS = ("id", "exact", "near")  # of deduplication, in order: each sees only what the ones before left
REMOVAL = np.dtype([("row", "<u4"), ("of_shard", "<u4"), ("of_row", "<u4"), ("similarity", "<f4")])


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things lie below a work folder. Rows count a shard's kept documents from 0, over all subsets."""

    root: str

    def kept(self, shard: int, subset: str) -> pathlib.Path:
        """Documents of one subset that passed the filters, with `row`."""
        return self._work("filtered") / f"{shard:05d}.{subset}.kept.jsonl.gz"

    def kept_files(self, shard: int) -> list[pathlib.Path]:
        """A shard's `kept` files, of all subsets that have any."""
        return sorted(self._work("filtered").glob(f"{shard:05d}.*.kept.jsonl.gz"))

    def hashes(self, shard: int) -> pathlib.Path:
        """npz by row: id_hash, text_hash [n, 2] (128 bits each), hashed [n], ids (UTF-8), id_ends [n]."""
        return self._work("filtered") / f"{shard:05d}.npz"

    def signatures(self, shard: int) -> pathlib.Path:
        """npy [n, bands * rows] uint32 by row: MinHash signatures, read by memory map."""
        return self._work("filtered") / f"{shard:05d}.signatures.npy"

    def counts(self, shard: int) -> pathlib.Path:
        """What the filters did to a shard; written last."""
        return self._work("filtered") / f"{shard:05d}.json"

    def progress(self, shard: int) -> pathlib.Path:
        """Records read so far; only for the progress display."""
        return self._work("filtered") / f"{shard:05d}.progress"

    def records_read(self, shard: int) -> int:
        """What `progress` says; 0 before a shard is begun or while the file is being written."""
        try:
            return int(self.progress(shard).read_text() or 0)
        except FileNotFoundError:
            return 0

    def removals(self, step: str, shard: int) -> pathlib.Path:
        """npy of REMOVAL sorted by row: what a step of deduplication removes from a shard."""
        return self._work(step) / f"{shard:05d}.npy"

    def outcome(self, shard: int) -> pathlib.Path:
        """What deduplication did to a shard; written last."""
        return self._work("deduplicated") / f"{shard:05d}.json"

    def rejected(self, shard: int, stage: str) -> pathlib.Path:
        """Rejected documents with their reasons; `stage` is 'filter' or 'dedup'. Part of the result."""
        return pathlib.Path(self.root) / "rejected" / f"{shard:05d}.{stage}.jsonl.gz"

    def report(self, ending: str) -> pathlib.Path:
        """report.json or report.html. Part of the result."""
        return pathlib.Path(self.root) / f"report.{ending}"

    @property
    def map_cc(self) -> pathlib.Path:
        """The TFDS dataset, a folder per subset. Part of the result."""
        return pathlib.Path(self.root) / "map_cc"

    @property
    def work(self) -> pathlib.Path:
        """Everything that is deleted once the stage is finished."""
        return pathlib.Path(self.root) / "work"

    def _work(self, name: str) -> pathlib.Path:
        return self.work / name


@contextlib.contextmanager
def gzip_writer(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A gzip file whose bytes depend on its content alone (no time, no name), whole or not there."""
    with atomic_file(path) as temporary, open(temporary, "wb") as raw:
        with gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=raw, mtime=0) as packed:
            with io.BufferedWriter(packed, 1 << 18) as writer:
                yield writer


def json_line(record: dict[str, Any]) -> bytes:
    """One line of JSON."""
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The records of a file made by `gzip_writer` and `json_line`."""
    with gzip.open(path, "rb") as file:
        for line in file:
            yield orjson.loads(line)


def save_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes an npy file, whole or not there."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def save_arrays(path: pathlib.Path, **arrays: np.ndarray) -> None:
    """Writes an npz file (bytes depend on the arrays alone), whole or not there."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
