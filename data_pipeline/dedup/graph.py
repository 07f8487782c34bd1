"""Connected components of a graph of duplicates that need not fit one worker.

Up to `most_edges` edges one process joins them. Beyond that, workers repeat two steps until nothing changes, each on
the edges of a part of the documents (large-star and small-star; Kiveris et al., "Connected Components in MapReduce and
Beyond", SoCC 2014); the number of rounds grows with the logarithm of a component's size. A worker holds edges / parts
edges, 16 bytes each and about six times that while it sorts, and at least those of the document with the most edges:
at worst a whole cluster. Both ways end in the same pairs.
"""

import functools
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipeline.dedup import cluster, kernels
from data_pipeline.dedup.exchange import Chunk, mixed_part_of, run_through_files
from data_pipeline.runner import BeamConfig
from data_pipeline.shards import save_array

_CHUNK = 1 << 20  # edges that a writer holds


def join(
    edges: Sequence[pathlib.Path], folder: pathlib.Path, most_edges: int, parts: int, runner: BeamConfig
) -> list[pathlib.Path]:
    """Files of (first document of its component, document), a document once, from npy files of edges [n, 2].

    What is exchanged on the way lies below `folder`.
    """
    if sum(len(np.load(path, mmap_mode="r")) for path in edges) <= most_edges:
        out = folder / "pairs.npy"
        save_array(out, _components(edges))
        return [out]
    return _rounds(edges, folder, parts, runner)


def _components(edges: Sequence[pathlib.Path]) -> np.ndarray:
    """`cluster.components` of all files. A pair lies in many of them: what is known is a tree before more is read."""
    forest, waiting, held = np.zeros((0, 2), np.uint64), [], 0
    for path in edges:
        waiting.append(np.load(path))
        held += len(waiting[-1])
        if held > _CHUNK // 4 or path is edges[-1]:
            forest, waiting, held = cluster.components(np.concatenate([forest, *waiting])), [], 0
    return forest


def _rounds(edges: Sequence[pathlib.Path], folder: pathlib.Path, parts: int, runner: BeamConfig) -> list[pathlib.Path]:
    both = functools.partial(_chunks, parts=parts, both_ways=True)
    later = functools.partial(_chunks, parts=parts, both_ways=False)
    number, before, earlier_folders = 0, None, []
    while True:
        large, small = folder / f"large{number}", folder / f"small{number}"
        edges = run_through_files(runner, large, edges, both, parts, 2, cluster.large_star)
        edges = run_through_files(runner, small, edges, later, parts, 2, cluster.small_star)
        now = sum(map(_digest, edges)) & 0xFFFFFFFFFFFFFFFF
        for done in earlier_folders:
            shutil.rmtree(done)
        if now == before:
            return edges
        number, before, earlier_folders = number + 1, now, [large, small]


def _chunks(path: pathlib.Path, parts: int, both_ways: bool) -> Iterator[Chunk]:
    """(part of a document, [document, neighbour]): each edge at its later end, or at both."""
    edges = np.load(path, mmap_mode="r")
    for begin in range(0, len(edges), _CHUNK):
        block = np.asarray(edges[begin : begin + _CHUNK])
        directed = np.concatenate([block, block[:, ::-1]]) if both_ways else block[:, ::-1]
        yield mixed_part_of(directed[:, 0], parts), directed


def _digest(path: pathlib.Path) -> int:
    """A number for a file's edges that does not depend on their order."""
    edges = np.load(path)
    return int(kernels.mix(kernels.mix(edges[:, 0]) ^ edges[:, 1]).sum(dtype=np.uint64))
