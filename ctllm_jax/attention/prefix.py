"""Attention of rows that go on from beginnings they share. A beginning's keys and values are read by its rows and
copied for none (as in Hydragen, arXiv 2402.05099), and the scores of one row at a time are held.

Legend as in `ctllm_jax.attention`; P slots of a beginning, S beginnings, G query heads per key/value head, Q = G L
queries of a row and a key/value head.
"""

import functools

import jax
import jax.numpy as jnp

from ctllm_jax.attention.xla import MASKED
from ctllm_jax.precision import wide


def attention(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    segments_BL: jax.Array,
    shared_k_SKPH: jax.Array,
    shared_v_SKPH: jax.Array,
    shared_segments_SP: jax.Array,
    owner_B: jax.Array,
) -> jax.Array:
    """Causal within the segments of a row; every query sees all real slots of its row's beginning as well.

    Args:
      q_BLNH, k_BLKH, v_BLKH: of the rows, rotated at their places after the beginning.
      segments_BL: as in `ctllm_jax.attention`: 0 marks padding, whose output is zero.
      shared_k_SKPH, shared_v_SKPH: of the beginnings, rotated.
      shared_segments_SP: 0 marks padding slots.
      owner_B: the beginning of each row.

    Returns:
      Mixed values, [B, L, N, H], in q's dtype.
    """
    row = functools.partial(_row, shared_k_SKPH, shared_v_SKPH, shared_segments_SP)
    return jax.lax.map(row, (q_BLNH, k_BLKH, v_BLKH, segments_BL, owner_B))


def _row(shared_k_SKPH, shared_v_SKPH, shared_segments_SP, row):
    q_LNH, k_LKH, v_LKH, segments_L, owner = row
    L, N, H = q_LNH.shape
    K = k_LKH.shape[1]
    G, dtype = N // K, q_LNH.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=wide(dtype))
    q_KQH = q_LNH.reshape(L, K, G, H).swapaxes(0, 1).reshape(K, L * G, H)

    before_KQP = product("KQH,KPH->KQP", q_KQH, shared_k_SKPH[owner]) * H**-0.5
    before_KQP = jnp.where(shared_segments_SP[owner] != 0, before_KQP, MASKED)
    causal_LL = jnp.arange(L)[:, None] >= jnp.arange(L)
    visible_LL = causal_LL & (segments_L[:, None] == segments_L) & (segments_L != 0)
    own_KQL = product("KQH,LKH->KQL", q_KQH, k_LKH) * H**-0.5
    own_KQL = jnp.where(jnp.repeat(visible_LL, G, axis=0), own_KQL, MASKED)

    # One softmax over both parts.
    top_KQ1 = jnp.maximum(before_KQP.max(-1, keepdims=True), own_KQL.max(-1, keepdims=True))
    before_KQP, own_KQL = jnp.exp(before_KQP - top_KQ1), jnp.exp(own_KQL - top_KQ1)
    total_KQ1 = before_KQP.sum(-1, keepdims=True) + own_KQL.sum(-1, keepdims=True)
    out_KQH = product("KQP,KPH->KQH", before_KQP.astype(dtype), shared_v_SKPH[owner])
    out_KQH += product("KQL,LKH->KQH", own_KQL.astype(dtype), v_LKH)
    out_LNH = (out_KQH / total_KQ1).reshape(K, L, G, H).swapaxes(0, 1).reshape(L, N, H)
    return jnp.where(segments_L[:, None, None] != 0, out_LNH, 0).astype(dtype)
