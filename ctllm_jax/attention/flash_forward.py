"""Flash attention, forward: the softmax is taken block by block, the scores are never held (arXiv 2307.08691).

Legend as in `ctllm_jax.attention.tiles`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ctllm_jax.attention import tiles


def _kernel(
    schedule_ref,
    offset_ref,
    q_ref,
    k_ref,
    v_ref,
    q_segments_ref,
    kv_segments_ref,
    out_ref,
    lse_ref,
    *,
    tiling,
    scale,
):
    """One block of queries of one head, over the key blocks that it can see."""
    b, i, tile = pl.program_id(0), pl.program_id(2), tiling.forward
    q_QH = q_ref[...]
    Q, H = q_QH.shape
    q_segments_QS = tiles.spread(q_segments_ref[...], tile.keys)
    q_slot = tiles.offset(offset_ref, tiling) + i * Q

    def step(j, carry, *, causal):
        maximum_Q1, sum_Q1, out_QH = carry
        kv_start = pl.multiple_of(j * tile.keys, tile.keys)
        block = pl.ds(kv_start, tile.keys)
        scores_QS = tiles.matmul(q_QH, k_ref[block, :], (1, 1)) * scale
        kv_segments_1S = kv_segments_ref[:, block]
        scores_QS = tiles.mask(scores_QS, q_segments_QS, kv_segments_1S, q_slot, kv_start, query_axis=0, causal=causal)
        new_maximum_Q1 = jnp.maximum(maximum_Q1, jnp.max(scores_QS, axis=1, keepdims=True))
        weights_QS = jnp.exp2(scores_QS - new_maximum_Q1)
        correction_Q1 = jnp.exp2(maximum_Q1 - new_maximum_Q1)
        sum_Q1 = correction_Q1 * sum_Q1 + jnp.sum(weights_QS, axis=1, keepdims=True)
        v_SH = v_ref[block, :]
        out_QH = correction_Q1 * out_QH + tiles.matmul(weights_QS.astype(v_SH.dtype), v_SH, (1, 0))
        return new_maximum_Q1, sum_Q1, out_QH

    carry = (
        jnp.full((Q, 1), tiles.LOWEST_MAXIMUM, jnp.float32),
        jnp.zeros((Q, 1), jnp.float32),
        jnp.zeros((Q, H), jnp.float32),
    )
    bounds = tiles.listed(schedule_ref, b, i, tile, k_ref.shape[0] // tile.keys, tiling, rows="queries")
    maximum_Q1, sum_Q1, out_QH = tiles.walk(step, carry, bounds, rows="queries", turns=tile.turns, scratch=False)
    sum_Q1 = jnp.where(sum_Q1 == 0, 1, sum_Q1)  # a row that saw nothing: output 0
    out_ref[...] = (out_QH / sum_Q1).astype(out_ref.dtype)
    lse_ref[...] = (maximum_Q1 + jnp.log2(sum_Q1)).T


def forward(
    q_BNLH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    q_segments_BL: jax.Array,
    kv_segments_BT: jax.Array,
    q_offset: jax.Array,
    tiling: tiles.Tiling,
    interpret,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_BNLH in q's dtype, base-2 log-sum-exp of the scaled scores fp32 [B, N, 1, L]).

    Lengths are multiples of the tiling's. The log-sum-exp of a row that sees nothing is a large negative number.
    """
    B, N, L, H = q_BNLH.shape
    K, T = k_BKTH.shape[1:3]
    group = N // K
    Q = tiling.forward.queries
    q_ids_BL = tiles.query_ids(q_segments_BL)
    schedule_3BX = tiles.schedule(q_segments_BL, kv_segments_BT, q_offset, tiling.forward, rows="queries")
    q_spec = pl.BlockSpec((None, None, Q, H), lambda b, n, i: (b, n, i, 0))
    kv_spec = pl.BlockSpec((None, None, T, H), lambda b, n, i: (b, n // group, 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, tiling=tiling, scale=H**-0.5 * tiles.LOG2_E),
        grid=(B, N, L // Q),
        in_specs=[
            tiles.scalars(tiling),
            tiles.scalars(tiling),
            q_spec,
            kv_spec,
            kv_spec,
            pl.BlockSpec((None, Q, tiles.lanes(tiling)), lambda b, n, i: (b, i, 0)),
            pl.BlockSpec((None, 1, T), lambda b, n, i: (b, 0, 0)),
        ],
        out_specs=[q_spec, pl.BlockSpec((None, None, 1, Q), lambda b, n, i: (b, n, 0, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q_BNLH.shape, q_BNLH.dtype),
            jax.ShapeDtypeStruct((B, N, 1, L), jnp.float32),
        ],
        compiler_params=tiles.compiler_params(tiling),
        cost_estimate=tiles.cost(q_BNLH, k_BKTH, matmuls=2),
        interpret=interpret,
        name="flash_attention_forward",
    )(schedule_3BX, q_offset[None], q_BNLH, k_BKTH, v_BKTH, tiles.column(q_ids_BL, tiling), kv_segments_BT[:, None, :])
