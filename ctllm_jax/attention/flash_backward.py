"""Flash attention, backward: weights are computed again from the log-sum-exp (arXiv 2307.08691, algorithm 2).

Two kernels, so that neither adds into what the other writes: one holds a block of queries and walks over keys (dQ),
one holds a block of keys and walks over queries (dK, dV). The second works on transposed tiles [S, Q]: what belongs to
a query is then a row that spans the tile's lanes, and no product needs a transposed operand.

Legend as in `ctllm_jax.attention.tiles`; G query heads per key/value head (N = K G).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ctllm_jax.attention import tiles


def _dq_kernel(
    schedule_ref,
    offset_ref,
    q_ref,
    k_ref,
    v_ref,
    q_segments_ref,
    kv_segments_ref,
    dout_ref,
    lse_ref,
    delta_ref,
    dq_ref,
    *,
    tiling,
    scale,
):
    """One block of queries of one head, over the key blocks that it can see."""
    b, i, tile = pl.program_id(0), pl.program_id(2), tiling.dq
    q_QH, dout_QH = q_ref[...], dout_ref[...]
    lse_Q1, delta_Q1 = lse_ref[...].T, delta_ref[...].T
    q_segments_QS = tiles.spread(q_segments_ref[...], tile.keys)
    q_slot = tiles.offset(offset_ref, tiling) + i * tile.queries

    def step(j, dq_QH, *, causal):
        kv_start = pl.multiple_of(j * tile.keys, tile.keys)
        block = pl.ds(kv_start, tile.keys)
        k_SH = k_ref[block, :]
        scores_QS = tiles.matmul(q_QH, k_SH, (1, 1)) * (scale * tiles.LOG2_E)
        kv_segments_1S = kv_segments_ref[:, block]
        scores_QS = tiles.mask(scores_QS, q_segments_QS, kv_segments_1S, q_slot, kv_start, query_axis=0, causal=causal)
        weights_QS = jnp.exp2(scores_QS - lse_Q1)
        dscores_QS = weights_QS * (tiles.matmul(dout_QH, v_ref[block, :], (1, 1)) - delta_Q1)
        return dq_QH + tiles.matmul(dscores_QS.astype(k_SH.dtype), k_SH, (1, 0))

    dq_QH = jnp.zeros(q_QH.shape, jnp.float32)
    bounds = tiles.listed(schedule_ref, b, i, tile, k_ref.shape[0] // tile.keys, tiling, rows="queries")
    dq_QH = tiles.walk(step, dq_QH, bounds, rows="queries", turns=tile.turns, scratch=tiling.platform == "tpu")
    dq_ref[...] = (dq_QH * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    schedule_ref,
    offset_ref,
    q_ref,
    k_ref,
    v_ref,
    q_segments_ref,
    kv_segments_ref,
    dout_ref,
    lse_ref,
    delta_ref,
    dk_ref,
    dv_ref,
    *,
    tiling,
    scale,
):
    """One block of keys, over the query blocks of one head that can see it."""
    b, j, tile = pl.program_id(0), pl.program_id(2), tiling.dkv
    q_offset = tiles.offset(offset_ref, tiling)
    k_SH, v_SH = k_ref[...], v_ref[...]
    kv_segments_SQ = tiles.spread(kv_segments_ref[...], tile.queries)
    kv_start = j * tile.keys

    def step(i, carry, *, causal):
        dk_SH, dv_SH = carry
        start = pl.multiple_of(i * tile.queries, tile.queries)
        block = pl.ds(start, tile.queries)
        q_QH, dout_QH = q_ref[block, :], dout_ref[block, :]
        scores_SQ = tiles.matmul(k_SH, q_QH, (1, 1)) * (scale * tiles.LOG2_E)
        scores_SQ = tiles.mask(
            scores_SQ,
            q_segments_ref[:, block],
            kv_segments_SQ,
            q_offset + start,
            kv_start,
            query_axis=1,
            causal=causal,
        )
        weights_SQ = jnp.exp2(scores_SQ - lse_ref[:, block])
        dv_SH += tiles.matmul(weights_SQ.astype(dout_QH.dtype), dout_QH, (1, 0))
        dscores_SQ = weights_SQ * (tiles.matmul(v_SH, dout_QH, (1, 1)) - delta_ref[:, block])
        dk_SH += tiles.matmul(dscores_SQ.astype(q_QH.dtype), q_QH, (1, 0))
        return dk_SH, dv_SH

    carry = jnp.zeros(k_SH.shape, jnp.float32), jnp.zeros(v_SH.shape, jnp.float32)
    bounds = tiles.listed(schedule_ref, b, j, tile, q_ref.shape[0] // tile.queries, tiling, rows="keys")
    dk_SH, dv_SH = tiles.walk(step, carry, bounds, rows="keys", turns=tile.turns, scratch=tiling.platform == "tpu")
    dk_ref[...] = (dk_SH * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_SH.astype(dv_ref.dtype)


def backward(
    q_BNLH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    q_segments_BL: jax.Array,
    kv_segments_BT: jax.Array,
    q_offset: jax.Array,
    out_BNLH: jax.Array,
    lse_BN1L: jax.Array,
    dout_BNLH: jax.Array,
    tiling: tiles.Tiling,
    interpret,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients (dq_BNLH, dk_BKTH, dv_BKTH) in the dtypes of q, k and v.

    `out_BNLH` and `lse_BN1L` are those of `flash_forward.forward`; lengths are multiples of the tiling's.
    """
    delta_BN1L = jnp.sum(dout_BNLH.astype(jnp.float32) * out_BNLH.astype(jnp.float32), axis=-1)[:, :, None, :]
    q_ids_BL = tiles.query_ids(q_segments_BL)
    arrays = (q_BNLH, k_BKTH, v_BKTH)
    rest = (dout_BNLH, lse_BN1L, delta_BN1L)
    schedule_3BX = tiles.schedule(q_segments_BL, kv_segments_BT, q_offset, tiling.dq, rows="queries")
    inputs = (schedule_3BX, q_offset[None], *arrays, tiles.column(q_ids_BL, tiling), kv_segments_BT[:, None, :], *rest)
    dq_BNLH = _dq_call(inputs, tiling, interpret)
    schedule_3BX = tiles.schedule(q_segments_BL, kv_segments_BT, q_offset, tiling.dkv, rows="keys")
    inputs = (schedule_3BX, q_offset[None], *arrays, q_ids_BL[:, None, :], tiles.column(kv_segments_BT, tiling), *rest)
    dk_BNTH, dv_BNTH = _dkv_call(inputs, tiling, interpret)
    B, K, T, H = k_BKTH.shape
    if k_BKTH.shape != dk_BNTH.shape:
        # Every query head of a group has given its share in fp32.
        dk_BNTH = dk_BNTH.reshape(B, K, -1, T, H).sum(axis=2).astype(k_BKTH.dtype)
        dv_BNTH = dv_BNTH.reshape(B, K, -1, T, H).sum(axis=2).astype(v_BKTH.dtype)
    return dq_BNLH, dk_BNTH, dv_BNTH


def _dq_call(inputs: tuple, tiling: tiles.Tiling, interpret) -> jax.Array:
    q_BNLH, k_BKTH = inputs[2:4]
    B, N, L, H = q_BNLH.shape
    K, T = k_BKTH.shape[1:3]
    group = N // K
    Q = tiling.dq.queries
    q_spec = pl.BlockSpec((None, None, Q, H), lambda b, n, i: (b, n, i, 0))
    kv_spec = pl.BlockSpec((None, None, T, H), lambda b, n, i: (b, n // group, 0, 0))
    row_spec = pl.BlockSpec((None, None, 1, Q), lambda b, n, i: (b, n, 0, i))
    return pl.pallas_call(
        functools.partial(_dq_kernel, tiling=tiling, scale=H**-0.5),
        grid=(B, N, L // Q),
        in_specs=[
            tiles.scalars(tiling),
            tiles.scalars(tiling),
            q_spec,
            kv_spec,
            kv_spec,
            pl.BlockSpec((None, Q, tiles.lanes(tiling)), lambda b, n, i: (b, i, 0)),
            pl.BlockSpec((None, 1, T), lambda b, n, i: (b, 0, 0)),
            q_spec,
            row_spec,
            row_spec,
        ],
        out_specs=q_spec,
        out_shape=jax.ShapeDtypeStruct(q_BNLH.shape, q_BNLH.dtype),
        compiler_params=tiles.compiler_params(tiling),
        cost_estimate=tiles.cost(q_BNLH, k_BKTH, matmuls=3),
        interpret=interpret,
        name="flash_attention_dq",
    )(*inputs)


def _dkv_call(inputs: tuple, tiling: tiles.Tiling, interpret) -> tuple[jax.Array, jax.Array]:
    """One share of dK and dV for every query head: [B, N, T, H], in fp32 where a group has several."""
    q_BNLH, k_BKTH = inputs[2:4]
    B, N, L, H = q_BNLH.shape
    K, T = k_BKTH.shape[1:3]
    group = N // K
    S = tiling.dkv.keys
    q_spec = pl.BlockSpec((None, None, L, H), lambda b, n, j: (b, n, 0, 0))
    kv_spec = pl.BlockSpec((None, None, S, H), lambda b, n, j: (b, n // group, j, 0))
    row_spec = pl.BlockSpec((None, None, 1, L), lambda b, n, j: (b, n, 0, 0))
    share_spec = pl.BlockSpec((None, None, S, H), lambda b, n, j: (b, n, j, 0))
    share = jax.ShapeDtypeStruct((B, N, T, H), k_BKTH.dtype if group == 1 else jnp.float32)
    return pl.pallas_call(
        functools.partial(_dkv_kernel, tiling=tiling, scale=H**-0.5),
        grid=(B, N, T // S),
        in_specs=[
            tiles.scalars(tiling),
            tiles.scalars(tiling),
            q_spec,
            kv_spec,
            kv_spec,
            pl.BlockSpec((None, 1, L), lambda b, n, j: (b, 0, 0)),
            pl.BlockSpec((None, S, tiles.lanes(tiling)), lambda b, n, j: (b, j, 0)),
            q_spec,
            row_spec,
            row_spec,
        ],
        out_specs=[share_spec, share_spec],
        out_shape=[share, share],
        compiler_params=tiles.compiler_params(tiling),
        cost_estimate=tiles.cost(q_BNLH, k_BKTH, matmuls=4),
        interpret=interpret,
        name="flash_attention_dkv",
    )(*inputs)
