"""Every value that the filters measured, in columns: a Parquet file for each shard and subset, part of the corpus.

Columns: id; line of the input file, whose path is in the schema's metadata; failed, the rules that the document broke,
joined by commas; language; and a number for each measure, for language_score and for quality_score. Whoever asks for
shares, histograms or one document's values reads the columns that it needs and no text.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import atomic_file
from data_pipeline.documents import SUBSETS, Document
from data_pipeline.filters import quality
from data_pipeline.filters.measures import family, names
from data_pipeline.filters.rules import Verdict
from data_pipeline.shards import SIGNALS, Layout

TEXTS = ("id", "failed", "language")
_ROWS = 1 << 13  # documents of a row group
_LINEAR, _DECADE = 100, 20  # bins of a histogram between 0 and 1, and for each power of ten above


def columns(subset: str) -> tuple[str, ...]:
    """Names of a subset's numbers."""
    return (*names(family(subset)), "language_score", quality.RULE)


class SignalWriter:
    """Writes a shard's signals as its documents are judged; the files are there when `stack` has ended well.

    Attributes:
      histograms: {subset: {number: {bin: documents}}}; `bin_edge` says where a bin begins.
    """

    def __init__(self, file: str, shard: int, layout: Layout, stack: contextlib.ExitStack):
        self._file, self._shard, self._layout, self._stack = file, shard, layout, stack
        self._writers: dict[str, _Subset] = {}
        self.histograms: dict[str, dict[str, Counter]] = {}

    def append(self, judged: Sequence[tuple[Document, Verdict]]) -> None:
        """Adds documents with their verdicts."""
        for document, verdict in judged:
            self._of(document.source).append(document, verdict)

    def _of(self, subset: str) -> "_Subset":
        if subset not in self._writers:
            path = self._stack.enter_context(atomic_file(self._layout.signals(self._shard, subset)))
            schema = pa.schema(
                [(name, pa.string()) for name in TEXTS]
                + [("line", pa.int64())]
                + [(name, pa.float64()) for name in columns(subset)],
                metadata={"file": self._file},
            )
            writer = self._stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd"))
            self._writers[subset] = _Subset(schema, writer, self.histograms.setdefault(subset, {}))
            self._stack.callback(self._writers[subset].flush)
        return self._writers[subset]


@dataclasses.dataclass
class _Subset:
    """The open file of one subset, and the rows that it waits for."""

    schema: pa.Schema
    writer: pq.ParquetWriter
    histograms: dict[str, Counter]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def append(self, document: Document, verdict: Verdict) -> None:
        if unknown := verdict.signals.keys() - set(self.schema.names):
            raise AssertionError(f"signals that no column is for: {', '.join(sorted(unknown))}")
        failed = ",".join(reason["rule"] for reason in verdict.reasons)
        self.rows.append({**verdict.signals, "id": document.id, "line": document.line, "failed": failed})
        if len(self.rows) >= _ROWS:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        table = pa.Table.from_pylist(self.rows, self.schema)
        self.writer.write_table(table)
        for name in self.schema.names:
            if self.schema.field(name).type == pa.float64():
                values = table[name].drop_null().to_numpy()
                self.histograms.setdefault(name, Counter()).update(histogram(values))
        self.rows.clear()


def histogram(values: np.ndarray) -> dict[str, int]:
    """{bin: how many}; bins are numbers as text, as JSON has them."""
    above = np.floor(np.log10(np.maximum(values, 1)) * _DECADE + 1e-9) + _LINEAR
    bins, counts = np.unique(np.where(values < 1, np.floor(values * _LINEAR + 1e-9), above), return_counts=True)
    return dict(zip((str(int(number)) for number in bins), counts.tolist(), strict=True))


def bin_edge(number: float) -> float:
    """Where a bin begins: hundredths up to 1, then twenty bins for each power of ten."""
    return number / _LINEAR if number <= _LINEAR else 10 ** ((number - _LINEAR) / _DECADE)


def bin_of(value: float) -> float:
    """Where a value lies on the scale of the bins; the inverse of `bin_edge`."""
    return value * _LINEAR if value <= 1 else _LINEAR + _DECADE * math.log10(value)


def read_columns(path: Any, wanted: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Some columns of a file, a row group at a time: numbers as arrays (NaN where there is none), texts as lists."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=list(wanted), batch_size=_ROWS):
            yield {
                name: column.to_pylist() if name in TEXTS else column.to_numpy(zero_copy_only=False)
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }


def signal_files(corpus: str) -> dict[str, list[pathlib.Path]]:
    """{subset: its files in the order of the shards} of a corpus.

    Raises:
      UserError: the corpus was made before signals were kept.
    """
    found = sorted(pathlib.Path(corpus, SIGNALS).glob("*.parquet"))
    if not found:
        raise UserError(f"{corpus}: holds no signals; it was made by an earlier version, build it again")
    subsets: dict[str, list[pathlib.Path]] = {}
    for path in found:
        subsets.setdefault(path.name.split(".")[1], []).append(path)
    return {subset: subsets[subset] for subset in SUBSETS if subset in subsets}


def input_path(path: pathlib.Path) -> str:
    """The input file whose documents' signals a file has."""
    return pq.read_schema(path).metadata[b"file"].decode()


def rows_of(path: pathlib.Path, identity: str) -> Iterator[dict[str, Any]]:
    """All columns of the documents with an id; other columns are read only where there is one."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            places = pc.indices_nonzero(pc.equal(file.read_row_group(group, columns=["id"])["id"], identity))
            if len(places):
                yield from file.read_row_group(group).take(places).to_pylist()
