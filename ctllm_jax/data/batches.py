"""From token store to device arrays: the batch of a step, each process reading the rows of its own devices only.

Legend: B sequences of the global batch, L sequence length; preference batches have [B, 2, L] (chosen, rejected).
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ctllm_jax.data.order import Mixture, Place
from ctllm_jax.data.record import Row
from ctllm_jax.data.store import TokenStore
from ctllm_jax.sharding import spec

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Stream:
    """The training stream of a store: batch(step) holds examples [step B, (step + 1) B)."""

    store: TokenStore
    split: str
    mixture: Mixture
    batch_size: int
    mask_documents: bool  # False gives the released model's attention across documents

    def place(self, step: int, row: int) -> Place:
        """Where a row of a step's global batch comes from."""
        return self.mixture.place(step * self.batch_size + row)

    def places(self, step: int) -> list[Place]:
        """Where each row of a step's global batch comes from."""
        return [self.place(step, row) for row in range(self.batch_size)]

    def arrays(self, step: int, rows: range | list[int]) -> dict[str, np.ndarray]:
        """The given rows of a step's global batch, as numpy arrays."""
        sources = self.store.sources(self.split)
        examples = []
        for row in rows:
            place = self.place(step, row)
            record = self.store.row(self.split, place.source, place.index)
            example = row_arrays(record, self.store.sequence_length, self.store.kind, self.mask_documents)
            examples.append({**example, "source": np.int32(sources.index(place.source))})
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def row_arrays(row: Row, length: int, kind: str, mask_documents: bool) -> dict[str, np.ndarray]:
    """What the model reads of a row: tokens, positions, segments, labels, weights; [L], or [2, L] for a pair."""
    if kind == "preference":
        cut = row.lengths[0]
        parts = [(row.tokens[:cut], row.mask[:cut]), (row.tokens[cut:], row.mask[cut:])]
        sides = [_sequence(tokens, mask, [len(tokens)], length, True) for tokens, mask in parts]
        return {name: np.stack([side[name] for side in sides]) for name in sides[0]}
    mask = np.ones(len(row.tokens), np.uint8) if row.mask is None else row.mask
    return _sequence(row.tokens, mask, row.lengths, length, mask_documents)


def _sequence(
    tokens: np.ndarray, mask: np.ndarray, lengths: list[int], length: int, mask_documents: bool
) -> dict[str, np.ndarray]:
    """A padded sequence. A token predicts the next one of its own segment; a segment's first token is given."""
    filled = len(tokens)
    if not mask_documents:
        lengths = [filled]
    segments = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    labels, weights = np.zeros(filled, np.int32), np.zeros(filled, np.float32)
    labels[:-1] = tokens[1:]
    weights[:-1] = mask[1:] * (segments[1:] == segments[:-1])
    arrays = {
        "tokens": tokens,
        "positions": positions,
        "segments": segments,
        "labels": labels,
        "weights": weights,
    }
    return {name: np.pad(array, (0, length - filled)) for name, array in arrays.items()}


def _lay_out(
    read: Callable[[list[int]], dict[str, np.ndarray]], batch_size: int, store: TokenStore, mesh: Mesh
) -> Batch:
    """Global arrays over the mesh (rows over batch axes, length over context) from a reader of chosen rows."""
    sides = (2,) if store.kind == "preference" else ()
    shape = (batch_size, *sides, store.sequence_length)
    wide = NamedSharding(mesh, spec(("batch", *(None for _ in sides), "length")))
    local = wide.addressable_devices_indices_map(shape).values()
    rows = sorted({row for index in local for row in range(*index[0].indices(batch_size))})
    arrays = read(rows)
    where = {row: place for place, row in enumerate(rows)}

    def put(array: np.ndarray) -> jax.Array:
        narrow = array.ndim == 1

        def piece(index):
            chosen = [where[row] for row in range(*index[0].indices(batch_size))]
            return array[chosen][(slice(None), *index[1:])]

        sharding = NamedSharding(mesh, spec(("batch",))) if narrow else wide
        return jax.make_array_from_callback((batch_size,) if narrow else shape, sharding, piece)

    return {name: put(array) for name, array in arrays.items()}


def global_batch(stream: Stream, step: int, mesh: Mesh) -> Batch:
    """The step's batch as global arrays; this process reads the rows of its own devices only."""
    return _lay_out(lambda rows: stream.arrays(step, rows), stream.batch_size, stream.store, mesh)


def prefetched(stream: Stream, start: int, stop: int, mesh: Mesh) -> Iterator[Batch]:
    """The batches of steps [start, stop), the next one read in a thread while the last is used."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(global_batch, stream, start, mesh) if start < stop else None
        for step in range(start, stop):
            batch = pending.result()
            if step + 1 < stop:
                pending = pool.submit(global_batch, stream, step + 1, mesh)
            yield batch


def held_out(
    store: TokenStore, split: str, batch_size: int, most: int, mask_documents: bool, mesh: Mesh
) -> Iterator[tuple[str, int, Batch]]:
    """(source, text bytes, batch) over a split in order, at most `most` batches of each source.

    A short last batch ends in empty rows, which carry no weight.
    """
    for number, source in enumerate(store.sources(split)):
        size = min(store.size(split, source), most * batch_size)
        for start in range(0, size, batch_size):
            records = [store.row(split, source, i) for i in range(start, min(start + batch_size, size))]
            examples = [row_arrays(r, store.sequence_length, store.kind, mask_documents) for r in records]
            empty = {name: np.zeros_like(array) for name, array in examples[0].items()}
            examples += [empty] * (batch_size - len(examples))

            def read(rows, examples=examples, number=number):
                arrays = {name: np.stack([examples[row][name] for row in rows]) for name in examples[0]}
                return {**arrays, "source": np.full(len(rows), number, np.int32)}

            yield source, sum(r.bytes for r in records), _lay_out(read, batch_size, store, mesh)
