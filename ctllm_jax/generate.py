"""The likeliest ids after many prompts at once: batched decoding with a key/value cache, in few compiled shapes.

Benchmarks decode so: the whole batch stays on the device until its last row has stopped. Texts that are sampled, that
stream, end with stop strings or come one by one are decoded in slots (`ctllm_jax.slots`).

Prompts are padded on the left to a bucketed length, so that every row's next token falls into the same cache slot;
padding carries segment 0, which no token sees. What a row goes on with depends on its prompt alone, never on its
neighbours.

Legend: B rows of a batch, L prompt slots, P of them without the last, S most new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.chat import ChatTemplate
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.loading import LoadedModel, check_ids
from ctllm_jax.model import ModelConfig, forward, init_cache

BATCH_ROWS = 16  # most prompts decoded together
SHORTEST_BUCKET = 32  # slots; prompt lengths and token limits are rounded up to this times a power of two


def generate(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Iterable[int],
) -> list[list[int]]:
    """Continues each prompt, with the most probable token each time.

    Args:
      model: whose tokens.
      prompts: ids, at least one each, fewer than the context.
      max_tokens: most new tokens; a row also ends where the model's context is full.
      stop_ids: ids after which a row ends.

    Returns:
      The new ids of each prompt, up to and including the stop id if one came.

    Raises:
      UserError: a prompt is empty, fills the context, or holds ids that the model does not know.
    """
    limit = model.config.max_length
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < limit:
            raise UserError(f"prompt {number} has {len(prompt)} tokens; there must be 1 to {limit - 1} ({model.name})")
    check_ids(model, prompts)
    config = decodable(model.config, model.tokenizer)
    stops = jnp.asarray(sorted(set(stop_ids)) or [-1], jnp.int32)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    outputs: list[list[int]] = [[] for _ in prompts]
    with Progress("generate", len(prompts), "prompts") as progress, model.in_use():
        for start in range(0, len(order), BATCH_ROWS):
            rows = order[start : start + BATCH_ROWS]
            batch = _pad([prompts[i] for i in rows], min(max_tokens, limit), limit)
            steps = bucket(min(max_tokens, limit), limit)
            new_BS, count_B = jax.device_get(_decode(config, steps, model.params, *batch, stops))
            for row, i in enumerate(rows):
                outputs[i] = new_BS[row, : count_B[row]].tolist()
            progress.add(len(rows))
    return outputs


def decodable(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model as one that gives probability only to ids that the tokenizer has too."""
    return dataclasses.replace(config, vocab_size=min(config.vocab_size, tokenizer.vocab_size))


def bucket(length: int, most: int) -> int:
    """The next of 32, 64, 128, ... that holds `length`, but `most` at most."""
    size = SHORTEST_BUCKET
    while size < length:
        size *= 2
    return max(length, min(size, most))


def _pad(prompts: Sequence[Sequence[int]], max_tokens: int, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens_BL, first_B: slot of the first real token, limit_B: new tokens allowed)."""
    B = 1 << (len(prompts) - 1).bit_length()  # powers of two: few shapes
    L = bucket(max(len(prompt) for prompt in prompts), limit)
    tokens_BL = np.zeros((B, L), np.int32)
    first_B, limit_B = np.full(B, L, np.int32), np.zeros(B, np.int32)
    for place, prompt in enumerate(prompts):
        tokens_BL[place, L - len(prompt) :] = prompt
        first_B[place] = L - len(prompt)
        limit_B[place] = min(max_tokens, limit - len(prompt))
    return tokens_BL, first_B, limit_B


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(
    cfg: ModelConfig,
    S: int,
    params: dict,
    tokens_BL: jax.Array,
    first_B: jax.Array,
    limit_B: jax.Array,
    stops: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Prefill, then one token a step until every row has stopped: (new_BS, number of new tokens of each row)."""
    B, L = tokens_BL.shape
    # All but the last token, whose logits are the first that anybody reads.
    slot_P = jnp.arange(L - 1)
    positions_BP = jnp.maximum(slot_P - first_B[:, None], 0)
    segments_BP = (slot_P >= first_B[:, None]).astype(jnp.int32)
    _, cache = forward(cfg, params, tokens_BL[:, :-1], positions_BP, segments_BP, init_cache(cfg, B, L + S))

    def unfinished(state):
        step, done_B = state[0], state[1]
        return (step < S) & ~jnp.all(done_B)

    def advance(state):
        step, done_B, count_B, token_B, new_BS, cache = state
        position_B1 = (L - 1 + step - first_B)[:, None]
        logits_B1V, cache = forward(cfg, params, token_B[:, None], position_B1, jnp.ones((B, 1), jnp.int32), cache)
        token_B = jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32)
        new_BS = jax.lax.dynamic_update_slice_in_dim(new_BS, token_B[:, None], step, axis=1)
        count_B = count_B + ~done_B
        done_B = done_B | jnp.isin(token_B, stops) | (count_B >= limit_B)
        return step + 1, done_B, count_B, token_B, new_BS, cache

    new_BS, count_B = jnp.zeros((B, S), jnp.int32), jnp.zeros(B, jnp.int32)
    state = (jnp.int32(0), limit_B == 0, count_B, tokens_BL[:, -1], new_BS, cache)
    state = jax.lax.while_loop(unfinished, advance, state)
    return state[4], state[2]


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[dict], template: ChatTemplate | None) -> list[int]:
    """Ids of a prompt: a conversation or a user's message in the template, or, without one, plain text to go on from.

    Plain text opens a document (`Tokenizer.opening_id`).
    """
    if template:
        return template.render_prompt(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])
    return [tokenizer.opening_id, *tokenizer.encode(prompt)]
