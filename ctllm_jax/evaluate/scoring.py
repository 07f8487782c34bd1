"""Requests to the log-likelihood engine: continuations of contexts, whole documents, as lm-eval-harness words them.

Legend: B rows, L length, V vocabulary.
"""

import functools
from collections.abc import Sequence

import jax

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.evaluate.engine import Request, Score
from ctllm_jax.loading import LoadedModel
from ctllm_jax.losses import token_logprobs
from ctllm_jax.model import ModelConfig, forward

Ids = Sequence[int]


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], bos: bool
) -> list[tuple[list[int], list[int]]]:
    """Ids of (context, continuation) pairs, as lm-eval-harness splits them.

    White space at the context's end moves to the continuation; both together are encoded, and the
    continuation is what goes beyond the context's own ids. An empty context becomes the opening id.

    Raises:
      UserError: a continuation adds no token to its context.
    """
    split = [(context.rstrip(), context + continuation) for context, continuation in pairs]
    texts = list(dict.fromkeys(text for pair in split for text in pair))
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    encoded = []
    for (context, text), (_, continuation) in zip(split, pairs, strict=True):
        start, whole = ids[context], ids[text]
        if len(whole) <= len(start):
            raise UserError(f"the continuation {continuation!r} adds no token after {context[-40:]!r}")
        encoded.append(([tokenizer.opening_id] * (bos or not context) + start, whole[len(start) :]))
    return encoded


def fitted(model: LoadedModel, context: Ids, continuation: Ids, name: int | str) -> Request:
    """A request that fits the model: what is too long loses the beginning of its context, as in lm-eval-harness.

    Raises:
      UserError: an empty side, or a continuation longer than the model's context; `name` says of which request.
    """
    most = model.config.max_length
    if not context or not 0 < len(continuation) <= most:
        raise UserError(
            f"request {name}: {len(context)} context and {len(continuation)} continuation tokens; "
            f"there must be at least 1, and 1 to {most} ({model.name})"
        )
    cut = max(0, len(context) + len(continuation) - 1 - most)
    return Request([*context, *continuation][cut:], len(context) - cut, cut)


def no_number(model: LoadedModel, place: str) -> UserError:
    """The error for a log-probability that is NaN, of what `place` names. Minus infinity, of what a model holds for
    impossible, is one to go by; NaN would be the largest of all."""
    return UserError(
        f"{place}: {model.name} gives a log-probability that is NaN. Its parameters hold NaN, or numbers too large for "
        "its dtype: take an earlier checkpoint (config.step), or config.dtype=float32"
    )


def windows(model: LoadedModel, ids: Ids, opening: int) -> list[Request]:
    """A whole document, every token scored once, in disjoint windows of the context length (as lm-eval-harness does).

    The first window follows the `opening` id alone; each later one is conditioned on as many earlier tokens as fit.
    """
    most, opened = model.config.max_length, [opening, *ids]
    found = []
    for start in range(0, len(ids), most):
        stop = min(start + most, len(ids))
        found.append(fitted(model, opened[max(0, stop - most) : start + 1], opened[start + 1 : stop + 1], start))
    return found


def joined(scores: Sequence[Score]) -> Score:
    """A document's score from those of its windows. `cut` is 0: nothing is left out of the sum."""
    total, tokens = sum(window.sum_logprob for window in scores), sum(window.tokens for window in scores)
    return Score(total, tokens, all(window.is_greedy for window in scores), 0, total, tokens + 1)


@functools.partial(jax.jit, static_argnums=0)
def next_token_logprobs(
    cfg: ModelConfig,
    params: dict,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    labels_BL: jax.Array,
) -> jax.Array:
    """Log-probability of each label, fp32 [B, L]."""
    logits_BLV, _ = forward(cfg, params, tokens_BL, positions_BL, segments_BL)
    return token_logprobs(logits_BLV, labels_BL)[0]
