"""The log-likelihood engine: what a model gives to sequences, each shared beginning computed once.

Requests come in groups, the options of a question. Sequences that differ in their last id alone are one row, which is
asked for several last ids. What rows begin with alike (the few-shot examples of a subject, the question before its
options) is computed once, into a cache that the rows go on from; of three plans, nothing shared, shared within groups,
shared by all, the one with the fewest padded tokens is taken.

Shapes are few: lengths are rounded up to powers of two, and neither a length nor a sharing plan is used that does not
save the tokens of a whole batch. A shape always has the same number of rows. So for one `batch_tokens` the order of the
requests does not change a bit of the result; between different `batch_tokens` only the rounding of matrix products can.

Legend: B rows, L length, G shared beginnings, P their length, F last ids, V vocabulary.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.common.progress import Progress
from ctllm_jax.generate import bucket
from ctllm_jax.loading import LoadedModel, check_ids
from ctllm_jax.losses import token_logprobs
from ctllm_jax.model import Cache, ModelConfig, forward, init_cache

LAST_IDS = 4  # most last ids that one row is asked for
SHORTEST_SHARED = 16  # tokens; a shorter beginning is not worth a pass of its own
CACHE_FACTOR = 4  # a batch's cache holds at most this times `batch_tokens` slots


@dataclasses.dataclass(frozen=True)
class Request:
    """A sequence of which all but the first id are predicted.

    Attributes:
      ids: two at least; no more than the model's context and one.
      start: place of the continuation's first id; `len(ids)` where the continuation is empty.
      cut: ids that did not fit and were left out, from the beginning.
    """

    ids: Sequence[int]
    start: int
    cut: int


@dataclasses.dataclass(frozen=True)
class Score:
    """A continuation's score, and that of the whole sequence.

    Attributes:
      sum_logprob: log-probability in nats, summed over the continuation's tokens.
      tokens: number of them.
      is_greedy: whether greedy decoding would give the continuation.
      cut: tokens of the context that did not fit and were left out, from its beginning.
      whole_logprob: summed over every token but the first.
      length: number of tokens, the first one counted.
    """

    sum_logprob: float
    tokens: int
    is_greedy: bool
    cut: int
    whole_logprob: float
    length: int


@dataclasses.dataclass
class _Row:
    """Ids that go into the model together, and the last ids asked for after them.

    `logprobs` and `hits` are of `ids[1:]` and then of each last id, once computed.
    """

    ids: tuple[int, ...]
    last: list[int]
    logprobs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    hits: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))

    def add(self, logprobs: np.ndarray, hits: np.ndarray) -> None:
        self.logprobs, self.hits = np.append(self.logprobs, logprobs), np.append(self.hits, hits)


def score_groups(
    model: LoadedModel, groups: Sequence[Sequence[Request]], batch_tokens: int, label: str
) -> list[list[Score]]:
    """Scores the requests of each group, in the order given.

    Args:
      model: whose probabilities.
      groups: requests that probably begin alike.
      batch_tokens: most tokens of a batch (a batch has one row at least); decides speed and memory.
      label: what the progress line says.

    Raises:
      UserError: ids unknown to the model.
    """
    check_ids(model, (request.ids for group in groups for request in group))
    rows: dict[tuple, _Row] = {}
    placed = [[_place(rows, request) for request in group] for group in groups]
    own = [_unique(row for row, _ in group) for group in placed]
    plan = _plan(own, model.config.max_length, batch_tokens)
    with Progress(label, len(rows), "rows") as progress:
        _run(model, plan, batch_tokens, progress)
    return [
        [_score(request, *place) for request, place in zip(group, places, strict=True)]
        for group, places in zip(groups, placed, strict=True)
    ]


def _place(rows: dict[tuple, _Row], request: Request) -> tuple[_Row, int]:
    """The row of a request, and which of its last ids is the request's."""
    ids, last = tuple(request.ids[:-1]), request.ids[-1]
    number = 0
    while True:
        row = rows.setdefault((ids, number), _Row(ids, []))
        if last in row.last:
            return row, row.last.index(last)
        if len(row.last) < LAST_IDS:
            row.last.append(last)
            return row, len(row.last) - 1
        number += 1


def _unique(rows: Iterable[_Row]) -> list[_Row]:
    return list({id(row): row for row in rows}.values())


def _score(request: Request, row: _Row, last: int) -> Score:
    inner = len(row.ids) - 1
    logprobs = np.append(row.logprobs[:inner], row.logprobs[inner + last]).astype(np.float64)
    hits = np.append(row.hits[:inner], row.hits[inner + last])
    own = slice(request.start - 1, None)
    return Score(
        sum_logprob=float(logprobs[own].sum()),
        tokens=len(request.ids) - request.start,
        is_greedy=bool(hits[own].all()),
        cut=request.cut,
        whole_logprob=float(logprobs.sum()),
        length=len(request.ids),
    )


# ---- What is shared

Plan = list[tuple[int, list[_Row]]]  # (tokens that the rows begin with alike and share, the rows)


def _plan(groups: list[list[_Row]], most: int, batch_tokens: int) -> Plan:
    everything = _unique(row for group in groups for row in group)
    taken: set[int] = set()
    own = []  # a row that several groups have is the first one's
    for group in groups:
        own.append([row for row in group if id(row) not in taken])
        taken.update(id(row) for row in group)
    apart = [(0, everything)]
    plans = ([(_shared(group), group) for group in own if group], [(_shared(everything), everything)])
    best = min(plans, key=lambda plan: _padded_tokens(plan, most))
    return best if _padded_tokens(apart, most) - _padded_tokens(best, most) >= batch_tokens else apart


def _shared(rows: list[_Row]) -> int:
    """How many ids all rows begin with, less the one that each of them goes on from; 0 if it is not worth it."""
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    alike = next((n for n, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return alike - 1 if len(rows) > 1 and alike > SHORTEST_SHARED else 0


def _padded_tokens(plan: Plan, most: int) -> int:
    return sum(
        _shared_bucket(shared, most) + sum(bucket(len(row.ids) - shared, most) for row in rows) for shared, rows in plan
    )


def _shared_bucket(shared: int, most: int) -> int:
    """The next of 128, 512, 1024, 2048, ... that holds it, but `most` at most; 0 for 0."""
    size = 128 if shared <= 128 else max(512, bucket(shared, most))
    return min(size, most) if shared else 0


def _lengths(needed: list[int], batch_tokens: int) -> dict[int, int]:
    """{length: the one that it is padded to} for the rounded lengths of rows: a length that would not save a batch's
    tokens over the next longer one is padded to that."""
    counts, chosen = collections.Counter(needed), {}
    rows = 0  # of this length and of shorter ones that are padded to it
    lengths = sorted(counts)
    waiting: list[int] = []
    for length, longer in zip(lengths, [*lengths[1:], None], strict=True):
        rows += counts[length]
        waiting.append(length)
        if longer is None or rows * (longer - length) >= batch_tokens:
            chosen |= dict.fromkeys(waiting, length)
            rows, waiting = 0, []
    return chosen


# ---- Running


def _run(model: LoadedModel, plan: Plan, batch_tokens: int, progress: Progress) -> None:
    most = model.config.max_length
    by_length: dict[int, Plan] = {}
    for shared, rows in plan:
        by_length.setdefault(_shared_bucket(shared, most), []).append((shared, rows))
    for P, entries in sorted(by_length.items()):
        G = 1 if P == 0 or len(plan) == 1 else max(1, batch_tokens // P)
        entries = sorted(entries, key=lambda entry: min(row.ids for row in entry[1]))
        for start in range(0, len(entries), G):
            chunk = entries[start : start + G]
            cache = _fill(model, chunk, G, P) if P else None
            _go_on(model, chunk, cache, P, batch_tokens, progress)


def _fill(model: LoadedModel, chunk: Plan, G: int, P: int) -> Cache:
    """Computes what the rows of each entry share."""
    tokens_GP, labels_GP, length_G = np.zeros((G, P), np.int32), np.zeros((G, P), np.int32), np.zeros(G, np.int32)
    for place, (shared, rows) in enumerate(chunk):
        ids = rows[0].ids
        tokens_GP[place, :shared], labels_GP[place, :shared] = ids[:shared], ids[1 : shared + 1]
        length_G[place] = shared
    logprob_GP, hit_GP, cache = _prefill(model.config, model.params, tokens_GP, labels_GP, length_G)
    logprob_GP, hit_GP = jax.device_get((logprob_GP, hit_GP))
    for place, (shared, rows) in enumerate(chunk):
        for row in rows:
            row.add(logprob_GP[place, :shared], hit_GP[place, :shared])
    return cache


def _go_on(model: LoadedModel, chunk: Plan, cache: Cache | None, P: int, batch_tokens: int, progress: Progress) -> None:
    """Computes the rows of a chunk, from where what they share ends."""
    everything = [(place, shared, row) for place, (shared, rows) in enumerate(chunk) for row in rows]
    needed = [bucket(len(row.ids) - shared, model.config.max_length) for _, shared, row in everything]
    padded = _lengths(needed, batch_tokens)
    buckets: dict[int, list[tuple[int, int, _Row]]] = {}
    for entry, length in zip(everything, needed, strict=True):
        buckets.setdefault(padded[length], []).append(entry)
    for L, entries in sorted(buckets.items()):
        B = max(1, min(batch_tokens // L, CACHE_FACTOR * batch_tokens // (P + L)))
        entries.sort(key=lambda entry: (entry[2].ids, entry[2].last))
        for start in range(0, len(entries), B):
            _batch(model, entries[start : start + B], cache, B, L)
            progress.add(len(entries[start : start + B]))


def _batch(model: LoadedModel, entries: list[tuple[int, int, _Row]], cache: Cache | None, B: int, L: int) -> None:
    tokens_BL, labels_BL = np.zeros((B, L), np.int32), np.zeros((B, L), np.int32)
    owner_B, start_B, length_B = (np.zeros(B, np.int32) for _ in range(3))
    last_BF = np.zeros((B, LAST_IDS), np.int32)
    for place, (owner, shared, row) in enumerate(entries):
        ids = row.ids[shared:]
        tokens_BL[place, : len(ids)], labels_BL[place, : len(ids) - 1] = ids, ids[1:]
        owner_B[place], start_B[place], length_B[place] = owner, shared, len(ids)
        last_BF[place, : len(row.last)] = row.last
    found = _continue(model.config, model.params, cache, owner_B, start_B, tokens_BL, labels_BL, length_B, last_BF)
    logprob_BL, hit_BL, logprob_BF, hit_BF = jax.device_get(found)
    for place, (_, _, row) in enumerate(entries):
        inner, last = length_B[place] - 1, len(row.last)
        row.add(logprob_BL[place, :inner], hit_BL[place, :inner])
        row.add(logprob_BF[place, :last], hit_BF[place, :last])


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    cfg: ModelConfig, params: dict, tokens_GP: jax.Array, labels_GP: jax.Array, length_G: jax.Array
) -> tuple[jax.Array, jax.Array, Cache]:
    """(log-probability of each label, whether it is the argmax, cache of the tokens)."""
    G, P = tokens_GP.shape
    slot_P = jnp.arange(P)
    positions_GP = jnp.broadcast_to(slot_P, (G, P))
    real_GP = (slot_P < length_G[:, None]).astype(jnp.int32)
    logits_GPV, cache = forward(cfg, params, tokens_GP, positions_GP, real_GP, init_cache(cfg, G, P))
    return token_logprobs(logits_GPV, labels_GP)[0], jnp.argmax(logits_GPV, axis=-1) == labels_GP, cache


@functools.partial(jax.jit, static_argnums=0)
def _continue(
    cfg: ModelConfig,
    params: dict,
    cache: Cache | None,
    owner_B: jax.Array,
    start_B: jax.Array,
    tokens_BL: jax.Array,
    labels_BL: jax.Array,
    length_B: jax.Array,
    last_BF: jax.Array,
) -> tuple[jax.Array, ...]:
    """Rows that go on from row `owner_B` of the cache at position `start_B`, or from nothing.

    Returns:
      (log-probability of each label, whether it is the argmax, both [B, L]; the same of each last id, [B, F]).
    """
    L = tokens_BL.shape[1]
    if cache is not None:
        room = ((0, 0), (0, 0), (0, L), (0, 0), (0, 0))
        cache = Cache(
            k_YBTKH=jnp.pad(jnp.take(cache.k_YBTKH, owner_B, axis=1), room),
            v_YBTKH=jnp.pad(jnp.take(cache.v_YBTKH, owner_B, axis=1), room),
            segments_BT=jnp.pad(jnp.take(cache.segments_BT, owner_B, axis=0), ((0, 0), (0, L))),
            length=cache.length,
        )
    slot_L = jnp.arange(L)
    positions_BL = start_B[:, None] + slot_L
    real_BL = (slot_L < length_B[:, None]).astype(jnp.int32)
    logits_BLV, _ = forward(cfg, params, tokens_BL, positions_BL, real_BL, cache)
    logprob_BL, lse_BL = token_logprobs(logits_BLV, labels_BL)
    best_BL = jnp.argmax(logits_BLV, axis=-1)
    end_B1 = jnp.maximum(length_B - 1, 0)[:, None]
    end_BV = jnp.take_along_axis(logits_BLV, end_B1[..., None], axis=1)[:, 0]
    logprob_BF = jnp.take_along_axis(end_BV, last_BF, axis=1) - jnp.take_along_axis(lse_BL, end_B1, axis=1)
    return logprob_BL, best_BL == labels_BL, logprob_BF, jnp.take_along_axis(best_BL, end_B1, axis=1) == last_BF
