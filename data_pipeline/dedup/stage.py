"""Stage 2 on Beam: ids, exact, then near duplicates; each step sees what the ones before left.

Elements are shard pointers and blocks of numbers; text never moves. A step reads the hashes that stage 1
wrote, groups them by (band and) range of the key, and writes one file of removals per shard.
"""

import dataclasses
import functools
import typing
from collections import Counter
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np

from ctllm_jax.common.files import write_json
from data_pipeline.dedup import cluster
from data_pipeline.dedup.minhash import DedupConfig, band_hashes
from data_pipeline.documents import EXCERPT
from data_pipeline.filters.stage import EXAMPLES
from data_pipeline.runner import BeamConfig, make_pipeline
from data_pipeline.shards import REMOVAL, STEPS, Layout, gzip_writer, json_line, read_lines, save_array

_Keyed = tuple[bytes, bytes]


def deduplicate(shards: int, config: DedupConfig, layout: Layout, runner: BeamConfig) -> None:
    """Runs the three steps, then writes the rejected duplicates and the outcome of every shard."""
    pointers = [shard for shard in range(shards) if not layout.outcome(shard).exists()]
    if not pointers:
        return
    for step in STEPS:
        if all(layout.removals(step, shard).exists() for shard in range(shards)):
            continue
        with make_pipeline(runner) as pipeline:
            removed = _find(pipeline, step, shards, config, layout)
            whole = pipeline | "Every shard" >> beam.Create([(shard, b"") for shard in range(shards)])
            _ = (
                (removed, whole)
                | beam.Flatten()
                | "By shard" >> beam.GroupByKey()
                | "Write" >> beam.Map(_write_removals, step, layout)
            )
    with make_pipeline(runner) as pipeline:
        _ = pipeline | beam.Create(pointers) | beam.Reshuffle() | beam.Map(_write_outcome, layout)


def _find(pipeline: beam.Pipeline, step: str, shards: int, config: DedupConfig, layout: Layout) -> beam.PCollection:
    """(shard, REMOVAL records) of one step."""
    blocks = (
        pipeline
        | "Shards" >> beam.Create(range(shards))
        | "Spread" >> beam.Reshuffle()
        | "Keys" >> beam.FlatMap(_keys, step, config, layout).with_output_types(_Keyed)
        | "By key" >> beam.GroupByKey()
    )
    if step != "near":
        return blocks | "Repeats" >> beam.FlatMap(_exact_removals)
    return (
        blocks
        | "Compare" >> beam.FlatMap(_similar_pairs, config, layout)
        | "One graph" >> beam.Map(lambda pairs: (0, pairs))
        | "Gather" >> beam.GroupByKey()
        | "Clusters" >> beam.FlatMap(_near_removals, layout)
    )


def _keys(shard: int, step: str, config: DedupConfig, layout: Layout) -> Iterator[_Keyed]:
    """Blocks of (key words..., document number) of one shard, by band and range of the key's first word."""
    with np.load(layout.hashes(shard)) as stored:
        arrays = {name: stored[name] for name in ("id_hash", "text_hash", "hashed")}
    live = np.ones(len(arrays["hashed"]), bool)
    for earlier in STEPS[: STEPS.index(step)]:
        live[np.load(layout.removals(earlier, shard))["row"]] = False
    if step == "near":
        rows = np.flatnonzero(live & arrays["hashed"])
        by_band = band_hashes(np.load(layout.signatures(shard), mmap_mode="r")[rows], config.bands)[:, :, None]
    else:
        rows = np.flatnonzero(live)
        by_band = arrays[f"{'id' if step == 'id' else 'text'}_hash"][rows][:, None, :]
    numbers = cluster.number(shard, rows)[:, None]
    for band in range(by_band.shape[1]):
        keys = by_band[:, band]
        part = keys[:, 0] % np.uint64(config.key_ranges)
        for index in np.unique(part):
            inside = part == index
            yield bytes([band, index]), np.hstack([keys[inside], numbers[inside]]).tobytes()


def _block(values: Iterable[bytes], width: int) -> tuple[np.ndarray, np.ndarray]:
    block = np.frombuffer(b"".join(values), np.uint64).reshape(-1, width)
    return block[:, :-1], block[:, -1]


def _exact_removals(group: tuple[bytes, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
    pairs = cluster.repeats(*_block(group[1], 3))
    yield from _by_shard(pairs, np.ones(len(pairs), np.float32))


def _similar_pairs(group: tuple[bytes, Iterable[bytes]], config: DedupConfig, layout: Layout) -> Iterator[bytes]:
    """Candidate pairs of one band and range whose whole signatures agree well enough."""
    pairs = cluster.candidates(*_block(group[1], 2))
    pairs = pairs[agreement(pairs, layout) >= config.min_similarity]
    if len(pairs):
        yield pairs.tobytes()


def _near_removals(group: tuple[int, Iterable[bytes]], layout: Layout) -> Iterator[tuple[int, bytes]]:
    pairs = np.frombuffer(b"".join(group[1]), np.uint64).reshape(-1, 2)
    removed = cluster.components(np.unique(pairs, axis=0))
    yield from _by_shard(removed, agreement(removed, layout))


def agreement(pairs: np.ndarray, layout: Layout) -> np.ndarray:
    """[pairs] float32: share of equal signature values: estimates the shingles' Jaccard similarity."""
    result = np.zeros(len(pairs), np.float32)
    shards = cluster.shard_of(pairs)
    for left, right in np.unique(shards, axis=0):
        here = np.flatnonzero((shards[:, 0] == left) & (shards[:, 1] == right))
        first, second = (np.load(layout.signatures(int(shard)), mmap_mode="r") for shard in (left, right))
        for part in np.array_split(here, len(here) // 4096 + 1):
            rows = cluster.row_of(pairs[part])
            result[part] = (first[rows[:, 0]] == second[rows[:, 1]]).mean(axis=1, dtype=np.float32)
    return result


def _by_shard(removed: np.ndarray, similarity: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Splits [(stays, removed)] by the removed document's shard, as REMOVAL records."""
    records = np.empty(len(removed), REMOVAL)
    records["row"], records["similarity"] = cluster.row_of(removed[:, 1]), similarity
    records["of_shard"], records["of_row"] = cluster.shard_of(removed[:, 0]), cluster.row_of(removed[:, 0])
    shards = cluster.shard_of(removed[:, 1])
    for shard in np.unique(shards):
        yield int(shard), records[shards == shard].tobytes()


def _write_removals(group: tuple[int, Iterable[bytes]], step: str, layout: Layout) -> None:
    shard, parts = group
    records = np.frombuffer(b"".join(parts), REMOVAL)
    save_array(layout.removals(step, shard), np.sort(records, order="row"))


@dataclasses.dataclass(frozen=True)
class Removal:
    """Why a document was removed: the step that found it, the id it repeats, the similarity of the texts.

    Exact copies have similarity 1; for a repeated id nothing is known of the texts. The document that it
    repeats may itself be a near duplicate of another, never of this one.
    """

    kind: str
    duplicate_of: str
    similarity: float | None


def removals(shard: int, layout: Layout) -> dict[int, Removal]:
    """{row: removal} of one shard, all steps together; they share no row."""
    found = {}
    for step in STEPS:
        for record in np.load(layout.removals(step, shard)):
            original = _ids(layout, int(record["of_shard"]))(int(record["of_row"]))
            similarity = None if step == "id" else round(float(record["similarity"]), 4)
            found[int(record["row"])] = Removal(step, original, similarity)
    return found


@functools.lru_cache(maxsize=16)
def _ids(layout: Layout, shard: int) -> typing.Callable[[int], str]:
    """row -> id in a shard."""
    with np.load(layout.hashes(shard)) as stored:
        text, ends = stored["ids"].tobytes(), stored["id_ends"]
    return lambda row: text[ends[row - 1] if row else 0 : ends[row]].decode()


def _write_outcome(shard: int, layout: Layout) -> None:
    """Writes a shard's rejected duplicates with what they repeat, and what is left per subset."""
    found = removals(shard, layout)
    outcome: dict[str, dict] = {"subsets": {}, "examples": {}}
    with gzip_writer(layout.rejected(shard, "dedup")) as rejected:
        for path in layout.kept_files(shard):
            for record in read_lines(path):
                removal = found.get(record.pop("row"))
                count = outcome["subsets"].setdefault(record["source"], Counter())
                if removal is None:
                    size = {"characters": len(record["text"]), "bytes": len(record["text"].encode())}
                    count.update({"kept": 1, **size})
                    continue
                count[f"duplicate_{removal.kind}"] += 1
                why = dataclasses.asdict(removal)
                rejected.write(json_line(record | why | {"reasons": [{"rule": f"duplicate_{removal.kind}"} | why]}))
                examples = outcome["examples"].setdefault(f"duplicate_{removal.kind}", [])
                if len(examples) < EXAMPLES:
                    examples.append({"id": record["id"], "excerpt": record["text"][:EXCERPT], **why})
    write_json(layout.outcome(shard), outcome)
