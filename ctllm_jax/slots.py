"""Decoding for requests that come and go: a fixed number of slots, two compiled programs.

Each slot holds one request's cache. A prompt is read in chunks of one size, one chunk between two steps, so that a long
prompt keeps nobody waiting for long; a step gives every slot that is past its prompt its next token. A text depends on
its prompt and its sampling options alone, not on its slot or on who else is there.

What lies in a cache beyond a slot's length is left over from before. It is never seen: attention is causal, and each
place is written anew before a query stands at it or after it.

Legend: S slots, T cache places of a slot, C chunk, Y layers, K key/value heads, H head size, V vocabulary.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.streaming import StopFinder, detokenizer
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.generate import decodable
from ctllm_jax.kv_cache import Cache
from ctllm_jax.loading import LoadedModel, check_ids
from ctllm_jax.model import ModelConfig, forward, init_cache
from ctllm_jax.sampling import Options, SamplingConfig, choose

CHUNK = 128  # tokens of a prompt that are read at once


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt to go on from, and how far it has come.

    Attributes:
      deliver: called with each bit of text as it becomes certain, and with how the text ended: None while it goes on,
        then "stop" (a stop id or string came) or "length". Cancelled requests hear nothing more.
      row: its place in a list of prompts with one seed.
      cancelled: set by whoever wants no more of it; its slot is free after the next step.
      tokens: new tokens so far, with the stop id.
      read: tokens of the prompt that are in the cache.
    """

    prompt: list[int]
    sampling: SamplingConfig
    stop_ids: frozenset[int]
    deliver: Callable[[str, str | None], None]
    row: int = 0
    cancelled: bool = False
    tokens: int = 0
    read: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """What stays on the device between steps. The last token of a slot is not in its cache yet."""

    k_YSKTH: jax.Array
    v_YSKTH: jax.Array
    segments_ST: jax.Array
    length_S: jax.Array  # places of the cache that are filled
    token_S: jax.Array
    seen_SV: jax.Array  # tokens of the prompt and the answer, for the repetition penalty


class Decoder:
    """The slots and who waits for one. Not for several threads."""

    def __init__(self, model: LoadedModel, slots: int, context: int | None = None):
        """`context`: most tokens of a prompt and its answer; None is the model's.

        Raises:
          UserError: the model has no such context, or its tokenizer cannot be streamed.
        """
        limit = model.config.max_length
        if slots < 1 or not 2 <= (context or limit) <= limit:
            raise UserError(f"{model.name}: slots must be at least 1, the context 2 to {limit} tokens")
        detokenizer(model.tokenizer)
        self.model, self.context = model, context or limit
        self._config = dataclasses.replace(decodable(model.config, model.tokenizer), remat="none")
        self._chunk = min(CHUNK, self.context)
        places = -(-self.context // self._chunk) * self._chunk
        with model.in_use():
            cache = init_cache(self._config, slots, places)
        self._state = SlotState(
            cache.k_YBKTH,
            cache.v_YBKTH,
            cache.segments_BT,
            length_S=jnp.zeros(slots, jnp.int32),
            token_S=jnp.zeros(slots, jnp.int32),
            seen_SV=jnp.zeros((slots, model.config.padded_vocab_size), bool),
        )
        self._slots: list[Request | None] = [None] * slots
        self._texts: list[_Text | None] = [None] * slots
        self._reading: collections.deque[int] = collections.deque()  # slots whose prompt is not read to its end
        self._keys_S2 = np.array(jax.random.key_data(jax.random.split(jax.random.key(0), slots)))
        self._waiting: collections.deque[Request] = collections.deque()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not any(self._slots)

    @property
    def waiting(self) -> int:
        """How many requests have no slot yet."""
        return len(self._waiting)

    def refusal(self, prompt: list[int]) -> str | None:
        """Why a prompt cannot be continued, or None."""
        if not 0 < len(prompt) < self.context:
            return f"the prompt has {len(prompt)} tokens; there must be 1 to {self.context - 1} ({self.model.name})"
        try:
            check_ids(self.model, [prompt])
        except UserError as error:
            return str(error)
        return None

    def submit(self, request: Request) -> None:
        """Puts a request at the end of the line; UserError for one that cannot be continued."""
        if problem := self.refusal(request.prompt):
            raise UserError(problem)
        self._waiting.append(request)

    def advance(self) -> None:
        """Reads one chunk of one prompt and decodes one token for every slot whose prompt is read."""
        self._admit()
        if self._reading:
            self._read_chunk(self._reading[0])
        live = [slot for slot, request in enumerate(self._slots) if request and slot not in self._reading]
        if live:
            self._step(live)

    def _admit(self) -> None:
        """Frees the slots of cancelled requests and fills free ones."""
        self._slots = [None if request and request.cancelled else request for request in self._slots]
        self._reading = collections.deque(slot for slot in self._reading if self._slots[slot])
        self._waiting = collections.deque(request for request in self._waiting if not request.cancelled)
        for slot, request in enumerate(self._slots):
            if request is None and self._waiting:
                request = self._slots[slot] = self._waiting.popleft()
                self._reading.append(slot)
                self._texts[slot] = _Text(self.model.tokenizer, request.sampling.stop)
                key = jax.random.fold_in(jax.random.key(request.sampling.seed), request.row)
                self._keys_S2[slot] = jax.random.key_data(key)

    def _read_chunk(self, slot: int) -> None:
        request = self._slots[slot]
        start, end = request.read, min(request.read + self._chunk, len(request.prompt) - 1)
        tokens_C = np.zeros(self._chunk, np.int32)
        tokens_C[: end - start] = request.prompt[start:end]
        numbers = (np.int32(number) for number in (slot, start, end - start, request.prompt[end]))
        with self.model.in_use():
            self._state = _read(self._config, self.model.params, self._state, tokens_C, *numbers)
        request.read = end
        if end == len(request.prompt) - 1:
            self._reading.popleft()

    def _step(self, live: list[int]) -> None:
        requests = [self._slots[slot] if slot in live else None for slot in range(len(self._slots))]
        count_S = np.array([request.tokens if request else 0 for request in requests], np.int32)
        live_S = np.array([request is not None for request in requests])
        options = Options.of([request.sampling if request else None for request in requests])
        with self.model.in_use():
            self._state = decode_step(
                self._config, self.model.params, self._state, live_S, count_S, options, self._keys_S2
            )
        token_S = jax.device_get(self._state.token_S).tolist()
        for slot in live:
            if self._took(requests[slot], self._texts[slot], token_S[slot]):
                self._slots[slot] = None

    def _took(self, request: Request, text: "_Text", token: int) -> bool:
        """Hands on what a token gives; whether it was the last one."""
        request.tokens += 1
        if token in request.stop_ids:
            new, reason = text.finish(), "stop"
        else:
            new, reason = text.push(token), None
            if text.stopped:
                reason = "stop"
            elif request.tokens >= min(request.sampling.max_tokens, self.context - len(request.prompt)):
                new, reason = new + text.finish(), "stop" if text.stopped else "length"
        if (new or reason) and not request.cancelled:
            request.deliver(new, reason)
        return reason is not None


class _Text:
    """Ids to text that may be shown."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self._ids, self._stop = detokenizer(tokenizer), StopFinder(stop)

    @property
    def stopped(self) -> bool:
        return self._stop.found

    def push(self, token: int) -> str:
        return self._stop.push(self._ids.push(token))

    def finish(self) -> str:
        return self._stop.push(self._ids.finish()) + self._stop.finish()


# ---- The two programs


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(
    cfg: ModelConfig,
    params: dict,
    state: SlotState,
    tokens_C: jax.Array,
    slot: jax.Array,
    start: jax.Array,
    count: jax.Array,
    follows: jax.Array,
) -> SlotState:
    """Appends the first `count` of some tokens to a slot's cache, from place `start` on; `follows` comes next."""
    C = tokens_C.shape[0]
    real_C = jnp.arange(C) < count
    own = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=slot, slice_size=1)
    cache = Cache(own(state.k_YSKTH, axis=1), own(state.v_YSKTH, axis=1), own(state.segments_ST, axis=0), start)
    position_1C = (start + jnp.arange(C))[None]
    _, cache = forward(cfg, params, tokens_C[None], position_1C, real_C.astype(jnp.int32)[None], cache)
    seen_V = jnp.where(start == 0, False, state.seen_SV[slot])
    seen_V = seen_V.at[jnp.where(real_C, tokens_C, seen_V.shape[0])].set(True, mode="drop")
    put = jax.lax.dynamic_update_slice_in_dim
    return SlotState(
        put(state.k_YSKTH, cache.k_YBKTH, slot, axis=1),
        put(state.v_YSKTH, cache.v_YBKTH, slot, axis=1),
        put(state.segments_ST, cache.segments_BT, slot, axis=0),
        length_S=state.length_S.at[slot].set(start + count),
        token_S=state.token_S.at[slot].set(follows),
        seen_SV=state.seen_SV.at[slot].set(seen_V),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_step(
    cfg: ModelConfig,
    params: dict,
    state: SlotState,
    live_S: jax.Array,
    count_S: jax.Array,
    options: Options,
    keys_S2: jax.Array,
) -> SlotState:
    """Appends each live slot's token to its cache and chooses the next one; `count_S` are new ones it already has."""
    cache = Cache(state.k_YSKTH, state.v_YSKTH, state.segments_ST, state.length_S)
    token_S1, place_S1 = state.token_S[:, None], state.length_S[:, None]
    logits_S1V, cache = forward(cfg, params, token_S1, place_S1, jnp.ones_like(token_S1), cache)
    seen_SV = state.seen_SV | (jnp.arange(logits_S1V.shape[-1]) == token_S1)
    keys_S = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys_S2), count_S)
    token_S = choose(logits_S1V[:, 0], seen_SV, options, keys_S)
    return SlotState(
        cache.k_YBKTH,
        cache.v_YBKTH,
        cache.segments_BT,
        length_S=state.length_S + live_S,
        token_S=jnp.where(live_S, token_S, state.token_S),
        seen_SV=jnp.where(live_S[:, None], seen_SV, state.seen_SV),
    )
