"""From token store to device arrays: the batch of a step, each process reading the rows of its own devices only.

Legend: B sequences of the global batch, L sequence length; preference batches have [B, 2, L] (chosen, rejected).
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from ctllm_jax.data.order import Mixture, Phase, Place
from ctllm_jax.data.record import Row
from ctllm_jax.data.store import TokenStore
from ctllm_jax.objectives import BATCH_FIELDS, Batch
from ctllm_jax.step import batch_sharding

_EMPTY = Row(np.zeros(0, np.int32), [0, 0], [], np.zeros(0, np.uint8), 0)  # fills up a batch; carries no weight
_AHEAD = 2  # batches that are read while one is used


@dataclasses.dataclass(frozen=True)
class RateChange:
    """Other rates from a step on (steps count from 1)."""

    step: int  # [steps] the first at these rates
    rates: dict[str, float]  # [share] of each source (any scale)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and in which proportion."""

    store: str  # folder of `ctllm tokenize`, local or gs://
    rates: dict[str, float]  # [share] of each source (any scale); empty: by rows
    rate_changes: tuple[RateChange, ...]  # a run that goes on may add some after the step it has reached
    mask_documents: bool  # False lets tokens see earlier documents of their row, as the released model did

    def phases(self, batch_size: int) -> list[Phase]:
        """The rates as the order of examples knows them."""
        changes = [Phase((change.step - 1) * batch_size, change.rates) for change in self.rate_changes]
        return [Phase(0, self.rates), *changes]


@dataclasses.dataclass(frozen=True)
class Stream:
    """The training stream of a store: batch(step) holds examples [step B, (step + 1) B); here steps count from 0."""

    store: TokenStore
    split: str
    mixture: Mixture
    batch_size: int
    mask_documents: bool  # False gives the released model's attention across documents

    def places(self, step: int, rows: Sequence[int] | None = None) -> list[Place]:
        """Where rows (None: all) of a step's global batch come from."""
        rows = range(self.batch_size) if rows is None else rows
        return self.mixture.places([step * self.batch_size + row for row in rows])

    def read(self, places: Sequence[Place]) -> list[Row]:
        """The store's rows at places; those of a source are read together."""
        by_source = collections.defaultdict(list)
        for position, place in enumerate(places):
            by_source[place.source].append(position)
        found: list[Row | None] = [None] * len(places)
        for source, positions in by_source.items():
            rows = self.store.read(self.split, source, [places[position].index for position in positions])
            for position, row in zip(positions, rows, strict=True):
                found[position] = row
        return found

    def arrays(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The given rows of a step's global batch, as numpy arrays."""
        places, sources = self.places(step, rows), self.store.sources(self.split)
        arrays = rows_arrays(self.read(places), self.store.sequence_length, self.store.kind, self.mask_documents)
        return {**arrays, "source": np.array([sources.index(place.source) for place in places], np.int32)}


def make_stream(config: DataConfig, store: TokenStore, batch_size: int, seed: int) -> Stream:
    """The training stream of a run; UserError where the rates do not fit the store."""
    sizes = {source: store.size("train", source) for source in store.sources("train")}
    mixture = Mixture(sizes, config.phases(batch_size), seed)
    return Stream(store, "train", mixture, batch_size, config.mask_documents)


def rows_arrays(rows: Sequence[Row], length: int, kind: str, mask_documents: bool) -> dict[str, np.ndarray]:
    """What the model reads of rows: BATCH_FIELDS, [N, L]; for pairs [N, 2, L], and `reference` [N, 2]."""
    sides = 2 if kind == "preference" else 1
    arrays = {name: np.zeros((len(rows) * sides, length), dtype) for name, dtype in BATCH_FIELDS.items()}
    for number, row in enumerate(rows):
        if kind == "preference":
            cut = row.lengths[0]
            _fill(arrays, 2 * number, row.tokens[:cut], row.mask[:cut], [cut])
            _fill(arrays, 2 * number + 1, row.tokens[cut:], row.mask[cut:], [len(row.tokens) - cut])
        else:
            _fill(arrays, number, row.tokens, row.mask, row.lengths if mask_documents else [len(row.tokens)])
    if kind == "preference":
        arrays = {name: array.reshape(len(rows), 2, length) for name, array in arrays.items()}
        arrays["reference"] = np.array([row.reference for row in rows], np.float32).reshape(-1, 2)
    return arrays


def row_arrays(row: Row, length: int, kind: str, mask_documents: bool) -> dict[str, np.ndarray]:
    """`rows_arrays` of one row: [L], or [2, L] for a pair."""
    return {name: array[0] for name, array in rows_arrays([row], length, kind, mask_documents).items()}


def _fill(
    arrays: dict[str, np.ndarray], number: int, tokens: np.ndarray, mask: np.ndarray | None, lengths: Sequence[int]
) -> None:
    """Writes a sequence into row `number`. A token predicts the next one of its own segment; the first is given."""
    filled = len(tokens)
    if not filled:
        return
    lengths = np.asarray(lengths)
    ends = np.cumsum(lengths)
    segment = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    arrays["tokens"][number, :filled] = tokens
    arrays["segments"][number, :filled] = segment + 1
    arrays["positions"][number, :filled] = np.arange(filled, dtype=np.int32) - (ends - lengths)[segment]
    arrays["labels"][number, : filled - 1] = tokens[1:]
    arrays["weights"][number, : filled - 1] = 1 if mask is None else mask[1:]
    arrays["weights"][number, ends - 1] = 0


def _lay_out(
    read: Callable[[list[int]], dict[str, np.ndarray]], batch_size: int, store: TokenStore, mesh: Mesh
) -> Batch:
    """Global arrays over the mesh (rows over batch axes, length over context) from a reader of chosen rows."""
    sides = (2,) if store.kind == "preference" else ()
    shape = (batch_size, *sides, store.sequence_length)
    wide = batch_sharding(mesh, sides, narrow=False)
    local = wide.addressable_devices_indices_map(shape).values()
    rows = sorted({row for index in local for row in range(*index[0].indices(batch_size))})
    arrays = read(rows)
    where = {row: place for place, row in enumerate(rows)}

    def put(name: str, array: np.ndarray) -> jax.Array:
        narrow = name not in BATCH_FIELDS

        def piece(index):
            chosen = [where[row] for row in range(*index[0].indices(batch_size))]
            return array[chosen][(slice(None), *index[1:])]

        sharding = batch_sharding(mesh, sides, narrow) if narrow else wide
        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, piece)

    return {name: put(name, array) for name, array in arrays.items()}


def global_batch(stream: Stream, step: int, mesh: Mesh) -> Batch:
    """The step's batch as global arrays; this process reads the rows of its own devices only."""
    return _lay_out(lambda rows: stream.arrays(step, rows), stream.batch_size, stream.store, mesh)


def prefetched(stream: Stream, start: int, stop: int, mesh: Mesh) -> Iterator[Batch]:
    """The batches of steps [start, stop), the next ones read in a thread while one is used."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        pending = collections.deque()
        for step in range(start, stop + _AHEAD):
            if step < stop:
                pending.append(pool.submit(global_batch, stream, step, mesh))
            if step >= start + _AHEAD:
                yield pending.popleft().result()


def held_out(
    store: TokenStore, split: str, batch_size: int, most: int, mask_documents: bool, mesh: Mesh
) -> Iterator[tuple[str, int, Batch]]:
    """(source, text bytes, batch) over a split in order, at most `most` batches of each source.

    A short last batch ends in empty rows, which carry no weight.
    """
    for number, source in enumerate(store.sources(split)):
        size = min(store.size(split, source), most * batch_size)
        for start in range(0, size, batch_size):
            indices = range(start, min(start + batch_size, size))
            records = store.read(split, source, indices)
            records += [_EMPTY] * (batch_size - len(indices))

            def read(rows, records=records, number=number):
                chosen = [records[row] for row in rows]
                arrays = rows_arrays(chosen, store.sequence_length, store.kind, mask_documents)
                return {**arrays, "source": np.full(len(rows), number, np.int32)}

            yield source, sum(r.bytes for r in records), _lay_out(read, batch_size, store, mesh)
