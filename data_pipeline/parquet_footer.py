"""The footer of a Parquet file, as far as bounds need it: rows, values and bytes that each row group says it has.

pyarrow's readers come to it after the bounds; its objects for row groups and columns end the whole process, whatever
stands around them, where C++ finds one wrong (an encrypted column, statistics of another length).

A footer is in Thrift's compact protocol (doc/specs/thrift-compact-protocol.md of apache/thrift); fields have the
numbers of parquet-format's parquet.thrift.
"""

import dataclasses
from collections.abc import Iterator
from typing import BinaryIO

from data_pipeline.damage import Damaged

_TAIL = 8  # bytes behind the footer: its length and the magic number
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_DEPTH = 64  # of values in one another, as in Thrift's own readers


@dataclasses.dataclass(frozen=True)
class Column:
    """What a row group says of one of its columns; bytes are with the pages' headers."""

    values: int
    packed: int  # [bytes] compressed
    unpacked: int  # [bytes]
    has_dictionary: bool


@dataclasses.dataclass(frozen=True)
class RowGroup:
    """What a row group says of itself; `columns` are the leaves of the schema in its order."""

    rows: int
    unpacked: int  # [bytes]
    columns: list[Column]


def row_groups(file: BinaryIO) -> Iterator[RowGroup]:
    """The row groups in the file's order, none held but the one that is given.

    Raises:
      Damaged: from here on the footer is none.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - _TAIL))
    length = int.from_bytes(file.read(4), "little")
    if length > size - _TAIL:
        raise Damaged(f"a footer of {length:,} bytes in a file of {size:,}")
    file.seek(size - _TAIL - length)
    reader = _Compact(file.read(length))
    for number, kind in reader.fields():
        if number != 4:
            reader.skip(kind)
            continue
        for _ in reader.structs(kind):
            yield _row_group(reader)


def _row_group(reader: "_Compact") -> RowGroup:
    columns: list[Column] = []
    sizes: dict[int, int] = {}
    for number, kind in reader.fields():
        if number == 1:
            columns = [_column(reader) for _ in reader.structs(kind)]
        elif number in (2, 3):
            sizes[number] = reader.size(kind)
        else:
            reader.skip(kind)
    return RowGroup(_said(sizes, 3), _said(sizes, 2), columns)


def _column(reader: "_Compact") -> Column:
    """A ColumnChunk; what counts is in its ColumnMetaData, field 3."""
    sizes: dict[int, int] = {}
    for number, kind in reader.fields():
        if number != 3 or kind != _STRUCT:
            reader.skip(kind)
            continue
        for inner, inner_kind in reader.fields():
            if inner in (5, 6, 7, 11):
                sizes[inner] = reader.size(inner_kind)
            else:
                reader.skip(inner_kind)
    return Column(_said(sizes, 5), _said(sizes, 7), _said(sizes, 6), 11 in sizes)


def _said(sizes: dict[int, int], number: int) -> int:
    if number not in sizes:
        raise Damaged("a footer that leaves out a size")
    return sizes[number]


class _Compact:
    """Thrift's compact protocol, value by value. Who is given the kind of a value reads it or skips it, so that nothing
    is held that nobody asked for."""

    def __init__(self, content: bytes):
        self._content, self._place = content, 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """(number, kind) of each field of a struct."""
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._integer()
            yield number, kind

    def structs(self, kind: int) -> Iterator[None]:
        """Once for each struct of a list."""
        inner, count = self._list(kind)
        if inner != _STRUCT and count:
            raise Damaged("a footer with a list of something else")
        yield from (None for _ in range(count))

    def size(self, kind: int) -> int:
        """A number that counts something."""
        if kind not in (_I16, _I32, _I64) or (value := self._integer()) < 0:
            raise Damaged("a footer with a size that is none")
        return value

    def skip(self, kind: int, depth: int = 0) -> None:
        """Passes over a field's value."""
        if kind not in (_TRUE, _FALSE):  # which stand in the field's head
            self._skip(kind, depth)

    def _skip(self, kind: int, depth: int) -> None:
        """Passes over a value that stands by itself."""
        if depth > _DEPTH:
            raise Damaged("a footer with values too deep in one another")
        if kind in (_TRUE, _FALSE, _BYTE):
            self._pass(1)
        elif kind in (_I16, _I32, _I64):
            self._integer()
        elif kind == _DOUBLE:
            self._pass(8)
        elif kind == _BINARY:
            self._pass(self._unsigned())
        elif kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        elif kind == _MAP:
            if count := self._unsigned():
                kinds = self._byte()
                for _ in range(count):
                    self._skip(kinds >> 4, depth + 1)
                    self._skip(kinds & 15, depth + 1)
        else:
            inner, count = self._list(kind)
            for _ in range(count):
                self._skip(inner, depth + 1)

    def _list(self, kind: int) -> tuple[int, int]:
        """(kind of the elements, how many)."""
        if kind not in (_LIST, _SET):
            raise Damaged(f"a footer with a value of kind {kind}")
        head = self._byte()
        count = head >> 4
        return head & 15, self._unsigned() if count == 15 else count

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise Damaged("a footer with a number of more than 64 bits")

    def _byte(self) -> int:
        self._pass(1)
        return self._content[self._place - 1]

    def _pass(self, count: int) -> None:
        """Goes on by so many bytes. Every value has one at least, so no count in a footer is work without end."""
        self._place += count
        if self._place > len(self._content):
            raise Damaged("a footer that is cut short")
