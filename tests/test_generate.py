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

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
SAMPLED = {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "seed": 5}
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
    found = generate(model, PROMPTS, max_tokens=12, stop_ids=[], **GREEDY)
    assert found == [continue_without_cache(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa", "tiny_gqa_ref"])
def test_greedy_decoding_equals_that_of_transformers(name):
    reference, golden = load_model(str(REFERENCE / name)), np.load(REFERENCE / "logits.npz")
    prompt, whole = golden[f"{name}/greedy_prompt"].tolist(), golden[f"{name}/greedy_out"].tolist()
    stops = [reference.tokenizer.eos_id]
    found = generate(reference, [prompt], max_tokens=len(whole) - len(prompt), stop_ids=stops, **GREEDY)
    assert found == [whole[len(prompt) :]]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_sample_does_not_depend_on_its_neighbours(model, sampling):
    def first(others):
        return generate(model, [PROMPTS[0], *others], max_tokens=10, stop_ids=[], **sampling)[0]

    alone = first([])
    assert first(PROMPTS[1:]) == alone
    assert first([[1] * 40] * 17) == alone  # a longer bucket, and more than one batch


def test_the_seed_and_the_place_in_the_list_decide_a_sample(model):
    def samples(seed):
        options = {**SAMPLED, "seed": seed}
        return generate(model, [PROMPTS[0]] * 3, max_tokens=10, stop_ids=[], **options)

    assert samples(1) == samples(1)
    assert samples(1) != samples(2)
    assert len({tuple(ids) for ids in samples(1)}) == 3


def test_a_row_ends_with_its_stop_id_and_others_go_on(model):
    free = generate(model, PROMPTS, max_tokens=10, stop_ids=[], **GREEDY)
    stop = free[0][4]
    stopped = generate(model, PROMPTS, max_tokens=10, stop_ids=[stop], **GREEDY)
    for whole, part in zip(free, stopped, strict=True):
        expected = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert part == expected
    assert len(stopped[0]) <= 5 and any(len(ids) == 10 for ids in stopped)


def test_a_row_ends_where_the_context_is_full(model):
    long = list(range(5, 5 + model.config.max_length - 3))
    found = generate(model, [long, [1]], max_tokens=200, stop_ids=[], **GREEDY)
    assert [len(ids) for ids in found] == [3, model.config.max_length - 1]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_narrowed_to_one_token_is_greedy(model, narrow):
    options = {**SAMPLED, "top_k": 0, "top_p": 1.0, **narrow}
    assert generate(model, PROMPTS, max_tokens=8, stop_ids=[], **options) == generate(
        model, PROMPTS, max_tokens=8, stop_ids=[], **GREEDY
    )


def test_sampled_tokens_come_with_the_models_probabilities(model):
    prompt, temperature = [1, 40], 1.5
    run = jax.jit(forward, static_argnums=0)
    inputs = (np.array([prompt]), np.array([[0, 1]]), np.ones((1, 2), np.int32))
    logits_1LV, _ = run(model.config, model.params, *inputs)
    probability_V = np.asarray(jax.nn.softmax(logits_1LV[0, -1] / temperature))
    options = {**SAMPLED, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    drawn = [ids[0] for ids in generate(model, [prompt] * 2000, max_tokens=1, stop_ids=[], **options)]
    best = int(np.argmax(probability_V))
    share, expected = drawn.count(best) / 2000, float(probability_V[best])
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)
    assert max(drawn) < model.config.vocab_size


def test_ids_that_the_tokenizer_does_not_have_are_never_written(model):
    """A model may have been made for more ids than its tokenizer has; a text could not hold them."""
    tokenizer = types.SimpleNamespace(vocab_size=100)
    narrow = dataclasses.replace(model, tokenizer=tokenizer)
    sampling = {**SAMPLED, "top_k": 0, "top_p": 1.0}
    wide, found = (generate(one, PROMPTS, max_tokens=20, stop_ids=[], **sampling) for one in (model, narrow))
    assert max(map(max, wide)) >= 100 > max(map(max, found))


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "prompt 0 has 0 tokens"), ([1] * 64, "has 64"), ([1, 384], "id 384")]
)
def test_prompts_that_cannot_be_continued_are_refused(model, prompt, message):
    with pytest.raises(UserError, match=message):
        generate(model, [prompt], max_tokens=4, stop_ids=[], **GREEDY)
