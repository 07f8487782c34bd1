"""Attention in plain JAX: the oracle for every kernel. It holds the scores, so memory grows with L x T.

Legend as in `ctllm_jax.attention`; G query heads per key/value head (N = K G), Q = G L queries of a key/value head.
"""

import jax
import jax.numpy as jnp

from ctllm_jax.precision import wide

MASKED = -1e30  # score of what may not be seen; finite, so that queries that see nothing (padding) stay free of NaN
BLOCK = 128  # queries of a whole sequence that go together, with the keys up to the last of them


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
    L, T = q_BLNH.shape[1], k_BTKH.shape[1]
    # A whole sequence on one device: the half of the scores that no query may see is left out. A length that is cut
    # over devices stays in one piece.
    mesh = jax.sharding.get_abstract_mesh()
    whole = isinstance(q_offset, int) and q_offset == 0 and L == T and mesh.shape.get("context", 1) == 1
    block = BLOCK if whole else L
    parts = []
    for start in range(0, L, block):
        here, seen = slice(start, start + block), slice(start + block if whole else T)
        q, k, v = q_BLNH[:, here], k_BTKH[:, seen], v_BTKH[:, seen]
        parts.append(_attend(q, k, v, q_segments_BL[:, here], kv_segments_BT[:, seen], q_offset + start))
    return jnp.concatenate(parts, axis=1)


def _attend(q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT, q_offset):
    B, L, N, H = q_BLNH.shape
    T, K = k_BTKH.shape[1:3]
    G = N // K
    q_BKQH = q_BLNH.reshape(B, L, K, G, H).swapaxes(1, 2).reshape(B, K, L * G, H)
    scores_BKQT = jnp.einsum("BKQH,BTKH->BKQT", q_BKQH, k_BTKH, preferred_element_type=wide(q_BLNH.dtype)) * H**-0.5
    first = q_offset[:, None, None] if jnp.ndim(q_offset) else q_offset
    causal_LT = first + jnp.arange(L)[:, None] >= jnp.arange(T)  # with a leading axis where the rows begin unequally
    same_BLT = (q_segments_BL[:, :, None] == kv_segments_BT[:, None, :]) & (kv_segments_BT[:, None, :] != 0)
    visible_BLT = causal_LT & same_BLT
    visible_BKQT = jnp.repeat(visible_BLT, G, axis=1)[:, None]
    # What rows that see nothing (padding) give is made zero below.
    weights_BKQT = jax.nn.softmax(jnp.where(visible_BKQT, scores_BKQT, MASKED), axis=-1).astype(v_BTKH.dtype)
    out_BKQH = jnp.einsum("BKQT,BTKH->BKQH", weights_BKQT, v_BTKH)
    out_BLNH = out_BKQH.reshape(B, K, L, G, H).swapaxes(1, 2).reshape(B, L, N, H)
    return jnp.where(visible_BLT.any(axis=-1)[:, :, None, None], out_BLNH, 0)
