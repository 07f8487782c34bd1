"""Decoding: the same as the uncached model, whoever else is in the batch."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from tiny_models import NO_REFERENCE, REFERENCE, tiny_model

from ctllm_jax.common.errors import UserError
from ctllm_jax.generate import generate
from ctllm_jax.loading import load_model
from ctllm_jax.model import forward

PROMPTS = [[1, 40, 50, 60, 70], [1, 33], [1, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89], [1, 33, 44]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def continue_without_cache(model, prompt, steps):
    """Greedy, one whole forward pass for each token (padded to one shape)."""
    run, ids = jax.jit(forward, static_argnums=0), list(prompt)
    for _ in range(steps):
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(ids)] = ids
        real = (np.arange(32) < len(ids)).astype(np.int32)[None]
        logits, _ = run(model.config, model.params, tokens, np.arange(32, dtype=np.int32)[None], real)
        ids.append(int(np.argmax(logits[0, len(ids) - 1])))
    return ids[len(prompt) :]


def test_greedy_decoding_equals_the_model_without_a_cache(model):
    found = generate(model, PROMPTS, max_tokens=12, stop_ids=[])
    assert found == [continue_without_cache(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa", "tiny_gqa_ref"])
def test_greedy_decoding_equals_that_of_transformers(name):
    reference, golden = load_model(str(REFERENCE / name)), np.load(REFERENCE / "logits.npz")
    prompt, whole = golden[f"{name}/greedy_prompt"].tolist(), golden[f"{name}/greedy_out"].tolist()
    stops = [reference.tokenizer.eos_id]
    found = generate(reference, [prompt], max_tokens=len(whole) - len(prompt), stop_ids=stops)
    assert found == [whole[len(prompt) :]]


def test_a_text_does_not_depend_on_its_neighbours(model):
    def first(others):
        return generate(model, [PROMPTS[0], *others], max_tokens=10, stop_ids=[])[0]

    alone = first([])
    assert first(PROMPTS[1:]) == alone
    assert first([[1] * 40] * 17) == alone  # a longer bucket, and more than one batch


def test_a_row_ends_with_its_stop_id_and_others_go_on(model):
    free = generate(model, PROMPTS, max_tokens=10, stop_ids=[])
    stop = free[0][4]
    stopped = generate(model, PROMPTS, max_tokens=10, stop_ids=[stop])
    for whole, part in zip(free, stopped, strict=True):
        expected = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert part == expected
    assert len(stopped[0]) <= 5 and any(len(ids) == 10 for ids in stopped)


def test_a_row_ends_where_the_context_is_full(model):
    long = list(range(5, 5 + model.config.max_length - 3))
    found = generate(model, [long, [1]], max_tokens=200, stop_ids=[])
    assert [len(ids) for ids in found] == [3, model.config.max_length - 1]


def test_ids_that_the_tokenizer_does_not_have_are_never_written(model):
    """A model may have been made for more ids than its tokenizer has; a text could not hold them."""
    tokenizer = types.SimpleNamespace(vocab_size=100)
    narrow = dataclasses.replace(model, tokenizer=tokenizer)
    wide, found = (generate(one, PROMPTS, max_tokens=20, stop_ids=[]) for one in (model, narrow))
    assert max(map(max, wide)) >= 100 > max(map(max, found))


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "prompt 0 has 0 tokens"), ([1] * 64, "has 64"), ([1, 384], "id 384")]
)
def test_prompts_that_cannot_be_continued_are_refused(model, prompt, message):
    with pytest.raises(UserError, match=message):
        generate(model, [prompt], max_tokens=4, stop_ids=[])
