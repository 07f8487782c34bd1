"""Paths, local or gs://, and writes that are whole or not there at all."""

import contextlib
import glob
import hashlib
import importlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ctllm_jax.common.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]  # the repository
COPY_OF = ".ctllm-copy"  # in a folder of this machine that stands for one on a bucket: which
_EDGE = 64 * 1024  # bytes hashed at either end of an input file by `identity`


def as_path(location: str | os.PathLike) -> Any:
    """`pathlib.Path` for a local location, `upath.UPath` (same interface, over fsspec) for gs:// and its like.

    Raises:
      UserError: the library for such locations is not installed.
    """
    if not is_remote(location):
        return pathlib.Path(location)
    try:
        return importlib.import_module("upath").UPath(location, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UserError(f"{location}: cannot be reached ({error}); gs:// needs: pip install 'ctllm-jax[gcs]'") from None


def shown(path: str | os.PathLike) -> str:
    r"""A path as a text that can be written: file names are bytes, and those that are no UTF-8 are said as `\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def place(path: str | os.PathLike) -> str:
    """A path as it is to be said and recorded: of what lies in a copy of a bucket's folder, where that lies there."""
    absolute = pathlib.Path(os.path.abspath(path))
    for folder in (absolute, *absolute.parents):
        with contextlib.suppress(OSError):
            url, inside = (folder / COPY_OF).read_text().strip(), absolute.relative_to(folder).as_posix()
            return url if inside == "." else f"{url}/{inside}"
    return str(path)


def cache_folder(name: str) -> pathlib.Path:
    """~/.cache/ctllm-jax/NAME, or the like below XDG_CACHE_HOME."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ctllm-jax" / name


def is_remote(location: str | os.PathLike) -> bool:
    """Whether a location is a URL such as gs://bucket/path."""
    return "://" in str(location)


def write_atomic(path: str | os.PathLike, content: str | bytes, ending: str = ".tmp") -> None:
    """Writes a whole file: under another name first (`atomic_file`), flushed to the disk, then renamed."""
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    if not isinstance(path, pathlib.Path):  # object stores publish an object only when it is whole
        path.write_bytes(data)
        return
    with atomic_file(path, ending) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, ending: str = ".tmp") -> Iterator[pathlib.Path]:
    """Yields a temporary local path to write to; renames it to `path` when the block ends without an error.

    Another `ending` is for a folder into which several processes write: `remove_temporaries` leaves the file alone.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{ending}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields an empty temporary folder; renames it to `path`, replacing what is there, when the block ends well."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_temporaries(folder: str | os.PathLike) -> None:
    """Deletes what killed writers of `atomic_*` left behind under `folder`."""
    for leftover in pathlib.Path(folder).rglob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file; raises UserError naming the file if it is missing or malformed."""
    path = as_path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def write_jsonl(path: str | os.PathLike, entries: Iterable[dict]) -> None:
    """JSON lines, atomically."""
    write_atomic(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """Reads a small JSON-lines file; raises UserError naming file and line of the first malformed one."""
    try:
        lines = as_path(path).read_bytes().split(b"\n")  # of a text, splitlines also splits at U+2028 and others
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:  # malformed UTF-8 too
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows


def here_or_shipped(path: str) -> str:
    """A path as it is if it leads somewhere from here, else that of the repository's own file, if there is one."""
    return path if pathlib.Path(path).exists() or not (ROOT / path).is_file() else str(ROOT / path)


def expand(patterns: Sequence[str]) -> list[str]:
    """All files that the globs or paths name, sorted, without repeats; a pattern that names none is an error."""
    found: set[str] = set()
    for pattern in patterns:
        if "://" in pattern:
            root, _, rest = pattern.partition("://")
            bucket, _, tail = rest.partition("/")
            matches = [str(path) for path in as_path(f"{root}://{bucket}").glob(tail)]
        else:
            matches = [name for name in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(name)]
        if not matches:
            raise UserError(f"no file matches {pattern!r} (working folder: {os.getcwd()})")
        found.update(matches)
    return sorted(found)


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 (16 hex digits) of all that a file holds."""
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def identity(path: str | os.PathLike) -> str:
    """Hash of a file's size, first and last 64 KiB, for what is too large to be read once more, as a corpus.

    A change in the middle that leaves the size as it was is not noticed; where that matters, take `file_digest`.
    """
    path = as_path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_EDGE))
        if size > _EDGE:
            file.seek(max(_EDGE, size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()[:16]
