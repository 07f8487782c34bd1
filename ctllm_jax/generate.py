"""Text from a model: batched decoding with a key/value cache, in few compiled shapes.

Prompts are padded on the left to a bucketed length, so that every row's next token falls into the same cache
slot; padding carries segment 0, which no token sees. A row's sample depends on its prompt, its place in the
list and the seed, never on its neighbours.

Legend: B rows of a batch, L prompt slots, S most new tokens, V vocabulary.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import identity, read_jsonl, write_atomic
from ctllm_jax.common.manifest import open_stage
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.chat import ChatTemplate, check_messages, own_template
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.loading import LoadedModel, check_ids, load_model
from ctllm_jax.model import ModelConfig, forward, init_cache

BATCH_ROWS = 16  # most prompts decoded together
SHORTEST_BUCKET = 32  # slots; prompt lengths and token limits are rounded up to this times a power of two


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_tokens: int  # most new tokens of a sample
    temperature: float  # 0 takes the most probable token
    top_k: int  # only the k most probable tokens; 0 is all
    top_p: float  # only the most probable tokens that together reach this probability; 1 is all
    seed: int

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens} is below 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What `ctllm generate` reads."""

    model: str  # run directory or Hugging Face folder
    step: int | None  # checkpoint of a run; None is the newest
    dtype: str | None  # compute dtype; None is the model's own
    prompts: tuple[str, ...]
    input: str | None  # JSON lines with "prompt" (text) or "messages" (a conversation), after `prompts`
    chat: bool  # wrap plain prompts as a user's message in the chat template
    sampling: SamplingConfig


def generate(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_ids: Iterable[int],
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      model: whose tokens.
      prompts: ids, at least one each, fewer than the context.
      max_tokens: most new tokens; a row also ends where the model's context is full.
      temperature, top_k, top_p, seed: as in `SamplingConfig`.
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
    with Progress("generate", len(prompts), "prompts") as progress:
        for start in range(0, len(order), BATCH_ROWS):
            rows = order[start : start + BATCH_ROWS]
            batch = _pad([prompts[i] for i in rows], rows, min(max_tokens, limit), limit)
            new_BS, count_B = _decode(
                config,
                bucket(min(max_tokens, limit), limit),
                temperature > 0,
                model.params,
                *batch,
                stops,
                jnp.float32(temperature or 1.0),
                jnp.int32(top_k or model.config.padded_vocab_size),
                jnp.float32(top_p),
                jax.random.key(seed),
            )
            new_BS, count_B = jax.device_get((new_BS, count_B))
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


def _pad(prompts, rows: list[int], max_tokens: int, limit: int) -> tuple[np.ndarray, ...]:
    """(tokens_BL, first_B: slot of the first real token, limit_B: new tokens allowed, row_B: number in the
    list)."""
    B = 1 << (len(prompts) - 1).bit_length()  # powers of two: few shapes
    L = bucket(max(len(prompt) for prompt in prompts), limit)
    tokens_BL = np.zeros((B, L), np.int32)
    first_B, limit_B, row_B = np.full(B, L, np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
    for place, prompt in enumerate(prompts):
        tokens_BL[place, L - len(prompt) :] = prompt
        first_B[place] = L - len(prompt)
        limit_B[place] = min(max_tokens, limit - len(prompt))
        row_B[place] = rows[place]
    return tokens_BL, first_B, limit_B, row_B


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(
    cfg: ModelConfig,
    S: int,
    sampled: bool,
    params: dict,
    tokens_BL: jax.Array,
    first_B: jax.Array,
    limit_B: jax.Array,
    row_B: jax.Array,
    stops: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Prefill, then one token a step until every row has stopped. Returns (new_BS, number of new tokens of
    each row)."""
    B, L = tokens_BL.shape
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)

    def choose(logits_BV: jax.Array, step: jax.Array) -> jax.Array:
        if not sampled:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        logits_BV = keep_likely(logits_BV / temperature, top_k, top_p)
        step_keys_B = jax.vmap(lambda row_key: jax.random.fold_in(row_key, step))(keys_B)
        return jax.vmap(jax.random.categorical)(step_keys_B, logits_BV).astype(jnp.int32)

    slot_L = jnp.arange(L)
    positions_BL = jnp.maximum(slot_L - first_B[:, None], 0)
    segments_BL = (slot_L >= first_B[:, None]).astype(jnp.int32)
    logits_BLV, cache = forward(cfg, params, tokens_BL, positions_BL, segments_BL, init_cache(cfg, B, L + S))

    def unfinished(state):
        step, done_B = state[0], state[1]
        return (step < S) & ~jnp.all(done_B)

    def advance(state):
        step, done_B, count_B, logits_BV, new_BS, cache = state
        token_B = choose(logits_BV, step)
        new_BS = jax.lax.dynamic_update_slice_in_dim(new_BS, token_B[:, None], step, axis=1)
        count_B = count_B + ~done_B
        done_B = done_B | jnp.isin(token_B, stops) | (count_B >= limit_B)
        position_B1 = (L + step - first_B)[:, None]
        logits_B1V, cache = forward(cfg, params, token_B[:, None], position_B1, jnp.ones((B, 1), jnp.int32), cache)
        return step + 1, done_B, count_B, logits_B1V[:, 0], new_BS, cache

    new_BS, count_B = jnp.zeros((B, S), jnp.int32), jnp.zeros(B, jnp.int32)
    state = (jnp.int32(0), limit_B == 0, count_B, logits_BLV[:, -1], new_BS, cache)
    state = jax.lax.while_loop(unfinished, advance, state)
    return state[4], state[2]


def keep_likely(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets to -inf all but the `top_k` largest logits and, of those, the fewest that reach probability
    `top_p`."""
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    sorted_BV = jnp.where(jnp.arange(sorted_BV.shape[-1]) < top_k, sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = (before_BV < top_p) & (sorted_BV > -jnp.inf)
    threshold_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[dict], template: ChatTemplate | None) -> list[int]:
    """Ids of a prompt: a conversation or a user's message in the template, or, without one, plain text to go on from.

    Plain text opens a document: after the beginning-of-document id, or the end-of-document id where there is
    none.
    """
    if template:
        return template.render_prompt(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])
    opening = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return [opening, *tokenizer.encode(prompt)]


def sample(model: LoadedModel, prompts: Sequence[str | list[dict]], chat: bool, config: SamplingConfig) -> list[dict]:
    """Samples for prompts: {"prompt", "text", "tokens", "finished": whether it stopped by itself} each."""
    talks = [chat or isinstance(prompt, list) for prompt in prompts]
    template = own_template(model.tokenizer) if any(talks) else None
    stop_ids = {model.tokenizer.eos_id, *(template.end_ids if template else ())}
    encoded = [
        encode_prompt(model.tokenizer, prompt, template if talk else None)
        for prompt, talk in zip(prompts, talks, strict=True)
    ]
    outputs = generate(model, encoded, **dataclasses.asdict(config), stop_ids=stop_ids)
    return [
        {
            "prompt": prompt,
            "text": model.tokenizer.decode([i for i in ids if i not in stop_ids]),
            "tokens": len(ids),
            "finished": bool(ids) and ids[-1] in stop_ids,
        }
        for prompt, ids in zip(prompts, outputs, strict=True)
    ]


def read_prompts(file: str) -> list[str | list[dict]]:
    """Prompts of a JSON-lines file; UserError naming the line that has neither "prompt" nor sound
    "messages"."""
    prompts: list[str | list[dict]] = []
    for number, entry in enumerate(read_jsonl(file), 1):
        if isinstance(entry.get("prompt"), str):
            prompts.append(entry["prompt"])
            continue
        problem = check_messages(entry.get("messages"))
        if problem:
            raise UserError(f'{file}: entry {number}: no "prompt" text, and {problem}')
        prompts.append(entry["messages"])
    return prompts


def write_samples(path, samples: Iterable[dict]) -> None:
    """JSON lines, one sample each."""
    write_atomic(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in samples))


def run(config: GenerateConfig, workdir: str) -> dict:
    """Writes {workdir}/samples.jsonl and prints the samples."""
    prompts = [*config.prompts, *(read_prompts(config.input) if config.input else [])]
    if not prompts:
        raise UserError("generate: give config.prompts or config.input")
    model = load_model(config.model, config.step, config.dtype)
    settings = {**dataclasses.asdict(config), "model": None, "step": None, "input": None}
    inputs = {"model": model.digest, "input": identity(config.input) if config.input else None}
    stage = open_stage("generate", 1, workdir, settings, inputs)
    if not stage.done:
        samples = sample(model, prompts, config.chat, config.sampling)
        write_samples(stage.folder / "samples.jsonl", samples)
        stage.finish({"model": model.name, "samples": len(samples), "tokens": sum(s["tokens"] for s in samples)})
    for entry in read_jsonl(stage.folder / "samples.jsonl"):
        prompt = entry["prompt"] if isinstance(entry["prompt"], str) else entry["prompt"][-1]["content"]
        print(f"--- {prompt}\n{entry['text']}")
    return stage.result
