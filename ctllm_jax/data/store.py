"""Reading a token store: rows by split, source and index, from a local folder or gs://. Memory holds open files, not
rows. A shard is checked when it is first opened: what is not as the manifest says is refused by name.
"""

import bisect
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ctllm_jax.common.errors import UserError, first_line
from ctllm_jax.common.files import as_path, identity, is_remote
from ctllm_jax.common.manifest import read_result
from ctllm_jax.common.storage import unread
from ctllm_jax.data.record import FORMAT, Row, decode_row, id_hash, ids_name
from ctllm_jax.data.tokenizer import Tokenizer, load_tokenizer

_OPEN_SHARDS = 512  # file descriptors are finite
_BUFFER = 1 << 16  # bytes that a read asks for at least; a row has some ten thousand
_REQUESTS = 16  # shards of a remote store that are read at the same time
_READ_AHEAD = 256  # rows that are read together when all are wanted in order
_REPAIR = "copy it anew, or build the store again with `ctllm tokenize`"


class TokenStore:
    """A finished store.

    Attributes:
      folder: where it is.
      fingerprint: identity of corpus, tokenizer and settings.
      kind: "pretrain", "chat" or "preference".
      sequence_length: most tokens of a row.
      info: the manifest's result.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = as_path(folder)
        self.fingerprint, self.info = read_result(folder, "tokenize")
        if self.info["format"] != FORMAT:
            remedy = "update ctllm-jax" if self.info["format"] > FORMAT else "build it again with `ctllm tokenize`"
            raise UserError(
                f"{folder}: token store format {self.info['format']}, this version reads {FORMAT}; {remedy}"
            )
        self.kind: str = self.info["kind"]
        self.sequence_length: int = self.info["sequence_length"]
        present = {path.name for path in self.folder.iterdir()}
        for entry in self._entries():
            if entry["file"] not in present:
                raise UserError(f"{self.folder / entry['file']}: a shard of the token store is missing; {_REPAIR}")
        self._open = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)
        self._pool = concurrent.futures.ThreadPoolExecutor(_REQUESTS) if is_remote(folder) else None

    @functools.cached_property
    def tokenizer_folder(self) -> pathlib.Path:
        """A local folder with the tokenizer that made the store; a copy where the store is remote."""
        folder = self.folder / "tokenizer"
        if isinstance(folder, pathlib.Path):
            return folder
        self._copy = tempfile.TemporaryDirectory()  # lives as long as the store
        for path in folder.iterdir():
            pathlib.Path(self._copy.name, path.name).write_bytes(path.read_bytes())
        return pathlib.Path(self._copy.name)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store; UserError if it is another one by now."""
        found = load_tokenizer(self.tokenizer_folder)
        if found.digest != self.info["tokenizer"]["digest"]:
            raise UserError(f"{self.folder}/tokenizer is not the tokenizer that made this store; {_REPAIR}")
        return found

    def sources(self, split: str) -> list[str]:
        """Names of the split's sources that have rows, sorted."""
        return sorted(name for name, entry in self.info["splits"].get(split, {}).items() if entry["rows"])

    def size(self, split: str, source: str) -> int:
        """Number of rows."""
        return self.info["splits"][split][source]["rows"]

    def read(self, split: str, source: str, indices: Sequence[int]) -> list[Row]:
        """Several rows; IndexError past the end, UserError where a shard is not as it was written, Unanswered where
        its storage does not answer."""
        size, starts = self.size(split, source), self._starts(split, source)
        wanted: dict[int, list[int]] = {}  # shard: positions among the indices
        for position, index in enumerate(indices):
            if not 0 <= index < size:
                raise IndexError(f"{self.folder}: {split}/{source} has {size} rows, not {index + 1}")
            wanted.setdefault(bisect.bisect_right(starts, index) - 1, []).append(position)
        shards = self.info["splits"][split][source]["shards"]

        def read_shard(number: int) -> list[Row]:
            entry = shards[number]
            try:
                records = self._open(entry["file"], entry["rows"], entry["identity"]).read(
                    [indices[position] - starts[number] for position in wanted[number]]
                )
                return [decode_row(record) for record in records]
            except (ValueError, IndexError, RuntimeError) as error:  # what ArrayRecord and msgpack raise
                raise _unreadable(self.folder / entry["file"], "damaged", error) from None

        rows: list[Row | None] = [None] * len(indices)
        parts = (self._pool.map if self._pool else map)(read_shard, wanted)
        for positions, part in zip(wanted.values(), parts, strict=True):
            for position, row in zip(positions, part, strict=True):
                rows[position] = row
        return rows

    def row(self, split: str, source: str, index: int) -> Row:
        """One row; errors as `read`."""
        return self.read(split, source, [index])[0]

    def rows(self, split: str, source: str) -> Iterator[Row]:
        """All rows in order."""
        indices = range(self.size(split, source))
        for start in indices[::_READ_AHEAD]:
            yield from self.read(split, source, indices[start : start + _READ_AHEAD])

    def find(self, split: str, source: str, document_id: str) -> list[int]:
        """The rows that hold a document, from the shards' id indexes; one that was cut stands in several."""
        starts, found = self._starts(split, source), []
        for start, entry in zip(starts, self.info["splits"][split][source]["shards"], strict=True):
            index = _read_ids(self.folder / ids_name(entry["file"]))
            key = np.uint64(id_hash(document_id))
            first, last = (np.searchsorted(index["hash"], key, side=side) for side in ("left", "right"))
            found += (start + index["row"][first:last].astype(int)).tolist()
        rows = zip(found, self.read(split, source, found), strict=True)
        return [number for number, row in rows if document_id in row.ids]  # the hash may be another's

    def _entries(self) -> Iterator[dict]:
        for sources in self.info["splits"].values():
            for source in sources.values():
                yield from source["shards"]

    @functools.cache  # noqa: B019 (a store lives as long as the process)
    def _starts(self, split: str, source: str) -> list[int]:
        """First row of each shard."""
        rows = [entry["rows"] for entry in self.info["splits"][split][source]["shards"]]
        return list(itertools.accumulate(rows[:-1], initial=0))

    @functools.cache  # noqa: B019
    def _check(self, file: str, expected: str) -> None:
        path = self.folder / file
        try:
            with _reading(path):
                found = identity(path)
        except FileNotFoundError:
            raise UserError(f"{path}: a shard of the token store is missing; {_REPAIR}") from None
        if found != expected:
            raise UserError(f"{path}: changed or cut short since the store was built; {_REPAIR}")

    def _open_shard(self, file: str, rows: int, expected: str) -> Any:
        self._check(file, expected)
        path = self.folder / file
        module = importlib.import_module("array_record.python.array_record_module")
        try:
            # Rows are read here and there: reading ahead would only cost memory and, from a bucket, traffic.
            options = {"options": "readahead_buffer_size:0,max_parallelism:0", "file_reader_buffer_size": _BUFFER}
            reader = module.ArrayRecordReader(str(path), **options)
            if not reader.ok():
                reader.read([0])  # says what is wrong
        except Exception as error:
            raise _unreadable(path, "not a readable ArrayRecord file", error) from None
        if reader.num_records() != rows:
            raise UserError(f"{path}: holds {reader.num_records()} rows, its manifest says {rows}; {_REPAIR}")
        return reader


@contextlib.contextmanager
def _reading(path: Any) -> Iterator[None]:
    """Makes a UserError of what a storage says that cannot be read now."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise unread(path, error, first_line(error)) or error from None


def _unreadable(path: Any, what: str, error: Exception) -> UserError:
    """What an error says of a shard, or of its storage: ArrayRecord has but texts for both."""
    return unread(path, error, first_line(error)) or UserError(f"{path}: {what} ({error}); {_REPAIR}")


def _read_ids(path) -> np.ndarray:
    """A shard's id index: through a memory map where it is local."""
    try:
        if isinstance(path, pathlib.Path):
            return np.load(path, mmap_mode="r")
        with _reading(path), path.open("rb") as file:
            return np.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: the id index of a shard is missing; {_REPAIR}") from None


def open_store(folder: str | os.PathLike) -> TokenStore:
    """Opens a finished store; UserError if it is missing, unfinished, of another format, or lacks a shard, Unanswered
    where its storage does not answer."""
    with _reading(folder):
        return TokenStore(folder)
