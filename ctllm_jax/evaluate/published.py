"""Benchmarks as published: rows of JSON, JSON-lines, CSV, TSV or Parquet files, plain, gzipped or in a zip archive.

Nothing is downloaded: the user names a folder that holds one folder a benchmark.
"""

import csv
import dataclasses
import gzip
import hashlib
import importlib
import io
import json
import pathlib
import zipfile
import zlib
from collections.abc import Sequence

from ctllm_jax.common.errors import UserError

_DAMAGED = (OSError, EOFError, zlib.error)  # what packed files raise


class MissingFiles(UserError):
    """None of the names under which a benchmark's file circulates is there."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Where a benchmark's rows are."""

    folder: str  # in the user's folder of benchmarks; beside the declaration if it begins with "./"
    about: str  # what belongs there, for the message where it is missing
    splits: dict[str, tuple[str, ...]]  # candidates of each split, see `read_published`
    columns: tuple[str, ...] = ()  # names of a CSV's or TSV's columns, where it has no header
    separator: str = ""  # of columns, where the suffix says another


def read_published(folder: pathlib.Path, names: Sequence[str], files: Files) -> tuple[list[dict], str]:
    """The rows of the first of `names` that is there, and the SHA-256 (16 hex digits) of its bytes.

    A name is a path below `folder`; `.gz` may follow it, or it may be the end of a path in a zip archive of the folder.
    Its suffix tells the format; `.json` may hold JSON lines too. `NAME + OTHER` reads a second file of labels, one a
    line, as field "label".

    Args:
      folder: the benchmark's folder.
      names: candidates, in order.
      files: how they are written.

    Raises:
      MissingFiles: no candidate is there.
      UserError: it cannot be read as what its suffix says.
    """
    for name in names:
        main, _, labels = (part.strip() for part in name.partition("+"))
        content = _content(folder, main)
        extra = _content(folder, labels) if labels else b""
        if content is None or extra is None:
            continue
        try:
            rows = _parse(content, pathlib.PurePath(main).suffix, files)
            if labels:
                lines = extra.decode("utf-8").split()
                rows = [{**row, "label": label} for row, label in zip(rows, lines, strict=True)]
        except (ValueError, csv.Error) as error:
            raise UserError(f"{folder / main}: cannot be read ({error})") from None
        return rows, hashlib.sha256(content + extra).hexdigest()[:16]
    raise MissingFiles(f"{folder}: found none of {', '.join(names)}. It should hold {files.about}")


def _content(folder: pathlib.Path, name: str) -> bytes | None:
    """The bytes of a file, of its gzipped form, or of a member of an archive that ends in this name."""
    if (folder / name).is_file():
        return (folder / name).read_bytes()
    if (packed := folder / f"{name}.gz").is_file():
        try:
            return gzip.decompress(packed.read_bytes())
        except _DAMAGED as error:
            raise UserError(f"{packed}: cannot be read ({error})") from None
    for archive in sorted(folder.glob("*.zip")):
        try:
            with zipfile.ZipFile(archive) as members:
                for member in sorted(members.namelist()):
                    if f"/{member}".endswith(f"/{name}"):
                        return members.read(member)
        except (*_DAMAGED, zipfile.BadZipFile, RuntimeError) as error:  # the last: a password, an unknown method
            raise UserError(f"{archive}: cannot be read ({error})") from None
    return None


def _parse(content: bytes, suffix: str, files: Files) -> list[dict]:
    if suffix == ".parquet":
        return _parquet(content)
    text = content.decode("utf-8-sig")
    if suffix in (".csv", ".tsv"):
        lines = io.StringIO(text, newline="")
        delimiter = files.separator or {".csv": ",", ".tsv": "\t"}[suffix]
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
        names = files.columns or (rows.pop(0) if rows else ())
        return [dict(zip(names, row, strict=True)) for row in rows]
    if suffix == ".jsonl":
        return _json_lines(text)
    if suffix == ".json":
        try:
            value = json.loads(text)
        except ValueError:
            return _json_lines(text)  # as CLUE names its JSON lines
        rows = value if isinstance(value, list) else [value]
        return [row if isinstance(row, dict) else {"row": row} for row in rows]
    raise ValueError(f"no reader for {suffix!r}; there are .csv, .tsv, .json, .jsonl, .parquet")


def _json_lines(text: str) -> list[dict]:
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return rows


def _parquet(content: bytes) -> list[dict]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError("Parquet files need pyarrow (pip install pyarrow); JSON lines do not") from None
    return parquet.read_table(io.BytesIO(content)).to_pylist()
