"""Raw documents, one at a time: JSON lines, Parquet, web archives, texts; plain, gzip or zstd; whole or in parts.

A record that cannot become a document is never dropped in silence: it comes out as a `Malformed` with file,
line and reason. A record longer than the limit is skipped piece by piece and never held whole.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson
import xxhash

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import expand, shown
from data_pipeline.containers import EXCERPT as EXCERPT
from data_pipeline.containers import TEXT, UNKNOWN, Malformed, Record, excerpt, read_records
from data_pipeline.damage import Damaged
from data_pipeline.naming import file_names
from data_pipeline.streams import PART

_TEXTS = 256  # text files that are one input
SUBSETS = ("zh_cc", "zh_baike", "zh_papers", "zh_books", "zh_others", "en", "code")


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of the record's keys that hold a document's parts; all other keys go to `meta`."""

    id: str  # of the document; without one it is FILE:LINE
    url: str | None  # where the text was found; None: of no interest
    source: str | None  # the subset: one of SUBSETS; None: no record says so
    text: str  # the text itself


_PAGE = Fields(id="id", url="url", source="source", text="text")  # of a web archive, and of a text


@dataclasses.dataclass(frozen=True)
class InputFile:
    """One input file: the pointer that Beam carries. `name` starts the ids of records that have none.

    source: the subset of all its records, where the user names it; rest: the other parts of a file that was cut, or
    further texts, each a document, that one worker reads; share: of its records that are read, the others are skipped
    as if they were not there.
    """

    index: int
    path: str
    name: str
    source: str | None = None
    rest: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def paths(self) -> tuple[str, ...]:
        """What to read, in order."""
        return (self.path, *self.rest)

    @property
    def label(self) -> str:
        """What it is called in reports; its records' lines count in there."""
        return shown(f"{self.path} to {self.rest[-1]}" if self.rest and TEXT.search(self.path) else self.path)


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A well-formed record and where it stood."""

    id: str
    url: str
    source: str
    text: str
    meta: dict[str, Any]
    line: int


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """The files of globs or paths, local or gs://; `SUBSET=PATTERN` says that all its records are of that subset.

    Raises:
      UserError: a pattern names no file, two name one file for different subsets, or as `input_files`.
    """
    sources: dict[str, str | None] = {}
    for pattern in patterns:
        subset, _, rest = pattern.partition("=")
        own, pattern = (subset, rest) if subset in SUBSETS else (None, pattern)
        for path in expand([pattern]):
            if sources.setdefault(path, own) != own:
                raise UserError(f"input: {path} is named twice, for {own} and for {sources[path]}")
    files = input_files(sorted(sources), sources)
    return [dataclasses.replace(file, source=sources[file.path]) for file in files]


def input_files(paths: Sequence[str], sources: Mapping[str, str | None] | None = None) -> list[InputFile]:
    """Numbers the inputs. NAME.part00, NAME.part01 ... are one file that was cut by bytes, as the released MAP-CC is;
    texts are small and many: hundreds of them are one input, if `sources` has the same for all.

    Raises:
      UserError: a part is missing before another, a text is in parts, or a file is there both whole and in parts.
    """
    whole: dict[str, list[str]] = {}
    first_texts: dict[str | None, str] = {}
    for path in paths:
        name, own = PART.sub("", path), (sources or {}).get(path)
        if TEXT.search(name) and name != path:
            raise UserError(f"input: {path} is a part of a text, which is read whole: put its parts together")
        if TEXT.search(path):
            if len(whole.get(first_texts.get(own), ())) % _TEXTS == 0:
                first_texts[own] = path
            name = first_texts[own]
        whole.setdefault(name, []).append(path)
    files = []
    for (path, pieces), name in zip(whole.items(), file_names(list(whole)), strict=True):
        first, *rest = pieces if TEXT.search(path) else _in_order(path, pieces)
        files.append(InputFile(len(files), first, name, rest=tuple(rest)))
    return files


def single_files(paths: Sequence[str]) -> list[InputFile]:
    """Numbers the inputs, each file by itself."""
    return [InputFile(i, path, name) for i, (path, name) in enumerate(zip(paths, file_names(paths), strict=True))]


def _in_order(name: str, pieces: list[str]) -> list[str]:
    """The parts of a file by their numbers."""
    if pieces == [name]:
        return pieces
    if name in pieces:
        raise UserError(f"input: {name} is there both whole and in parts; name one of them")
    numbered = sorted((int(PART.search(piece).group(1)), piece) for piece in pieces)
    for (number, piece), expected in zip(numbered, itertools.count(min(numbered[0][0], 1))):
        if number != expected:
            raise UserError(f"input: {name}: part {expected} is missing before {piece}; the parts are one file")
    return [piece for _, piece in numbered]


class DocumentReader:
    """Iterates over one file's records; once through, `records` and `damage` are final.

    A damaged file (missing, cut short, broken, or one that expands beyond belief) ends the iteration where nothing more
    can be read and leaves the cause in `damage`.
    """

    def __init__(self, file: InputFile, fields: Fields, default_source: str | None, max_record_bytes: int):
        self._file, self._fields = file, fields
        self._default_source, self._limit = default_source, max_record_bytes
        self.records = 0
        self.damage: str | None = None

    def __iter__(self) -> Iterator[Document | Malformed]:
        try:
            for item in read_records(self._file.paths, self._limit):
                if self._file.share < 1 and _place(self._file.path, item.line) >= self._file.share:
                    continue
                self.records += 1
                if isinstance(item, Malformed):
                    yield dataclasses.replace(item, source=self._file.source or UNKNOWN)
                else:
                    yield self._document(item)
        except Damaged as damage:
            self.damage = f"{damage} (after {self.records:,} records)"

    def _document(self, record: Record) -> Document | Malformed:
        values, names = record.values, _PAGE if record.has_own_keys else self._fields
        text, identity, url = (values.get(name) for name in (names.text, names.id, names.url))
        taken = {names.text, names.id, names.url}
        source = self._file.source
        if source is None:
            source = values.get(names.source)
            taken.add(names.source)
        source = self._default_source if source is None else source
        if not isinstance(source, str) or source not in SUBSETS:
            reason = "no_source" if source is None else "unknown_source"
            return _malformed(record, reason, f"{source!r}; known sources: {', '.join(SUBSETS)}")
        if text is None:
            return _malformed(record, "no_text", f"no {names.text!r} in the record", source)
        for name, value, kinds in (("text", text, str), ("id", identity, (str, int)), ("url", url, str)):
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                return _malformed(record, "wrong_type", f"{name} is {type(value).__name__}", source)
        if not text.strip():
            return _malformed(record, "empty_text", "nothing but white space", source)
        identity = f"{self._file.name}:{record.line}" if identity in (None, "") else str(identity)
        rest = {name: value for name, value in values.items() if name not in taken and name != "meta"}
        inner = values.get("meta")
        meta = {**inner, **rest} if isinstance(inner, dict) else rest if inner is None else {**rest, "meta": inner}
        return Document(identity, url or "", source, text, meta, record.line)


def _place(path: str, line: int) -> float:
    """A number in [0, 1) that a record's place decides."""
    return xxhash.xxh3_64_intdigest(os.fsencode(f"{path}:{line}")) / 2**64


def _malformed(record: Record, reason: str, detail: str, source: str = UNKNOWN) -> Malformed:
    return Malformed(record.line, reason, detail, excerpt(orjson.dumps(record.values)), source)
