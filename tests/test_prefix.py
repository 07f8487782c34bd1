"""Rows that go on from beginnings they share: held to attention over each whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_config

from ctllm_jax.attention import prefix, xla
from ctllm_jax.model import forward, init_cache, init_params


@pytest.mark.parametrize("beginnings", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_attention_over_the_whole_sequence(beginnings, kv_heads):
    rng, (B, L, P, N, H) = np.random.default_rng(kv_heads), (6, 5, 9, 4, 8)
    drawn = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
    with jax.enable_x64(True):
        q, k, v = drawn(B, L, N, H), drawn(B, L, kv_heads, H), drawn(B, L, kv_heads, H)
        before_k, before_v = (drawn(beginnings, kv_heads, P, H) for _ in range(2))
        segments_BL = jnp.asarray(np.arange(L) < rng.integers(1, L + 1, (B, 1)), jnp.int32)
        segments_SP = jnp.asarray(np.arange(P) < rng.integers(1, P + 1, (beginnings, 1)), jnp.int32)
        owner_B = jnp.asarray(rng.integers(0, beginnings, B))
        found = prefix.attention(q, k, v, segments_BL, before_k, before_v, segments_SP, owner_B)
        whole = [
            jnp.concatenate([before[owner_B], own], axis=1)
            for before, own in ((before_k.swapaxes(1, 2), k), (before_v.swapaxes(1, 2), v), (segments_SP, segments_BL))
        ]
        expected = xla.attention(q, *whole[:2], segments_BL, whole[2], q_offset=P)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
    assert not np.asarray(found)[np.asarray(segments_BL) == 0].any()


def test_the_model_goes_on_from_a_shared_cache_as_from_the_whole_text():
    with jax.enable_x64(True):
        config = tiny_config(dtype="float64", param_dtype="float64")
        params = init_params(config, jax.random.key(0))
        rng, (B, L, P) = np.random.default_rng(0), (4, 6, 12)
        before_SP, own_BL = rng.integers(0, 370, (2, P)), rng.integers(0, 370, (B, L))
        place_P, place_L = np.broadcast_to(np.arange(P), (2, P)), np.broadcast_to(np.arange(P, P + L), (B, L))
        cache = forward(config, params, before_SP, place_P, np.ones((2, P), np.int32), init_cache(config, 2, P))[1]
        owner_B = np.array([1, 0, 0, 1])
        logits_BLV, after = forward(config, params, own_BL, place_L, np.ones((B, L), np.int32), cache, owner_B)
        assert after is cache
        whole_BT = np.concatenate([before_SP[owner_B], own_BL], axis=1)
        place_BT = np.broadcast_to(np.arange(P + L), whole_BT.shape)
        expected_BTV, _ = forward(config, params, whole_BT, place_BT, np.ones_like(whole_BT))
    real = slice(0, config.vocab_size)
    np.testing.assert_allclose(logits_BLV[..., real], expected_BTV[:, P:, real], rtol=0, atol=1e-12)
