"""Reading a token store: rows by split, source and index. Memory holds open files, not rows."""

import bisect
import functools
import importlib
import os
import pathlib
from collections.abc import Iterator

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.manifest import read_result
from ctllm_jax.data.record import FORMAT, Row, decode_row


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
        self.folder = pathlib.Path(folder)
        self.fingerprint, self.info = read_result(folder, "tokenize")
        if self.info["format"] != FORMAT:
            raise UserError(f"{folder}: token store format {self.info['format']}, this version reads {FORMAT}")
        self.kind: str = self.info["kind"]
        self.sequence_length: int = self.info["sequence_length"]

    @property
    def tokenizer_folder(self) -> pathlib.Path:
        """The tokenizer that made the store."""
        return self.folder / "tokenizer"

    def sources(self, split: str) -> list[str]:
        """Names of the split's sources that have rows, sorted."""
        return sorted(name for name, entry in self.info["splits"].get(split, {}).items() if entry["rows"])

    def size(self, split: str, source: str) -> int:
        """Number of rows."""
        return self.info["splits"][split][source]["rows"]

    def row(self, split: str, source: str, index: int) -> Row:
        """One row; IndexError past the end."""
        if not 0 <= index < self.size(split, source):
            raise IndexError(f"{self.folder}: {split}/{source} has {self.size(split, source)} rows, not {index + 1}")
        starts, files = self._shards(split, source)
        shard = bisect.bisect_right(starts, index) - 1
        return decode_row(_reader(str(self.folder / files[shard])).read([index - starts[shard]])[0])

    def rows(self, split: str, source: str) -> Iterator[Row]:
        """All rows in order."""
        for index in range(self.size(split, source)):
            yield self.row(split, source, index)

    @functools.cache  # noqa: B019 (a store lives as long as the process)
    def _shards(self, split: str, source: str) -> tuple[list[int], list[str]]:
        """(first row of each shard, file of each shard); checks that the files are whole."""
        starts, files, total = [], [], 0
        for shard in self.info["splits"][split][source]["shards"]:
            path = self.folder / shard["file"]
            if not path.exists():
                raise UserError(f"{path}: a shard of the token store is missing")
            found = _reader(str(path)).num_records()
            if found != shard["rows"]:
                raise UserError(f"{path}: holds {found} rows, its manifest says {shard['rows']}")
            starts.append(total)
            files.append(shard["file"])
            total += shard["rows"]
        return starts, files


@functools.lru_cache(maxsize=256)
def _reader(path: str):
    try:
        return importlib.import_module("array_record.python.array_record_module").ArrayRecordReader(path)
    except Exception as error:
        raise UserError(f"{path}: not a readable ArrayRecord file ({error})") from None


def open_store(folder: str | os.PathLike) -> TokenStore:
    """Opens a finished store; UserError if it is missing, unfinished, or of another format."""
    return TokenStore(folder)
