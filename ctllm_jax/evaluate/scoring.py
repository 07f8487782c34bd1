"""The log-likelihood engine: what the model gives to continuations of contexts, in few compiled shapes.

Each request is padded on the right to a bucketed length and batched with others of its bucket; a bucket's
batch always has the same number of rows. So for one `batch_tokens` the order of the requests does not change
a bit of the result; between different `batch_tokens` only the rounding of matrix products can.

Legend: B rows, L length, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.generate import bucket
from ctllm_jax.loading import LoadedModel, check_ids
from ctllm_jax.losses import token_logprobs
from ctllm_jax.model import ModelConfig, forward

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Score:
    """A continuation's score.

    Attributes:
      sum_logprob: log-probability in nats, summed over its tokens.
      tokens: number of its tokens.
      is_greedy: whether greedy decoding would give it.
      cut: tokens of the context that did not fit and were left out, from its beginning.
    """

    sum_logprob: float
    tokens: int
    is_greedy: bool
    cut: int


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, bos: bool) -> tuple[list[int], list[int]]:
    """Ids of (context, continuation), as lm-eval-harness splits them.

    White space at the context's end moves to the continuation; both together are encoded, and the
    continuation is what goes beyond the context's own ids. An empty context becomes the opening id.

    Raises:
      UserError: the continuation adds no token to its context.
    """
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    opening = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    prefix = [opening] if bos or not context else []
    whole, start = tokenizer.encode_batch([context + continuation, context])
    if len(whole) <= len(start):
        raise UserError(f"the continuation {continuation!r} adds no token after {context[-40:]!r}")
    return prefix + start, whole[len(start) :]


def score(
    model: LoadedModel, requests: Sequence[tuple[Ids, Ids]], batch_tokens: int, label: str = "score"
) -> list[Score]:
    """Scores (context ids, continuation ids) pairs, in the order given.

    Args:
      model: whose probabilities; its context length bounds context + continuation - 1.
      requests: at least one id on either side.
      batch_tokens: most tokens of a batch (a batch has one row at least); decides speed and memory.
      label: what the progress line says.

    Raises:
      UserError: an empty side, a continuation longer than the context length, or ids unknown to the model.
    """
    most = model.config.max_length
    sequences, cuts = [], []
    for number, (context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= most:
            raise UserError(
                f"request {number}: {len(context)} context and {len(continuation)} continuation tokens; "
                f"there must be at least 1, and 1 to {most} ({model.name})"
            )
        cuts.append(max(0, len(context) + len(continuation) - 1 - most))
        sequences.append([*context, *continuation][cuts[-1] :])
    check_ids(model, sequences)
    buckets: dict[int, list[int]] = {}
    for number, ids in enumerate(sequences):
        buckets.setdefault(bucket(len(ids) - 1, most), []).append(number)
    scores: list[Score | None] = [None] * len(sequences)
    with Progress(label, len(sequences), "requests") as progress:
        for L, numbers in sorted(buckets.items()):
            B = max(1, batch_tokens // L)
            for start in range(0, len(numbers), B):
                rows = numbers[start : start + B]
                logprob_BL, hit_BL = _score_rows(model, [sequences[i] for i in rows], B, L)
                for row, i in enumerate(rows):
                    last = len(sequences[i]) - 1
                    span = slice(last - len(requests[i][1]), last)
                    total = float(np.sum(logprob_BL[row, span], dtype=np.float64))
                    scores[i] = Score(total, span.stop - span.start, bool(hit_BL[row, span].all()), cuts[i])
                progress.add(len(rows))
    return scores


def rolling(model: LoadedModel, documents: Sequence[Ids], opening: int, batch_tokens: int) -> list[Score]:
    """Scores whole documents, every token once, in disjoint windows of the context length (as lm-eval-harness
    does).

    The first window follows the `opening` id alone; each later one is conditioned on as many earlier tokens
    as fit. `Score.cut` is 0: nothing is left out of the sum.
    """
    most, requests, owners = model.config.max_length, [], []
    for number, ids in enumerate(documents):
        opened = [opening, *ids]
        for start in range(0, len(ids), most):
            stop = min(start + most, len(ids))
            requests.append((opened[max(0, stop - most) : start + 1], opened[start + 1 : stop + 1]))
            owners.append(number)
    parts: list[list[Score]] = [[] for _ in documents]
    for owner, part in zip(owners, score(model, requests, batch_tokens, "rolling"), strict=True):
        parts[owner].append(part)
    return [
        Score(sum(p.sum_logprob for p in own), sum(p.tokens for p in own), all(p.is_greedy for p in own), 0)
        for own in parts
    ]


def _score_rows(model: LoadedModel, sequences: list[list[int]], B: int, L: int) -> tuple[np.ndarray, np.ndarray]:
    """(log-probability of each next token, whether it is the most probable one), [B, L]."""
    tokens_BL, labels_BL, segments_BL = (np.zeros((B, L), np.int32) for _ in range(3))
    for row, ids in enumerate(sequences):
        n = len(ids) - 1
        tokens_BL[row, :n], labels_BL[row, :n], segments_BL[row, :n] = ids[:-1], ids[1:], 1
    positions_BL = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    return jax.device_get(
        next_token_logprobs(model.config, model.params, tokens_BL, positions_BL, segments_BL, labels_BL)
    )


@functools.partial(jax.jit, static_argnums=0)
def next_token_logprobs(
    cfg: ModelConfig,
    params: dict,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    labels_BL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each label fp32, whether it is the argmax), both [B, L]."""
    logits_BLV, _ = forward(cfg, params, tokens_BL, positions_BL, segments_BL)
    return token_logprobs(logits_BLV, labels_BL)[0], jnp.argmax(logits_BLV, axis=-1) == labels_BL
