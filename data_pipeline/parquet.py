"""Rows of Parquet files under bounds: a few bytes may stand for a long text said a thousand times, or a list without
end. What a row holds is counted before any of it becomes Python's.
"""

import itertools
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.damage import Damaged, refuse_bomb
from data_pipeline.parquet_footer import row_groups

_PAGE = 1 << 20  # bytes of a column read at a time
_ROWS, _DECODED = 64, 1 << 28  # decoded together at most: rows, and bytes of their dictionary's texts
_SLICES = 32  # into which a row group's lists are cut: each gets their dictionary anew
_ENTRY, _LISTED = 8, 1 << 30  # bytes that a list's entry counts as, and that the lists of a row group may have

Row = dict[str, pa.Scalar]


def rows(file: BinaryIO) -> Iterator[tuple[Row, int]]:
    """(cells by column, bytes of their texts and binary values and of their lists' entries) of each row; none where
    there is no column.

    Raises:
      Damaged: from here on the file cannot be what it says, or says that it is a decompression bomb.
      pa.ArrowException, OSError: it is broken.
    """
    size, declared = file.seek(0, 2), 0
    schema = pq.ParquetFile(file).schema
    leaves = [schema.column(i) for i in range(len(schema))]
    if not leaves:
        return
    listed = {_root(leaf) for leaf in leaves if leaf.max_repetition_level}
    # A list's texts stay numbers into their dictionary: how long they are together is not known before.
    kept = [leaf.path for leaf in leaves if _root(leaf) in listed and leaf.physical_type == "BYTE_ARRAY"]
    table = pq.ParquetFile(file, buffer_size=_PAGE, read_dictionary=kept)
    names = table.schema_arrow.names
    for index, group in enumerate(row_groups(file)):
        if len(group.columns) != len(leaves):
            raise Damaged(f"row group {index + 1} has {len(group.columns):,} columns, not {len(leaves):,}")
        columns = list(zip(leaves, group.columns, strict=True))
        fewest = min(column.values for column in group.columns)
        if fewest < group.rows:
            raise Damaged(f"row group {index + 1} says {group.rows:,} rows and has a column of {fewest:,} values")
        declared += group.unpacked
        refuse_bomb(declared, size)
        packed = sum(column.packed for column in group.columns)
        refuse_bomb(group.unpacked, packed)
        entries = sum(column.values * max(_ENTRY, leaf.length) for leaf, column in columns if _root(leaf) in listed)
        refuse_bomb(entries, packed)
        if entries > _LISTED:
            raise Damaged(f"row group {index + 1} has lists of {entries:,} bytes; write smaller ones")
        largest = [c.unpacked for leaf, c in columns if c.has_dictionary and leaf.path not in kept]
        few = min(max(1, _DECODED // max([1, *largest])), _ROWS)
        flat = _cells(table, index, few, [name for name in names if name not in listed])
        lists = _cells(table, index, max(few, -(-group.rows // _SLICES)), [n for n in names if n in listed])
        given = 0
        for (cells, length), (more, longer) in zip(flat, lists, strict=False):
            given += 1
            cells |= more
            yield {name: cells[name] for name in names if name in cells}, length + longer
        if given != group.rows:
            raise Damaged(f"row group {index + 1} has {given:,} rows, not {group.rows:,}")


def _root(leaf: pq.ColumnSchema) -> str:
    return leaf.path.split(".", 1)[0]


def _cells(table: pq.ParquetFile, index: int, together: int, names: list[str]) -> Iterator[tuple[Row, int]]:
    """Some columns of a row group's rows, so many decoded together, and what they hold."""
    if not names:
        yield from itertools.repeat(({}, 0))
    for batch in table.iter_batches(batch_size=together, row_groups=[index], columns=names):
        found = dict(zip(batch.schema.names, batch.columns, strict=True))
        sizes = np.sum([_sizes(column) for column in found.values()], axis=0, dtype=np.int64)
        for i in range(len(batch)):
            yield {name: column[i] for name, column in found.items()}, int(sizes[i])


def _sizes(column: pa.Array) -> np.ndarray:
    """[rows] int64: bytes of the texts and binary values in each cell, and _ENTRY for each entry of its lists."""
    kind, types = column.type, pa.types
    if isinstance(column, pa.ExtensionArray):
        return _sizes(column.storage)
    if isinstance(column, pa.DictionaryArray):
        known, used = len(column.dictionary), pc.min_max(column.indices).as_py()
        if used["max"] is not None and not 0 <= used["min"] <= used["max"] < known:
            raise Damaged(f"an entry {used['max']:,} of a dictionary that has {known:,}")
        return np.append(_sizes(column.dictionary), 0)[column.indices.fill_null(known).to_numpy(zero_copy_only=False)]
    if isinstance(column, pa.StructArray):
        fields = [_sizes(column.field(i)) for i in range(kind.num_fields)]
        return np.sum([np.zeros(len(column), np.int64), *fields], axis=0)
    if types.is_nested(kind):
        before = np.concatenate([[0], np.cumsum(_sizes(column.values) + _ENTRY)])
        if types.is_fixed_size_list(kind):
            ends = (column.offset + np.arange(len(column) + 1)) * kind.list_size
        else:
            ends = column.offsets.to_numpy()
        return np.diff(before[ends])
    if types.is_fixed_size_binary(kind):
        return np.full(len(column), kind.byte_width)
    if types.is_binary(kind) or types.is_string(kind) or types.is_large_binary(kind) or types.is_large_string(kind):
        return pc.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.zeros(len(column), np.int64)


def plain(cell: pa.Scalar) -> Any:
    """A cell as Python's; times that Python has none for (nanoseconds, the year 10,000, a zone of Mars) as text.

    Raises:
      UnicodeDecodeError: a text is none.
      ValueError, LookupError, OverflowError, pa.ArrowException: nothing can be made of it.
    """
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, LookupError, OverflowError, pa.ArrowException):
        if isinstance(cell, pa.StructScalar):
            return {name: plain(value) for name, value in cell.items()}
        if isinstance(cell, pa.ListScalar):
            return [plain(entry) for entry in cell.values]
        if isinstance(cell, (pa.DictionaryScalar, pa.ExtensionScalar)):
            return plain(cell.value)
        if pa.types.is_timestamp(cell.type) and cell.type.tz:
            return f"{cell.cast(pa.timestamp(cell.type.unit)).cast(pa.string())}Z"
        return cell.cast(pa.string()).as_py()
