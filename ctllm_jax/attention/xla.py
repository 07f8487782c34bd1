"""Attention in plain JAX: the oracle for every kernel. It holds the scores, so memory grows with L x T.

Legend as in `ctllm_jax.attention`; G query heads per key/value head (N = K G).
"""

import jax
import jax.numpy as jnp

from ctllm_jax.precision import wide


def attention(
    q_BLNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    q_segments_BL: jax.Array,
    kv_segments_BT: jax.Array,
    *,
    q_offset: jax.Array | int = 0,
) -> jax.Array:
    """See `ctllm_jax.attention.attention`. Scores and softmax are fp32 (fp64 for fp64)."""
    B, L, N, H = q_BLNH.shape
    T, K = k_BTKH.shape[1:3]
    q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H)
    scores_BKGLT = jnp.einsum("BLKGH,BTKH->BKGLT", q_BLKGH, k_BTKH, preferred_element_type=wide(q_BLNH.dtype)) * H**-0.5
    slot_L = q_offset + jnp.arange(L)
    causal_LT = slot_L[:, None] >= jnp.arange(T)[None, :]
    same_BLT = (q_segments_BL[:, :, None] == kv_segments_BT[:, None, :]) & (kv_segments_BT[:, None, :] != 0)
    visible_BKGLT = (causal_LT[None] & same_BLT)[:, None, None]
    # A finite mask value keeps rows that see nothing (padding) free of NaN; their weights are zero.
    weights_BKGLT = jax.nn.softmax(jnp.where(visible_BKGLT, scores_BKGLT, -1e30), axis=-1)
    weights_BKGLT = jnp.where(visible_BKGLT, weights_BKGLT, 0).astype(v_BTKH.dtype)
    return jnp.einsum("BKGLT,BTKH->BLKGH", weights_BKGLT, v_BTKH).reshape(B, L, N, H)
