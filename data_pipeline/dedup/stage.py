"""Stage 2 on Beam: ids, exact, then near duplicates; each step sees what the ones before left.

Elements are shard pointers; text never moves. A step sends the keys of each shard's documents to the parts of the keys'
range (exchange.py), where equal ones meet, and writes one file of removals per shard. Of documents that are one, the
first in the order of the input stays, those of earlier corpora before all others.
"""

import functools
import pathlib
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np

from data_pipeline.dedup import cluster, graph, kernels
from data_pipeline.dedup.corpora import Corpora
from data_pipeline.dedup.exchange import Chunk, clean, part_of, run_through_files, through_files
from data_pipeline.dedup.minhash import DedupConfig
from data_pipeline.dedup.outcome import write_outcome
from data_pipeline.runner import BeamConfig, make_pipeline
from data_pipeline.shards import REMOVAL, STEPS, Layout, save_array

_CHUNK = 1 << 15  # documents that a worker looks at together
_PAIRS = 1 << 11  # pairs whose signatures it holds together, and the pages that they lie on


def deduplicate(corpora: Corpora, config: DedupConfig, runner: BeamConfig) -> None:
    """Runs the three steps, then writes the rejected duplicates, the survivors and the outcome of every shard."""
    layout = corpora.layout
    pointers = [shard for shard in range(corpora.shards) if not layout.outcome(shard).exists()]
    if not pointers:
        return
    for step in STEPS:
        if not all(layout.removals(step, shard).exists() for shard in range(corpora.shards)):
            (_near if step == "near" else _exact)(step, corpora, config, runner)
    with make_pipeline(runner) as pipeline:
        _ = pipeline | beam.Create(pointers) | beam.Reshuffle() | beam.Map(write_outcome, corpora, config.similar_lines)


def _exact(step: str, corpora: Corpora, config: DedupConfig, runner: BeamConfig) -> None:
    folder = corpora.layout.exchange(step, "keys")
    chunks = functools.partial(_hash_keys, step=step, corpora=corpora, config=config)
    with make_pipeline(runner) as pipeline:
        pairs = through_files(pipeline, folder, range(len(corpora)), chunks, config.key_ranges, 3, cluster.repeats)
        _write_removals(pairs, step, corpora)
    clean(folder)


def _near(step: str, corpora: Corpora, config: DedupConfig, runner: BeamConfig) -> None:
    folder = corpora.layout.exchange(step, "keys")
    chunks = functools.partial(_band_keys, corpora=corpora, config=config)
    similar = functools.partial(_similar, corpora=corpora, least=config.min_similarity)
    parts = config.bands * config.key_ranges
    edges = run_through_files(runner, folder, range(len(corpora)), chunks, parts, 2, similar)
    graphs = corpora.layout.exchange(step, "graph")
    joined = graph.join(edges, graphs, config.most_edges, config.key_ranges, runner)
    with make_pipeline(runner) as pipeline:
        _write_removals(pipeline | "Clusters" >> beam.Create(joined), step, corpora)


def _live(number: int, step: str, corpora: Corpora) -> np.ndarray:
    """Rows of a shard that the earlier steps left."""
    live = np.ones(len(corpora.hashes(number)), bool)
    own = corpora.own(number)
    if own is not None:
        for earlier in STEPS[: STEPS.index(step)]:
            live[np.load(corpora.layout.removals(earlier, own))["row"]] = False
    return np.flatnonzero(live)


def _hash_keys(number: int, step: str, corpora: Corpora, config: DedupConfig) -> Iterator[Chunk]:
    """(part, [hash, hash, document]) of a shard's documents."""
    live = _live(number, step, corpora)
    for begin in range(0, len(live), _CHUNK):
        rows = live[begin : begin + _CHUNK]
        words = corpora.hashes(number).records["id" if step == "id" else "text"]
        keyed = np.column_stack([words[rows], cluster.number(number, rows)])
        yield part_of(keyed[:, 0], config.key_ranges), keyed


def _band_keys(number: int, corpora: Corpora, config: DedupConfig) -> Iterator[Chunk]:
    """(part, [band's hash, document]) of a shard's documents; each band has `key_ranges` parts of its own."""
    live = _live(number, "near", corpora)
    live = live[corpora.hashes(number).records["hashed"][live]]
    for begin in range(0, len(live), _CHUNK):
        rows = live[begin : begin + _CHUNK]
        keys = kernels.band_hashes(corpora.hashes(number).signatures[rows], config.bands)
        first_part = np.repeat(np.arange(config.bands, dtype=np.uint16) * np.uint16(config.key_ranges), len(rows))
        keyed = np.column_stack([keys.ravel(), np.tile(cluster.number(number, rows), config.bands)])
        yield first_part + part_of(keyed[:, 0], config.key_ranges), keyed


def _similar(keyed: np.ndarray, corpora: Corpora, least: float) -> np.ndarray:
    """Candidate pairs of one part whose whole signatures agree well enough."""
    pairs = cluster.candidates(keyed)
    return pairs[agreement(pairs, corpora) >= least] if least else pairs


def agreement(pairs: np.ndarray, corpora: Corpora) -> np.ndarray:
    """[pairs] float32: share of equal signature values: estimates the shingles' Jaccard similarity."""
    result = np.zeros(len(pairs), np.float32)
    for begin in range(0, len(pairs), _PAIRS):
        some = slice(begin, begin + _PAIRS)
        first, second = (_signatures(pairs[some, side], corpora) for side in (0, 1))
        result[some] = kernels.agreement(first, second)
    return result


def _signatures(numbers: np.ndarray, corpora: Corpora) -> np.ndarray:
    shards, rows = cluster.shard_of(numbers), cluster.row_of(numbers)
    found = None
    for shard in np.unique(shards):
        signatures = corpora.hashes(int(shard)).signatures
        if found is None:
            found = np.empty((len(numbers), signatures.shape[1]), np.uint32)
        here = shards == shard
        found[here] = signatures[rows[here]]
    return found


def _write_removals(pairs: beam.PCollection, step: str, corpora: Corpora) -> None:
    """One file of removals for each shard of this corpus, from elements that name npy files of pairs."""
    every = [(shard, b"") for shard in range(corpora.shards)]
    _ = (
        (
            pairs | "By shard" >> beam.FlatMap(_by_shard, step, corpora),
            pairs.pipeline | "Every shard" >> beam.Create(every),
        )
        | beam.Flatten()
        | "Gather" >> beam.GroupByKey()
        | "Write" >> beam.Map(_write_shard, step, corpora.layout)
    )


def _by_shard(path: pathlib.Path, step: str, corpora: Corpora) -> Iterator[tuple[int, bytes]]:
    """Splits [(stays, removed)] by the removed document's shard, as REMOVAL records."""
    pairs = np.load(path)
    pairs = pairs[cluster.shard_of(pairs[:, 1]) >= len(corpora.earlier)]
    records = np.empty(len(pairs), REMOVAL)
    records["row"] = cluster.row_of(pairs[:, 1])
    records["of_shard"], records["of_row"] = cluster.shard_of(pairs[:, 0]), cluster.row_of(pairs[:, 0])
    records["similarity"] = agreement(pairs, corpora) if step == "near" else 1
    shards = cluster.shard_of(pairs[:, 1])
    for shard in np.unique(shards):
        yield int(corpora.own(int(shard))), records[shards == shard].tobytes()


def _write_shard(group: tuple[int, Iterable[bytes]], step: str, layout: Layout) -> None:
    shard, parts = group
    records = np.frombuffer(b"".join(parts), REMOVAL)
    save_array(layout.removals(step, shard), np.sort(records, order="row"))
