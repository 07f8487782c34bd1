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
import zstandard

from ctllm_jax.common.files import atomic_file

HASHES = "hashes"  # folder of a corpus's hashes, for comparing a later one with it
SIGNALS = "signals"  # folder of what the filters measured
HITS = "hits.jsonl"  # items of benchmarks that documents hold
STEPS = ("id", "exact", "near")  # of deduplication, in order: each sees only what the ones before left
DUPLICATES = tuple(f"duplicate_{step}" for step in STEPS)  # why documents were left out, as counts and reports name it
CONTAMINATED = "contaminated"  # the same of documents that hold items of benchmarks
REMOVAL = np.dtype([("row", "<u4"), ("of_shard", "<u4"), ("of_row", "<u4"), ("similarity", "<f4")])


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things lie below a work folder. Rows count a shard's kept documents from 0, over all subsets."""

    root: str

    def kept(self, shard: int, subset: str) -> pathlib.Path:
        """Documents of one subset that passed the filters, with `row`."""
        return self._work("filtered") / f"{shard:05d}.{subset}.kept.jsonl.zst"

    def kept_files(self, shard: int) -> list[pathlib.Path]:
        """A shard's `kept` files, of all subsets that have any."""
        return sorted(self._work("filtered").glob(f"{shard:05d}.*.kept.jsonl.zst"))

    def all_hashes(self, shard: int) -> pathlib.Path:
        """Hashes of a shard's kept documents by row (the stem of dedup.store's files)."""
        return self._work("filtered") / f"{shard:05d}"

    def hashes(self, shard: int) -> pathlib.Path:
        """Hashes of a shard's documents that deduplication left, in their order. Part of the result."""
        return pathlib.Path(self.root) / HASHES / f"{shard:05d}"

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

    def exchange(self, step: str, name: str) -> pathlib.Path:
        """Folder of numbers on their way between the workers of a step."""
        return self._work(step) / name

    def survivors(self, shard: int, subset: str) -> pathlib.Path:
        """Documents of one subset that deduplication left."""
        return self._work("deduplicated") / f"{shard:05d}.{subset}.jsonl.zst"

    def outcome(self, shard: int) -> pathlib.Path:
        """What deduplication did to a shard; written last."""
        return self._work("deduplicated") / f"{shard:05d}.json"

    def clean(self, shard: int, subset: str) -> pathlib.Path:
        """Survivors of one subset that hold no item of a benchmark; there where benchmarks were looked for."""
        return self._work("clean") / f"{shard:05d}.{subset}.jsonl.zst"

    def written(self, shard: int, subset: str) -> pathlib.Path:
        """Documents of one subset that go into MAP-CC."""
        clean = self.clean(shard, subset)
        return clean if clean.exists() else self.survivors(shard, subset)

    def cleaned(self, shard: int) -> pathlib.Path:
        """What the search for benchmarks did to a shard; written last."""
        return self._work("clean") / f"{shard:05d}.json"

    def hits(self, shard: int) -> pathlib.Path:
        """A shard's part of HITS."""
        return self._work("clean") / f"{shard:05d}.hits.jsonl"

    def rejected(self, shard: int, stage: str) -> pathlib.Path:
        """What was rejected, with reasons: by 'filter', 'dedup', 'benchmarks', or as similar 'lines'. Part of the
        result."""
        return pathlib.Path(self.root) / "rejected" / f"{shard:05d}.{stage}.jsonl.gz"

    def signals(self, shard: int, subset: str) -> pathlib.Path:
        """What the filters measured of a shard's documents of a subset, in columns (signals.py). Part of the result."""
        return pathlib.Path(self.root) / SIGNALS / f"{shard:05d}.{subset}.parquet"

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
        with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0) as packed:
            with io.BufferedWriter(packed, 1 << 18) as writer:
                yield writer


@contextlib.contextmanager
def zstd_writer(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A zstd file, whole or not there: a seventh of gzip's time, for what is read again and deleted."""
    with atomic_file(path) as temporary, open(temporary, "wb") as raw:
        with zstandard.ZstdCompressor(level=1).stream_writer(raw, closefd=False) as packed:
            with io.BufferedWriter(packed, 1 << 18) as writer:
                yield writer


def json_line(record: dict[str, Any]) -> bytes:
    """One line of JSON."""
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The records of a file made by `zstd_writer` and `json_line`."""
    with zstandard.open(path, "rb") as packed, io.BufferedReader(packed, 1 << 18) as lines:
        for line in lines:
            yield orjson.loads(line)


def save_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes an npy file, whole or not there."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


@contextlib.contextmanager
def save_bytes(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A plain binary file, whole or not there."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        yield file
