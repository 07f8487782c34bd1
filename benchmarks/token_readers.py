"""One reader of a synthetic store, measured from inside; `tokens.py` starts a fresh process for each.

python token_readers.py READER STORE BATCHES     READER: ctllm, memmap, grain (in the peers' environment) or start

Prints one line of JSON. A batch is 64 rows of 4,096 tokens: tokens, positions, segments, labels and weights.

Legend: L length of a row.
"""

import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

BATCH, LENGTH = 64, 4096
RAW_TOKENS, RAW_LENGTHS = "tokens.npy", "lengths.npy"  # the rows of a store as plain arrays, for `memmap`

Batches = Iterator[dict[str, np.ndarray]]


def ctllm(folder: str) -> Batches:
    """Our reader, as training uses it."""
    stream = _stream(folder)
    return (stream.arrays(step, range(BATCH)) for step in range(sys.maxsize))


def memmap(folder: str) -> Batches:
    """The floor: rows out of a memory map in an order that is known beforehand, assembled by our code."""
    from ctllm_jax.data.batches import rows_arrays
    from ctllm_jax.data.record import Row

    tokens = np.load(pathlib.Path(folder, RAW_TOKENS), mmap_mode="r")
    lengths = [row[row > 0].tolist() for row in np.load(pathlib.Path(folder, RAW_LENGTHS))]
    order = np.random.default_rng(0).permutation(len(tokens))
    for start in range(0, sys.maxsize, BATCH):
        chosen = order[np.arange(start, start + BATCH) % len(order)].tolist()
        rows = [Row(tokens[row].astype(np.int32), lengths[row], (), None, 0) for row in chosen]
        yield rows_arrays(rows, LENGTH, "pretrain", True)


def grain(folder: str) -> Batches:
    """Grain over the same shards: shuffle, map, batch, in one process."""
    import grain as library
    import msgpack

    def assemble(record: bytes) -> dict[str, np.ndarray]:
        fields = msgpack.unpackb(record)
        tokens_L, lengths = np.frombuffer(fields["tokens"], "<i4"), fields["lengths"]
        filled, ends = len(tokens_L), np.cumsum(lengths)
        batch = {name: np.zeros(LENGTH, np.int32) for name in ("tokens", "positions", "segments", "labels")}
        batch["weights"] = np.zeros(LENGTH, np.float32)
        batch["tokens"][:filled], batch["labels"][: filled - 1] = tokens_L, tokens_L[1:]
        batch["segments"][:filled] = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
        batch["positions"][:filled] = np.arange(filled) - np.repeat(ends - lengths, lengths)
        batch["weights"][: filled - 1] = 1
        batch["weights"][ends - 1] = 0
        return batch

    paths = sorted(str(path) for path in pathlib.Path(folder).glob("*.array_record"))
    source = library.sources.ArrayRecordDataSource(paths)
    rows = library.MapDataset.source(source).shuffle(seed=0).repeat().map(assemble).batch(BATCH)
    return iter(rows.to_iter_dataset(library.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def sustained(reader: Callable[[str], Batches], folder: str, batches: int) -> dict:
    """Tokens per second and memory over many batches; opening files and warming up are outside."""
    made, early = reader(folder), max(1, batches // 10)
    for _ in range(early):
        batch = next(made)
    memory_early = _memory()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(batches - early):
        batch = next(made)
        assert batch["tokens"].shape == batch["weights"].shape == (BATCH, LENGTH)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tokens = (batches - early) * BATCH * LENGTH
    memory = {"early_mib": memory_early, "late_mib": _memory()}
    return {"tokens_per_cpu_s": tokens / cpu, "tokens_per_wall_s": tokens / wall, **memory}


def start(folder: str) -> dict:
    """Seconds from opening the store to the first batch, at a step anywhere in ten epochs."""
    import ctllm_jax.data.batches  # noqa: F401  (importing JAX is not the store's time)

    draw = np.random.default_rng().random()
    begin = time.perf_counter()
    stream = _stream(folder)
    rows = sum(stream.store.size("train", source) for source in stream.store.sources("train"))
    step = int(draw * 10 * rows / BATCH)
    stream.arrays(step, range(BATCH))
    return {"seconds": time.perf_counter() - begin, "step": step}


def _stream(folder: str):
    from ctllm_jax.data.batches import Stream
    from ctllm_jax.data.order import Mixture, Phase
    from ctllm_jax.data.store import open_store

    store = open_store(folder)
    sizes = {source: store.size("train", source) for source in store.sources("train")}
    return Stream(store, "train", Mixture(sizes, [Phase(0, {})], seed=0), BATCH, mask_documents=True)


def _memory() -> float:
    """Resident memory in MiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    name, store, count = sys.argv[1:]
    readers = {"ctllm": ctllm, "memmap": memmap, "grain": grain}
    print(json.dumps(start(store) if name == "start" else sustained(readers[name], store, int(count))))
