"""The decoder: equal to other implementations and to itself by other ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import NO_REFERENCE, REFERENCE, tiny_config, tiny_model

from configs import models
from ctllm_jax.common.config import build
from ctllm_jax.loading import load_model
from ctllm_jax.losses import lm_loss, token_logprobs
from ctllm_jax.model import (
    ModelConfig,
    abstract_params,
    count_params,
    flops_per_token,
    forward,
    init_cache,
    init_params,
    logical_axes,
)
from ctllm_jax.sharding import MeshConfig, make_mesh, shardings

run = jax.jit(forward, static_argnums=0)


def plain(tokens_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, positions, segments) of rows that are one document each."""
    tokens_BL = np.asarray(tokens_BL, np.int32)
    positions_BL = np.broadcast_to(np.arange(tokens_BL.shape[1], dtype=np.int32), tokens_BL.shape)
    return tokens_BL, positions_BL, np.ones_like(tokens_BL)


@pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa", "tiny_gqa_ref"])
def test_logits_equal_those_of_transformers(name):
    model, golden = load_model(str(REFERENCE / name)), np.load(REFERENCE / "logits.npz")

    rand_BLV = run(model.config, model.params, *plain(golden["rand_input_ids"]))[0]
    np.testing.assert_allclose(rand_BLV, golden[f"{name}/rand_logits"], rtol=0, atol=1e-4)

    tokens_BL, positions_BL, _ = plain(golden["padded_input_ids"])
    real_BL = golden["padded_attention_mask"].astype(np.int32)
    padded_BLV = run(model.config, model.params, tokens_BL, positions_BL, real_BL)[0]
    expected_BLV = golden[f"{name}/padded_logits"]
    np.testing.assert_allclose(np.asarray(padded_BLV)[real_BL == 1], expected_BLV[real_BL == 1], rtol=0, atol=1e-4)

    long_1LV = run(model.config, model.params, *plain(golden["long_input_ids"]))[0]
    np.testing.assert_allclose(long_1LV[:, -4:], golden[f"{name}/long_last_logits"], rtol=0, atol=1e-4)


@pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa", "tiny_gqa_ref"])
def test_log_probabilities_equal_those_of_transformers_over_a_long_document(name):
    # Far from the start an angle's error is the position times the frequency's.
    model, golden = load_model(str(REFERENCE / name)), np.load(REFERENCE / "logits.npz")
    ids_1L = golden["long_input_ids"]
    logprob_1LV = jax.nn.log_softmax(run(model.config, model.params, *plain(ids_1L))[0])
    logprob_1L = jnp.take_along_axis(logprob_1LV[:, :-1], ids_1L[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprob_1L, golden[f"{name}/long_token_logprobs"], rtol=0, atol=1e-4)


@pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa"])
def test_loss_and_gradient_equal_those_of_transformers(name):
    model, golden = load_model(str(REFERENCE / name)), np.load(REFERENCE / "logits.npz")
    tokens_BL, positions_BL, segments_BL = plain(golden["rand_input_ids"])

    def mean_loss(params):
        logits_BLV, _ = forward(model.config, params, tokens_BL, positions_BL, segments_BL)
        total, _ = lm_loss(*token_logprobs(logits_BLV[:, :-1], tokens_BL[:, 1:]), jnp.ones(tokens_BL[:, 1:].shape), 0.0)
        return total / tokens_BL[:, 1:].size

    loss, grads = jax.value_and_grad(mean_loss)(model.params)
    norm = np.sqrt(sum(float(jnp.sum(g.astype(jnp.float32) ** 2)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(loss, golden[f"{name}/rand_loss"], rtol=1e-5)
    np.testing.assert_allclose(norm, golden[f"{name}/rand_gradnorm"], rtol=1e-4)
    key_KD = np.asarray(grads["layers"]["k"])[1].reshape(64, -1).T
    expected_KD = golden[f"{name}/grad/model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_allclose(key_KD, expected_KD, rtol=0, atol=1e-4 * np.abs(expected_KD).max())


def test_ct_llm_2b_has_the_released_number_of_parameters():
    assert count_params(build(ModelConfig, models.ct_llm_2b())) == 2_134_509_568


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}, {"tie_embeddings": True}])
def test_flops_are_those_that_xla_counts(changes):
    """XLA counts what is no product as well (norms, softmax, rotation), and a scanned layer once, so there is one; of
    scores, plain attention computes the whole square in sequences of one block."""
    sizes = dict(num_layers=1, d_model=512, num_heads=8, num_kv_heads=8, head_dim=64, d_ff=1408, max_length=128)
    cfg = tiny_config(**{**sizes, "vocab_size": 1024, "padded_vocab_size": 1024, **changes})

    def loss(params, tokens_BL):
        return jnp.sum(forward(cfg, params, *plain(np.zeros(tokens_BL.shape)))[0] ** 2)

    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    counted = jax.jit(jax.grad(loss)).lower(abstract_params(cfg), tokens).compile().cost_analysis()["flops"]
    assert 1 <= counted / (2 * 128 * flops_per_token(cfg, 128, causal=False)) < 1.02
    attention = 6 * 8 * 64 * 128  # the other convention leaves half of it out
    assert flops_per_token(cfg, 128, causal=False) - flops_per_token(cfg, 128, causal=True) == attention


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 4, "qk_norm": True}, {"tie_embeddings": True}])
def test_decoding_with_a_cache_equals_the_full_forward(changes):
    model = tiny_model(**changes)
    cfg = model.config
    ids_BL = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 20))
    tokens_BL, positions_BL, segments_BL = plain(ids_BL)
    full_BLV, _ = run(cfg, model.params, tokens_BL, positions_BL, segments_BL)
    cache, parts = init_cache(cfg, 2, 24), []
    for start, stop in ((0, 18), (18, 19), (19, 20)):
        span = slice(start, stop)
        logits, cache = run(cfg, model.params, tokens_BL[:, span], positions_BL[:, span], segments_BL[:, span], cache)
        parts.append(logits)
    assert int(cache.length) == 20
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1)[..., : cfg.vocab_size],
        full_BLV[..., : cfg.vocab_size],
        rtol=0,
        atol=1e-5,
    )


def test_ids_beyond_the_vocabulary_have_no_probability():
    model = tiny_model()
    logits_BLV, _ = run(model.config, model.params, *plain([[1, 5, 9]]))
    assert np.all(np.isneginf(logits_BLV[..., model.config.vocab_size :]))
    assert np.all(np.isfinite(logits_BLV[..., : model.config.vocab_size]))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("mesh_axes", [(1, 8, 1, 1), (2, 2, 2, 1)])
def test_initial_parameters_are_the_same_bits_on_any_mesh(mesh_axes):
    cfg = tiny_config()
    make = functools.partial(init_params, cfg)
    alone = jax.jit(make)(jax.random.key(3))
    layout = shardings(make_mesh(MeshConfig(*mesh_axes)), abstract_params(cfg), logical_axes(cfg))
    spread = jax.jit(make, out_shardings=layout)(jax.random.key(3))
    assert len(spread["layers"]["q"].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, alone, spread)


def test_packed_documents_give_the_loss_and_gradient_of_single_ones():
    model = tiny_model()
    random = np.random.default_rng(1)
    documents = [random.integers(5, model.config.vocab_size, n).astype(np.int32) for n in (9, 4, 11)]

    def total(params, tokens_BL, positions_BL, segments_BL, labels_BL, weights_BL):
        logits_BLV, _ = forward(model.config, params, tokens_BL, positions_BL, segments_BL)
        return lm_loss(*token_logprobs(logits_BLV, labels_BL), weights_BL, 0.0)[0]

    def rows(groups: list[list[np.ndarray]], length: int) -> list[np.ndarray]:
        arrays = [np.zeros((len(groups), length), np.int32) for _ in range(5)]
        for row, group in enumerate(groups):
            start = 0
            for number, ids in enumerate(group, 1):
                n = len(ids)
                span, head = slice(start, start + n), slice(start, start + n - 1)
                arrays[0][row, span], arrays[1][row, span], arrays[2][row, span] = ids, np.arange(n), number
                arrays[3][row, head], arrays[4][row, head] = ids[1:], 1
                start += n
        return arrays

    grad = jax.jit(jax.value_and_grad(total))
    packed, packed_grads = grad(model.params, *rows([documents], 28))
    single, single_grads = grad(model.params, *rows([[ids] for ids in documents], 12))
    np.testing.assert_allclose(packed, single, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max())),
        packed_grads,
        single_grads,
    )
