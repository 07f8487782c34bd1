"""Records of input files, one at a time and under a size limit: JSON lines, Parquet, web archives, plain texts.

What a file holds is told by its first bytes, but for texts, which are named so (.txt): each is one record. A record
that cannot be read comes out as `Malformed`; where nothing more can be read, `damage.Damaged` is raised.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import orjson
import pyarrow as pa

from ctllm_jax.common.files import shown
from data_pipeline import archives, parquet
from data_pipeline.damage import Damaged, refuse_bomb
from data_pipeline.streams import open_file, open_stream

UNKNOWN = "unknown"  # where a record is counted whose source cannot be told
EXCERPT = 120  # characters of a text shown in lists and reports
TEXT = re.compile(r"\.txt(\.gz|\.zst)?$")  # how a file ends that is one document
_PARQUET, _ARCHIVE = b"PAR1", b"WARC/"
_SKIP = 1 << 20  # bytes read at a time while skipping an over-long record
_NESTED = 200  # brackets from which on a line may be too deep to be written


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What a record holds by key, and its place in the file: a line, or its number, from 1.

    has_own_keys: they are id, url, text, date and language, whatever the user calls those of others: it is of a web
    archive, or a text.
    """

    line: int
    values: dict[str, Any]
    has_own_keys: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Malformed:
    """A record that is no document. `reason` is one of a fixed set of names, `detail` says what was found."""

    line: int
    reason: str
    detail: str
    excerpt: str
    source: str = UNKNOWN


def read_records(paths: Sequence[str], limit: int) -> Iterator[Record | Malformed]:
    """Everything that the files, read as one, hold; records of more than `limit` bytes are `record_too_long`.

    Raises:
      Damaged: at the place from which nothing more can be read.
    """
    if TEXT.search(paths[0]):
        for number, path in enumerate(paths, 1):
            yield _text(path, number, limit)
        return
    with open_stream(paths) as stream:
        head = stream.peek(len(_ARCHIVE))
        if head.startswith(_ARCHIVE):
            yield from _pages(stream, limit)
            return
        if not head.startswith(_PARQUET):
            if head and paths[0].endswith(".parquet"):
                raise Damaged("named as Parquet, but it is not")
            yield from _json_lines(stream, limit)
            return
    if len(paths) > 1:
        raise Damaged("parts of a Parquet file cannot be read: join them first")
    with open_file(paths[0]) as file:
        yield from _rows(file, limit)


def excerpt(raw: bytes) -> str:
    """The beginning of a record, for a person to see."""
    return raw[: 4 * EXCERPT].decode("utf-8", "replace").strip()[:EXCERPT]


# ---- Texts


def _text(path: str, number: int, limit: int) -> Record | Malformed:
    """A file as one record, whose id is its path; line ends are those of Unix."""
    name = shown(path)
    try:
        with open_stream([path]) as stream:
            raw = stream.read(limit + 1)
            size = len(raw) + sum(map(len, iter(lambda: stream.read(_SKIP), b""))) if len(raw) > limit else len(raw)
    except Damaged as damage:
        return Malformed(number, "damaged_file", f"{name}: {damage}", "")
    if size > limit:
        return _too_long(number, size, limit, raw, f"{name}: ")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"{name}: {error}; if it is in GB 18030: iconv -f gb18030 -t utf-8 FILE > NEW.txt"
        return Malformed(number, "invalid_utf8", what, excerpt(raw))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Record(number, {"id": name, "text": text}, has_own_keys=True)


# ---- JSON lines


def _json_lines(stream: BinaryIO, limit: int) -> Iterator[Record | Malformed]:
    for line in itertools.count(1):
        raw = stream.readline(limit + 1)
        if not raw:
            return
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw) > limit and not raw.endswith(b"\n"):
            yield _too_long(line, len(raw) + _skip_line(stream), limit, raw)
        elif raw.strip():
            yield _parse(raw, line)


def _parse(raw: bytes, line: int) -> Record | Malformed:
    try:
        values = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as cause:
            return Malformed(line, "invalid_utf8", str(cause), excerpt(raw))
        return Malformed(line, "invalid_json", str(error), excerpt(raw))
    if raw.count(b"[") + raw.count(b"{") > _NESTED and not _can_be_written(values):
        return Malformed(line, "nested_too_deep", "lists and objects in one another", excerpt(raw))
    if not isinstance(values, dict):
        return Malformed(line, "not_an_object", f"found {type(values).__name__}", excerpt(raw))
    return Record(line, values)


def _can_be_written(values: Any) -> bool:
    """Whether JSON that was read can be written again: the reader takes deeper ones than the writer."""
    try:
        orjson.dumps([[[values]]])  # it will be a part of other records
    except orjson.JSONEncodeError:
        return False
    return True


def _skip_line(stream: BinaryIO) -> int:
    """Reads to the end of the line; returns the number of bytes."""
    skipped = 0
    while piece := stream.readline(_SKIP):
        skipped += len(piece.removesuffix(b"\n"))
        if piece.endswith(b"\n"):
            break
    return skipped


def _too_long(line: int, size: int, limit: int, raw: bytes, where: str = "") -> Malformed:
    what = f"{where}{size:,} bytes, the limit is {limit:,}"
    return Malformed(line, "record_too_long", what, excerpt(raw))


# ---- Parquet


def _rows(file: BinaryIO, limit: int) -> Iterator[Record | Malformed]:
    size, given = file.seek(0, 2), 0
    try:
        for number, (row, length) in enumerate(parquet.rows(file), 1):
            given += length
            refuse_bomb(given, size)
            yield _too_long(number, length, limit, b"") if length > limit else _decoded(number, row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name
        if getattr(error, "errno", None) is not None:  # of the disk, not of the file's content
            raise
        raise Damaged(f"{type(error).__name__}: {error}") from None


def _decoded(number: int, row: parquet.Row) -> Record | Malformed:
    """A row; what JSON has no form for is said as text."""
    try:
        values = {name: parquet.plain(cell) for name, cell in row.items()}
        raw = orjson.dumps([[[values]]], default=_as_text)  # it will be a part of other records
        return Record(number, orjson.loads(raw)[0][0][0])
    except UnicodeDecodeError as error:
        return Malformed(number, "invalid_utf8", str(error), excerpt(error.object))
    except orjson.JSONEncodeError as error:  # nothing else is wrong with what was made of cells
        return Malformed(number, "nested_too_deep", str(error), "")
    except (ValueError, LookupError, OverflowError, pa.ArrowException) as error:
        return Malformed(number, "unreadable_value", f"{type(error).__name__}: {error}", "")


def _as_text(value: Any) -> str | None:
    """What JSON has no form for. Binary columns often hold texts; bytes that are no text become null."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


# ---- Web archives


def _pages(stream: BinaryIO, limit: int) -> Iterator[Record | Malformed]:
    for number, entry in enumerate(archives.entries(stream, limit), 1):
        if entry.size > limit:
            yield _too_long(number, entry.size, limit, entry.url.encode())
            continue
        try:
            yield Record(number, archives.page(entry, limit), has_own_keys=True)
        except archives.Unusable as error:
            yield Malformed(number, error.reason, str(error), entry.url[:EXCERPT])
