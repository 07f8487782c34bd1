"""The log-likelihood engine: what a model gives to sequences, each shared beginning computed once.

Requests come in groups, the options of a question. Sequences that differ in their last id alone are one piece, which is
asked for several last ids. What pieces begin with alike (the few-shot examples of a subject, the question before its
options) is computed once and read by all that go on from it; of three plans, nothing shared, shared within groups,
shared by all, the one with the fewest padded tokens is taken. What is left of the pieces is packed into rows.

Shapes are few: lengths are rounded up to powers of two, and neither a length nor a sharing plan is used that does not
save most of a batch. A shape has one of two numbers of rows. So for one `batch_tokens` the order of the
requests does not change a bit of the result; between different `batch_tokens` only the rounding of matrix products can.

Legend: B rows, L length, G shared beginnings, P their length, E pieces, F last ids, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.common.progress import Progress
from ctllm_jax.evaluate.cache import named
from ctllm_jax.evaluate.pieces import Piece, Row, Share, most_pieces, pack, padded_beginning, plan, unique
from ctllm_jax.kv_cache import Cache
from ctllm_jax.loading import LoadedModel, check_ids
from ctllm_jax.losses import token_logprobs
from ctllm_jax.model import ModelConfig, forward, init_cache

LAST_IDS = 4  # most last ids that one piece is asked for


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

    @functools.cached_property
    def name(self) -> bytes:
        """Names what decides the score (see `cache`)."""
        return named("score", self.start, ids=self.ids)

    def kept(self, answer: "Score") -> list:
        """What of a score the request does not say itself."""
        return [answer.sum_logprob, answer.whole_logprob, answer.is_greedy]

    def restored(self, kept: Sequence) -> "Score":
        """The score of which this was kept."""
        sum_logprob, whole_logprob, is_greedy = kept
        length = len(self.ids)
        return Score(sum_logprob, length - self.start, is_greedy, self.cut, whole_logprob, length)


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
    placed = _placed(groups)
    own = [unique(piece for piece, _ in group) for group in placed]
    shares = plan(own, model.config.max_length, batch_tokens)
    with Progress(label, sum(len(share.pieces) for share in shares), "pieces") as progress, model.in_use():
        _run(model, shares, batch_tokens, progress)
    return [
        [_score(request, *place) for request, place in zip(group, places, strict=True)]
        for group, places in zip(groups, placed, strict=True)
    ]


def _placed(groups: Sequence[Sequence[Request]]) -> list[list[tuple[Piece, int]]]:
    """The piece of each request, and which of its last ids is the request's; the order of the requests decides
    nothing of the pieces."""
    split = [[(tuple(request.ids[:-1]), request.ids[-1]) for request in group] for group in groups]
    asked: dict[tuple, set[int]] = {}
    for group in split:
        for ids, last in group:
            asked.setdefault(ids, set()).add(last)
    places: dict[tuple, dict[int, tuple[Piece, int]]] = {}
    for ids, lasts in asked.items():
        pieces = [Piece(ids, sorted(lasts)[start : start + LAST_IDS]) for start in range(0, len(lasts), LAST_IDS)]
        places[ids] = {last: (piece, number) for piece in pieces for number, last in enumerate(piece.last)}
    return [[places[ids][last] for ids, last in group] for group in split]


def _score(request: Request, piece: Piece, last: int) -> Score:
    inner = len(piece.ids) - 1
    logprobs = np.append(piece.logprobs[:inner], piece.logprobs[inner + last]).astype(np.float64)
    hits = np.append(piece.hits[:inner], piece.hits[inner + last])
    own = slice(request.start - 1, None)
    return request.restored([float(logprobs[own].sum()), float(logprobs.sum()), bool(hits[own].all())])


def _run(model: LoadedModel, shares: list[Share], batch_tokens: int, progress: Progress) -> None:
    most = model.config.max_length
    by_length: dict[int, list[Share]] = {}
    for share in shares:
        by_length.setdefault(padded_beginning(share.length, most), []).append(share)
    for P, own in sorted(by_length.items()):
        G = 1 if P == 0 or len(shares) == 1 else max(1, batch_tokens // P)
        own = sorted(own, key=lambda share: min(piece.ids for piece in share.pieces))
        for start in range(0, len(own), G):
            chunk = own[start : start + G]
            cache = _fill(model, chunk, G, P) if P else None
            for L, rows in pack(chunk, most, batch_tokens).items():
                # Of several beginnings every row has one of its own, as a rule; of one beginning there are many rows.
                B = max(1, batch_tokens // L if G == 1 else min(G, batch_tokens // L))
                for first in range(0, len(rows), B):
                    batch = rows[first : first + B]
                    few = max(1, B // 4)  # what is left over in the end need not be padded to a whole batch
                    _batch(model, batch, cache, few if len(batch) <= few else B, L)
                    progress.add(sum(len(row.pieces) for row in batch))


def _fill(model: LoadedModel, chunk: list[Share], G: int, P: int) -> Cache:
    """Computes what the pieces of each share begin with."""
    tokens_GP, labels_GP, length_G = np.zeros((G, P), np.int32), np.zeros((G, P), np.int32), np.zeros(G, np.int32)
    for place, share in enumerate(chunk):
        ids = share.pieces[0].ids
        tokens_GP[place, : share.length] = ids[: share.length]
        labels_GP[place, : share.length] = ids[1 : share.length + 1]
        length_G[place] = share.length
    logprob_GP, hit_GP, cache = _prefill(model.config, model.params, tokens_GP, labels_GP, length_G)
    logprob_GP, hit_GP = jax.device_get((logprob_GP, hit_GP))
    for place, share in enumerate(chunk):
        for piece in share.pieces:
            piece.add(logprob_GP[place, : share.length], hit_GP[place, : share.length])
    return cache


def _batch(model: LoadedModel, rows: list[Row], cache: Cache | None, B: int, L: int) -> None:
    """Computes the pieces of the rows, from where their beginnings end."""
    tokens_BL, labels_BL, positions_BL, segments_BL = (np.zeros((B, L), np.int32) for _ in range(4))
    owner_B = np.zeros(B, np.int32)
    E = B * most_pieces(L)
    end_E, last_EF = np.zeros(E, np.int32), np.zeros((E, LAST_IDS), np.int32)
    placed: list[tuple[Piece, int, slice]] = []
    for place, row in enumerate(rows):
        owner_B[place] = row.owner
        stop = 0
        for number, piece in enumerate(row.pieces, start=1):
            ids = piece.ids[row.shared :]
            own = slice(stop, stop := stop + len(ids))
            tokens_BL[place, own], labels_BL[place, own.start : own.stop - 1] = ids, ids[1:]
            positions_BL[place, own], segments_BL[place, own] = np.arange(row.shared, len(piece.ids)), number
            end_E[len(placed)] = place * L + own.stop - 1
            last_EF[len(placed), : len(piece.last)] = piece.last
            placed.append((piece, place, own))
    rows_BL = tokens_BL, labels_BL, positions_BL, segments_BL
    found = _continue(model.config, model.params, cache, owner_B, *rows_BL, end_E, last_EF)
    logprob_BL, hit_BL, logprob_EF, hit_EF = jax.device_get(found)
    for number, (piece, place, own) in enumerate(placed):
        inner, last = slice(own.start, own.stop - 1), len(piece.last)
        piece.add(logprob_BL[place, inner], hit_BL[place, inner])
        piece.add(logprob_EF[number, :last], hit_EF[number, :last])


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
    tokens_BL: jax.Array,
    labels_BL: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    end_E: jax.Array,
    last_EF: jax.Array,
) -> tuple[jax.Array, ...]:
    """Rows that go on from row `owner_B` of the cache, or from nothing.

    Returns:
      (log-probability of each label, whether it is the argmax, both [B, L]; the same of the last ids of the pieces
      that end in slots `end_E`, counted through the rows, [E, F]).
    """
    owner_B = None if cache is None else owner_B
    logits_BLV, _ = forward(cfg, params, tokens_BL, positions_BL, segments_BL, cache, owner_B)
    logprob_BL, lse_BL = token_logprobs(logits_BLV, labels_BL)
    best_BL = jnp.argmax(logits_BLV, axis=-1)
    end_E1 = end_E[:, None]
    logits_EF = logits_BLV.reshape(-1, logits_BLV.shape[-1])[end_E1, last_EF]
    logprob_EF = logits_EF - lse_BL.reshape(-1)[end_E1]
    return logprob_BL, best_BL == labels_BL, logprob_EF, best_BL.reshape(-1)[end_E1] == last_EF
