"""Reading raw documents: JSON lines, plain or gzip, one record at a time.

A record that cannot become a document is never dropped in silence: it comes out as a `Malformed` with file,
line and reason. A record longer than the limit is skipped piece by piece and never held whole.
"""

import dataclasses
import gzip
import itertools
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import orjson

SUBSETS = ("zh_cc", "zh_baike", "zh_papers", "zh_books", "zh_others", "en", "code")
UNKNOWN = "unknown"  # where a record is counted whose source cannot be told
EXCERPT = 120  # characters of a text shown in lists and reports
_EXPANSION, _JUDGED = 200, 1 << 27  # times its size that a file may expand to, once it has so many bytes
_SKIP = 1 << 20  # bytes read at a time while skipping an over-long record


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of the record's keys that hold a document's parts; all other keys go to `meta`."""

    id: str
    url: str
    source: str
    text: str


@dataclasses.dataclass(frozen=True)
class InputFile:
    """One input file: the pointer that Beam carries. `name` starts the ids of records that have none."""

    index: int
    path: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A well-formed record and where it stood."""

    id: str
    url: str
    source: str
    text: str
    meta: dict[str, Any]
    line: int


@dataclasses.dataclass(frozen=True, slots=True)
class Malformed:
    """A record that is no document. `reason` is one of a fixed set of names, `detail` says what was found."""

    line: int
    reason: str
    detail: str
    excerpt: str
    source: str = UNKNOWN


def input_files(paths: Sequence[str]) -> list[InputFile]:
    """Numbers the inputs and names each by its stem, or by as much of its path as sets it apart."""
    parts = [(*pathlib.PurePath(path).parts[:-1], pathlib.PurePath(path).name.split(".jsonl")[0]) for path in paths]
    names = []
    for path, own in zip(paths, parts, strict=True):
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        unique = sum(other[-depth:] == own[-depth:] for other in parts) == 1
        names.append("/".join(own[-depth:]) if unique else path)
    return [InputFile(i, path, name) for i, (path, name) in enumerate(zip(paths, names, strict=True))]


class DocumentReader:
    """Iterates over one file's records; once through, `records` and `damage` are final.

    A damaged gzip stream ends the iteration at its last whole line and leaves the cause in `damage`; so does one that
    expands to more than 200 times its size (text does to 3 to 20 times), which could go on for ever.
    """

    def __init__(self, file: InputFile, fields: Fields, default_source: str | None, max_record_bytes: int):
        self._file, self._fields = file, fields
        self._default_source, self._limit = default_source, max_record_bytes
        self.records = 0
        self.damage: str | None = None

    def __iter__(self) -> Iterator[Document | Malformed]:
        with _open(self._file.path) as stream:
            for line in itertools.count(1):
                try:
                    raw = stream.readline(self._limit + 1)
                    too_long = len(raw) > self._limit and not raw.endswith(b"\n")
                    skipped = _skip_line(stream) if too_long else 0
                    if line % 1024 == 0 or too_long:
                        _refuse_bomb(stream)
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    self.damage = f"{type(error).__name__} at line {line}: {error}"
                    return
                if not raw:
                    return
                if line == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if not raw.strip():
                    continue
                self.records += 1
                if too_long:
                    detail = f"{len(raw) + skipped:,} bytes, the limit is {self._limit:,}"
                    yield Malformed(line, "record_too_long", detail, _excerpt(raw[: 4 * EXCERPT]))
                    continue
                yield self._parse(raw, line)

    def _parse(self, raw: bytes, line: int) -> Document | Malformed:
        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            return self._unreadable(raw, line, error)
        if not isinstance(record, dict):
            return Malformed(line, "not_an_object", f"found {type(record).__name__}", _excerpt(raw))
        source = record.pop(self._fields.source, None)
        source = self._default_source if source is None else source
        if not isinstance(source, str) or source not in SUBSETS:
            reason = "no_source" if source is None else "unknown_source"
            return Malformed(line, reason, f"{source!r}; known sources: {', '.join(SUBSETS)}", _excerpt(raw))
        text, identity, url = (
            record.pop(name, None) for name in (self._fields.text, self._fields.id, self._fields.url)
        )
        if text is None:
            return Malformed(line, "no_text", f"no {self._fields.text!r} in the record", _excerpt(raw), source)
        for name, value, kinds in (("text", text, str), ("id", identity, (str, int)), ("url", url, str)):
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                return Malformed(line, "wrong_type", f"{name} is {type(value).__name__}", _excerpt(raw), source)
        if not text.strip():
            return Malformed(line, "empty_text", "nothing but white space", _excerpt(raw), source)
        identity = f"{self._file.name}:{line}" if identity in (None, "") else str(identity)
        inner = record.pop("meta", None)
        meta = (
            {**inner, **record} if isinstance(inner, dict) else record if inner is None else {**record, "meta": inner}
        )
        return Document(identity, url or "", source, text, meta, line)

    @staticmethod
    def _unreadable(raw: bytes, line: int, error: orjson.JSONDecodeError) -> Malformed:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as cause:
            return Malformed(line, "invalid_utf8", str(cause), _excerpt(raw))
        return Malformed(line, "invalid_json", str(error), _excerpt(raw))


def _open(path: str | os.PathLike) -> BinaryIO:
    """Opens plain or gzip by content, not by name (parts of split archives carry other endings)."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed or os.fspath(path).endswith(".gz") else open(path, "rb", 1 << 18)


def _skip_line(stream: BinaryIO) -> int:
    """Reads to the end of the line; returns the number of bytes."""
    skipped = 0
    while piece := stream.readline(_SKIP):
        skipped += len(piece.removesuffix(b"\n"))
        if piece.endswith(b"\n"):
            break
        _refuse_bomb(stream)
    return skipped


def _refuse_bomb(stream: BinaryIO) -> None:
    """Raises BadGzipFile if a gzip stream has expanded beyond belief."""
    if isinstance(stream, gzip.GzipFile) and stream.tell() > max(_JUDGED, _EXPANSION * stream.fileobj.tell()):
        raise gzip.BadGzipFile(f"a decompression bomb: {_EXPANSION} times its size and more")


def _excerpt(raw: bytes) -> str:
    return raw[: 4 * EXCERPT].decode("utf-8", "replace").strip()[:EXCERPT]
