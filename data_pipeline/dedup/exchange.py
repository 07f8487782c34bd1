"""Rows of numbers handed from one set of workers to another through files: each reader takes one part of the keys.

A writer sorts its rows by part, a chunk at a time; a reader reads its slice of every writer's file. Workers hold a
chunk or a part, never the whole, whatever the runner does with its own shuffles.
"""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import apache_beam as beam
import numpy as np

from data_pipeline.dedup import kernels
from data_pipeline.runner import BeamConfig, make_pipeline
from data_pipeline.shards import save_array, save_bytes

Chunk = tuple[np.ndarray, np.ndarray]  # part_N, rows [N, width] uint64


def part_of(keys_N: np.ndarray, parts: int) -> np.ndarray:
    """[N] uint16: the part of each key, whose bits are well mixed."""
    return (keys_N % np.uint64(parts)).astype(np.uint16)


def mixed_part_of(numbers_N: np.ndarray, parts: int) -> np.ndarray:
    """[N] uint16: the part of each number."""
    return part_of(kernels.mix(numbers_N), parts)


def scatter(stem: pathlib.Path, chunks: Iterable[Chunk], parts: int) -> None:
    """Writes STEM.rows, sorted by part within each chunk, and then STEM.npy, [chunks, parts + 1]: where each begins."""
    index, written = [], 0
    with save_bytes(stem.with_suffix(".rows")) as file:
        for part_N, rows in chunks:
            order = np.argsort(part_N, kind="stable")
            ends = np.cumsum(np.bincount(part_N, minlength=parts))
            index.append(written + np.concatenate([[0], ends]))
            written += len(rows)
            file.write(rows[order].tobytes())
    save_array(stem.with_suffix(".npy"), np.array(index, np.int64).reshape(-1, parts + 1))


def gather(stems: Iterable[pathlib.Path], part: int, width: int) -> np.ndarray:
    """[N, width] uint64: one part's rows, of all writers."""
    found = [np.zeros(0, np.uint64)]
    for stem in stems:
        index = np.load(stem.with_suffix(".npy"), mmap_mode="r")
        with open(stem.with_suffix(".rows"), "rb") as file:
            for begin, end in index[:, part : part + 2].tolist():
                file.seek(8 * width * begin)
                found.append(np.fromfile(file, np.uint64, width * (end - begin)))
    return np.concatenate(found).reshape(-1, width)


def through_files(
    pipeline: beam.Pipeline,
    folder: pathlib.Path,
    writers: Sequence[Any],
    chunks: Callable[[Any], Iterable[Chunk]],
    parts: int,
    width: int,
    take: Callable[[np.ndarray], np.ndarray],
) -> beam.PCollection:
    """Elements `folder/PART.out.npy`: what `take` makes of the rows that all writers had for a part.

    Args:
      writers: arguments for `chunks`, whose rows have `width` numbers; what is on disk already is not done again.
    """
    stems = [folder / f"{i:05d}" for i in range(len(writers))]
    return (
        pipeline
        | "Writers" >> beam.Create(list(zip(stems, writers, strict=True)))
        | "Spread" >> beam.Reshuffle()
        | "Scatter" >> beam.Map(_scatter, chunks, parts)
        | "All have written" >> beam.GroupByKey()
        | "Parts" >> beam.FlatMap(lambda _: range(parts))
        | "Spread parts" >> beam.Reshuffle()
        | "Take" >> beam.Map(_take, folder, stems, width, take)
    )


def outputs(folder: pathlib.Path) -> list[pathlib.Path]:
    """What `through_files` has written, in the order of the parts."""
    return sorted(folder.glob("*.out.npy"))


def run_through_files(runner: BeamConfig, folder: pathlib.Path, *arguments: Any) -> list[pathlib.Path]:
    """`through_files` as a job of its own; returns its outputs and deletes what was exchanged."""
    with make_pipeline(runner) as pipeline:
        through_files(pipeline, folder, *arguments)
    clean(folder)
    return outputs(folder)


def clean(folder: pathlib.Path) -> None:
    """Deletes the rows that writers left for readers."""
    for path in folder.glob("*.rows"):
        path.unlink()


def _scatter(writer: tuple[pathlib.Path, Any], chunks: Callable, parts: int) -> tuple[int, int]:
    stem, argument = writer
    if not stem.with_suffix(".npy").exists():
        scatter(stem, chunks(argument), parts)
    return 0, 0


def _take(part: int, folder: pathlib.Path, stems: list[pathlib.Path], width: int, take: Callable) -> pathlib.Path:
    out = folder / f"{part:05d}.out.npy"
    if not out.exists():
        save_array(out, take(gather(stems, part, width)))
    return out
