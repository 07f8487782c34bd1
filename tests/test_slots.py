"""Slots: the texts of the batched decoder, whoever comes and goes beside them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_model

from ctllm_jax import slots
from ctllm_jax.common.errors import UserError
from ctllm_jax.generate import generate
from ctllm_jax.model import forward
from ctllm_jax.sampling import Options, SamplingConfig, choose
from ctllm_jax.slots import CHUNK, Decoder, Request

GREEDY = SamplingConfig(max_tokens=12, temperature=0.0, top_k=0, top_p=1.0, seed=0)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, top_k=40, top_p=0.9, seed=5)
FORWARD, CHOOSE = jax.jit(forward, static_argnums=0), jax.jit(choose)
RANDOM = np.random.default_rng(0)
# Of one token, less than a chunk, one chunk and the token that follows, several chunks.
PROMPTS = [RANDOM.integers(40, 360, size).tolist() for size in (1, 5, CHUNK, CHUNK + 1, CHUNK + 2, 3 * CHUNK, 17)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_length=500)


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, 4)


class Heard:
    """A request, and what came of it."""

    def __init__(self, prompt, sampling=GREEDY, stop_ids=(), row=0):
        self.parts, self.reason = [], None
        self.request = Request(list(prompt), sampling, frozenset(stop_ids), self.deliver, row)

    @property
    def text(self):
        return "".join(self.parts)

    def deliver(self, text, reason):
        assert self.reason is None
        self.parts.append(text)
        self.reason = reason


def heard(decoder, *requests: Heard) -> list[str]:
    for own in requests:
        decoder.submit(own.request)
    while not decoder.idle:
        decoder.advance()
    return [own.text for own in requests]


def batched(model):
    return generate(model, PROMPTS, max_tokens=GREEDY.max_tokens, stop_ids=())


def without_cache(model, prompt: list[int], sampling: SamplingConfig, row: int) -> list[int]:
    """New ids, one whole forward pass for each: the seed, the row and the number of new ids choose."""
    L, ids = 512, list(prompt)
    row_key = jax.random.fold_in(jax.random.key(sampling.seed), row)
    for count in range(sampling.max_tokens):
        tokens_1L = np.zeros((1, L), np.int32)
        tokens_1L[0, : len(ids)] = ids
        real_1L = (np.arange(L) < len(ids)).astype(np.int32)[None]
        logits_1LV, _ = FORWARD(model.config, model.params, tokens_1L, np.arange(L, dtype=np.int32)[None], real_1L)
        logits_1V, key = logits_1LV[:, len(ids) - 1], jax.random.fold_in(row_key, count)
        ids.append(int(CHOOSE(logits_1V, jnp.zeros(logits_1V.shape, bool), Options.of([sampling]), key[None])[0]))
    return ids[len(prompt) :]


def test_texts_are_those_of_the_batched_decoder(model, decoder):
    """More prompts than slots, so every slot is used again."""
    found = heard(decoder, *(Heard(prompt, row=row) for row, prompt in enumerate(PROMPTS)))
    assert found == [model.tokenizer.decode(ids) for ids in batched(model)]


def test_sampled_texts_are_those_of_the_model_without_a_cache(model, decoder):
    found = heard(decoder, *(Heard(prompt, SAMPLED, row=row) for row, prompt in enumerate(PROMPTS)))
    ids = [without_cache(model, prompt, SAMPLED, row) for row, prompt in enumerate(PROMPTS)]
    assert found == [model.tokenizer.decode(own) for own in ids]


def test_a_text_does_not_depend_on_neighbours_slot_or_time(decoder):
    alone = [heard(decoder, Heard(prompt, SAMPLED))[0] for prompt in PROMPTS]
    others = [Heard(prompt, dataclasses.replace(SAMPLED, seed=9, max_tokens=3)) for prompt in PROMPTS]
    own = [Heard(prompt, SAMPLED) for prompt in PROMPTS]
    for one, other in zip(own, reversed(others), strict=True):
        decoder.submit(other.request)
        decoder.advance()
        decoder.submit(one.request)
    assert heard(decoder) == [] and [one.text for one in own] == alone
    assert heard(decoder, Heard(PROMPTS[0], dataclasses.replace(SAMPLED, seed=6))) != alone[:1]


def test_where_a_text_ends(model, decoder):
    ids = batched(model)[1]
    whole = model.tokenizer.decode(ids)
    stop_id = Heard(PROMPTS[1], stop_ids=[ids[4]])
    first = ids.index(ids[4])
    assert heard(decoder, stop_id) == [model.tokenizer.decode(ids[:first])]
    assert (stop_id.reason, stop_id.request.tokens) == ("stop", first + 1)

    middle = whole[len(whole) // 2 :][:2]
    stop_string = Heard(PROMPTS[1], dataclasses.replace(GREEDY, stop=(middle, "never")))
    assert heard(decoder, stop_string) == [whole[: whole.index(middle)]]
    assert stop_string.reason == "stop" and stop_string.request.tokens < 12

    full = Heard(PROMPTS[1] * 99 + [7], dataclasses.replace(GREEDY, max_tokens=50))  # 496 of 500
    heard(decoder, full)
    assert (full.reason, full.request.tokens) == ("length", 4)


def test_a_cancelled_request_frees_its_slot(decoder):
    long = [Heard(PROMPTS[1], dataclasses.replace(GREEDY, max_tokens=400)) for _ in range(5)]
    for own in long:
        decoder.submit(own.request)
    for _ in range(6):
        decoder.advance()
    assert decoder.waiting == 1
    before = [own.text for own in long]
    assert all(before[:2])
    for own in long:
        own.request.cancelled = True
    after = Heard(PROMPTS[1])
    decoder.submit(after.request)
    decoder.advance()
    assert decoder.waiting == 0 and [own.text for own in long] == before
    heard(decoder)
    assert long[0].text.startswith(after.text[:5]) and after.reason == "length"


def test_a_long_prompt_keeps_nobody_waiting(decoder):
    short, long = Heard(PROMPTS[1], dataclasses.replace(GREEDY, max_tokens=30)), Heard(PROMPTS[5])
    decoder.submit(short.request)
    decoder.advance()
    decoder.submit(long.request)
    tokens = [short.request.tokens]
    while not long.request.tokens:
        decoder.advance()
        tokens.append(short.request.tokens)
    assert tokens == [1, 2, 3, 4]  # a token for every chunk
    heard(decoder)


def test_what_cannot_be_continued_is_refused(model, decoder):
    for prompt, message in (([], "has 0 tokens"), ([1] * 500, "has 500"), ([1, 384], "id 384")):
        with pytest.raises(UserError, match=message):
            decoder.submit(Request(prompt, GREEDY, frozenset(), print))
    with pytest.raises(UserError, match="context 2 to 500"):
        Decoder(model, 1, 501)


def test_two_programs_are_all(decoder):
    """The penalty, greedy and sampled rows side by side: nothing is compiled again."""
    sizes = slots._read._cache_size(), slots.decode_step._cache_size()
    rows = [dataclasses.replace(SAMPLED, repetition_penalty=1.5, min_p=0.1), GREEDY, SAMPLED]
    heard(decoder, *(Heard(prompt, row) for prompt, row in zip(PROMPTS[:3], rows, strict=True)))
    assert (slots._read._cache_size(), slots.decode_step._cache_size()) == sizes
