"""The bytes of input files: local or gs://, plain, gzip or zstd, a whole file or the parts that one was cut into.

How a file is packed is told by its first bytes. Whatever is wrong with it comes out as `Damaged`, after all that could
be read before; a network or disk that fails is an OSError, for a job to try again.
"""

import contextlib
import gzip
import io
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa

from ctllm_jax.common.files import as_path, shown
from data_pipeline.damage import Damaged, refuse_bomb

PART = re.compile(r"\.part(\d+)$")  # how the pieces of a file end that was cut by bytes
_BUFFER = 1 << 18
_STEP = 1 << 16  # bytes unpacked at a time: so much before a damaged place may be lost
_GZIP, _ZSTD, _SKIPPED_BY_ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"*M\x18"


@contextlib.contextmanager
def open_stream(paths: Sequence[str]) -> Iterator[io.BufferedReader]:
    """The unpacked content of the files, read as one in their order.

    Text expands to 3 to 20 times its packed size; a stream that gives more than 200 times what it has taken could go on
    for ever and is `Damaged`.

    Raises:
      Damaged: here or while reading: a file is missing, or its content cut short, broken, or a decompression bomb.
    """
    with _Parts(paths) as parts, io.BufferedReader(parts, _BUFFER) as packed:
        kind = _packing(packed.peek(4), paths[0])
        if not kind:
            yield packed
            return
        # zstandard's own stream reader ends without a word where a frame is cut short
        inner = (
            gzip.GzipFile(fileobj=packed) if kind == "gzip" else pa.CompressedInputStream(pa.PythonFile(packed), kind)
        )
        with inner, _Unpacked(inner, packed) as unpacked, io.BufferedReader(unpacked, _BUFFER) as stream:
            yield stream


def _packing(head: bytes, name: str) -> str:
    """'gzip', 'zstd' or ''."""
    if head.startswith(_GZIP):
        return "gzip"
    if head.startswith(_ZSTD) or head[1:4] == _SKIPPED_BY_ZSTD:
        return "zstd"
    ending = pathlib.PurePath(PART.sub("", name)).suffix
    if head and ending in (".gz", ".zst"):
        raise Damaged(f"named {ending}, but it is not packed so")
    return ""


class _Parts(io.RawIOBase):
    """Files one after the other."""

    def __init__(self, paths: Sequence[str]):
        self._waiting = list(paths)
        self._file: BinaryIO | None = None
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        wanted, count = memoryview(buffer), 0
        while count < len(wanted) and (self._file or self._waiting):
            if self._file is None:
                self._file = open_file(self._waiting.pop(0))
            if more := self._file.readinto(wanted[count:]):
                count += more
            else:
                self._leave()
        self._position += count
        return count

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._leave()
        super().close()

    def _leave(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def open_file(path: str) -> BinaryIO:
    """A file as it is; Damaged if it is missing."""
    try:
        return as_path(path).open("rb")
    except FileNotFoundError:
        raise Damaged(f"{shown(path)}: no such file") from None


class _Unpacked(io.RawIOBase):
    """What a decompressor gives, as long as that is believable."""

    def __init__(self, inner: gzip.GzipFile | pa.NativeFile, packed: io.BufferedReader):
        self._inner, self._packed = inner, packed
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            piece = self._inner.read1(min(len(buffer), _STEP))
        except (EOFError, zlib.error) as error:
            raise Damaged(f"{type(error).__name__}: {error}") from None
        except OSError as error:
            if error.errno is not None:  # of the disk, not of the decompressor
                raise
            raise Damaged(f"{type(error).__name__}: {error}") from None
        self._given += len(piece)
        refuse_bomb(self._given, self._packed.tell())
        buffer[: len(piece)] = piece
        return len(piece)
