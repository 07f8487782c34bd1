"""`ctllm corpus --config.pilot=0.01`: builds a sample twice to say what the whole will take; leaves nothing behind.

The sample is the same every time: some files, by hashes of their paths, and of them some records, by their place. Half
of it is built first, then all of it: what both runs have in common (imports, models, the start of every pipeline) is no
part of what grows with the documents.
"""

import dataclasses
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import xxhash

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path
from data_pipeline.documents import InputFile

_LEAST = 16  # files to take a sample from, where there are so many: one may be unlike the others


def estimate(
    files: list[InputFile], share: float, workdir: str, make: Callable[[list[InputFile], str], dict]
) -> dict[str, Any]:
    """Prints and returns what all files would take: {share (of the bytes, sampled), seconds, bytes: {folder: n},
    funnel: [[stage, documents], ...]}.

    share: of the input, above 0 and below 1. make: builds a corpus of some files in a folder and returns its result.
    The folders lie beside `workdir` and are deleted.

    Near duplicates are rarer in a sample than in the whole, and damage hides: the last stages of the funnel are an
    upper bound. Of fewer than 16 / share files all are read that the sample is taken from, so the time is one, too.
    """
    chosen, within = sample(files, share)
    parent = pathlib.Path(workdir).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{pathlib.Path(workdir).name}.pilot-") as place:
        seconds, written = [], []
        for number, part in enumerate((0.5, 0.5, 1)):  # the first one loads models and compiles
            started = time.monotonic()
            some = [dataclasses.replace(file, share=within * part) for file in chosen]
            try:
                result = make(some, f"{place}/{number}")
            except UserError as error:
                raise UserError(f"pilot: {error} (of a sample, which is gone; take a larger share)") from None
            seconds.append(time.monotonic() - started)
            written.append(_sizes(pathlib.Path(place, str(number))))
    real = within * _bytes(chosen) / _bytes(files)
    _, half, all_of_it = written
    found = {
        "share": real,
        "seconds": round(_whole(seconds[1], seconds[2], 1, real)),
        "bytes": {name: round(_whole(half[name], all_of_it[name], len(chosen) / len(files), real)) for name in half},
        "funnel": [[stage, round(count / real)] for stage, count in result["totals"]["funnel"]],
    }
    _print_summary(found, result["totals"]["read"])
    return found


def sample(files: list[InputFile], share: float) -> tuple[list[InputFile], float]:
    """(Files, numbered anew; the share of their records that is `share` of the bytes of all).

    Raises UserError if the share is not between 0 and 1, or if the files are empty."""
    if not _bytes(files):
        raise UserError("pilot: the input files are empty")
    if not 0 < share < 1:
        raise UserError(f"pilot: {share} is not a share between 0 and 1; 0.01 is one document in a hundred")
    number = min(len(files), max(_LEAST, math.ceil(share * len(files))))
    by_hash = sorted(files, key=lambda file: xxhash.xxh3_64_intdigest(os.fsencode(file.path)))
    chosen = sorted(by_hash[:number], key=lambda file: file.index)
    within = min(1.0, share * _bytes(files) / max(_bytes(chosen), 1))
    return [dataclasses.replace(file, index=i) for i, file in enumerate(chosen)], within


def _whole(half: float, full: float, fixed_share: float, share: float) -> float:
    """What the whole takes, where half of a sample took `half` and all of it `full`: a part that each of the files or
    runs has, of which the sample has `fixed_share`, and a part that grows with the records, of which it has `share`."""
    growing = min(max(2 * (full - half), 0), full) or full
    return (full - growing) / fixed_share + growing / share


def _bytes(files: list[InputFile]) -> int:
    return sum(as_path(path).stat().st_size for file in files for path in file.paths)


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    """Bytes below each folder of a corpus."""
    return {
        child.name: sum(path.stat().st_size for path in child.rglob("*") if path.is_file())
        for child in sorted(folder.iterdir())
        if child.is_dir()
    }


def _print_summary(found: dict[str, Any], read: int) -> None:
    hours, rest = divmod(found["seconds"], 3600)
    print(f"corpus: pilot of {found['share']:.2%} ({read:,} records); the whole, as it is run here:", file=sys.stderr)
    print(f"  time    {hours}:{rest // 60:02d}:{rest % 60:02d}", file=sys.stderr)
    for name, size in found["bytes"].items():
        print(f"  {name + '/':12s} {size / 1e9:,.3f} GB", file=sys.stderr)
    for stage, count in found["funnel"]:
        print(f"  {stage:12s} about {count:,} documents", file=sys.stderr)
