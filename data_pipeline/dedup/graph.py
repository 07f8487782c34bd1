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

from ctllm_jax.common.files import read_json, write_json
from data_pipeline.dedup import cluster, kernels
from data_pipeline.dedup.exchange import Chunk, mixed_part_of, outputs, run_through_files
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
    """Rounds until one changes nothing. `folder/round.json` names the last that ended, so that one that was killed,
    be it while an earlier round was deleted, goes on behind it and looks at nothing before."""
    both = functools.partial(_chunks, parts=parts, both_ways=True)
    later = functools.partial(_chunks, parts=parts, both_ways=False)
    mark = folder / "round.json"
    ended = read_json(mark) if mark.exists() else {"number": -1, "digest": None, "joined": False}
    while True:
        number = ended["number"]
        if number >= 0:
            edges = outputs(folder / f"small{number}")
            _delete_before(number, folder)
        if ended["joined"]:
            return edges
        large, small = folder / f"large{number + 1}", folder / f"small{number + 1}"
        edges = run_through_files(runner, large, edges, both, parts, 2, cluster.large_star)
        edges = run_through_files(runner, small, edges, later, parts, 2, cluster.small_star)
        digest = sum(map(_digest, edges)) & 0xFFFFFFFFFFFFFFFF
        ended = {"number": number + 1, "digest": digest, "joined": digest == ended["digest"]}
        write_json(mark, ended)


def _delete_before(number: int, folder: pathlib.Path) -> None:
    """Deletes what rounds before this one have left, and a killed deletion too."""
    for earlier in range(number):
        for done in (folder / f"large{earlier}", folder / f"small{earlier}"):
            if done.exists():
                shutil.rmtree(done)


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
