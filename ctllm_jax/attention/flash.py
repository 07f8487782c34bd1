"""Flash attention in Pallas, forward and backward: one algorithm for TPU and GPU (arXiv 2307.08691).

Scores, softmax and sums are fp32 whatever the inputs; the backward pass keeps q, k, v, the output and one fp32
log-sum-exp per query. Legend as in `ctllm_jax.attention`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ctllm_jax.attention.flash_backward import backward
from ctllm_jax.attention.flash_forward import forward
from ctllm_jax.attention.tiles import Tile, Tiling, padded

# Remat policies may keep what the backward kernels need by these names.
OUTPUT_NAME = "attention_output"
LSE_NAME = "attention_lse"

_LARGE = Tile(512, 512, (8, 2, 1))

# TPU: chosen by the compiler's static cycles for v5e and v5p (an estimate). GPU: tiles that fit in shared memory and
# compile without spilling a register, at every head size and dtype; not chosen by their time.
# The first entry whose name the device's kind contains; "" matches any.
TILINGS: dict[str, dict[str, Tiling]] = {
    "tpu": {
        "v4": Tiling("tpu", forward=Tile(256, 512), dq=Tile(256, 512), dkv=Tile(512, 256)),  # 16 MiB of VMEM
        "": Tiling("tpu", forward=_LARGE, dq=_LARGE, dkv=_LARGE),
    },
    "gpu": {
        "A100": Tiling("gpu", forward=Tile(128, 64), dq=Tile(64, 64), dkv=Tile(64, 64), row_bytes=256),
        "": Tiling("gpu", forward=Tile(128, 64), dq=Tile(128, 64), dkv=Tile(64, 128), row_bytes=256),  # Hopper
    },
}


def tiling_for(platform: str, device_kind: str) -> Tiling:
    """The tile sizes for a chip, as `jax.Device.platform` and `device_kind` name it."""
    return next(tiling for name, tiling in TILINGS[platform].items() if name in device_kind)


def attention(
    q_BLNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    q_segments_BL: jax.Array,
    kv_segments_BT: jax.Array,
    *,
    q_offset: jax.Array | int = 0,
    tiling: Tiling,
    interpret=False,
) -> jax.Array:
    """See `ctllm_jax.attention.attention`. Differentiable in q, k and v.

    Args:
      q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT, q_offset: as there; any lengths.
      tiling: tile sizes and the compiler; see `tiling_for`.
      interpret: True or `pltpu.InterpretParams` run the kernels on the CPU, for tests.
    """
    L, T = q_BLNH.shape[1], k_BTKH.shape[1]
    tiling = tiling.fitted(L, T, q_BLNH.shape[-1], q_BLNH.dtype)
    q_segments_BL = padded(q_segments_BL.astype(jnp.int32), tiling.queries)
    kv_segments_BT = padded(kv_segments_BT.astype(jnp.int32), tiling.keys)
    q_BNLH = jnp.swapaxes(padded(q_BLNH, tiling.queries), 1, 2)
    k_BKTH, v_BKTH = (jnp.swapaxes(padded(x, tiling.keys), 1, 2) for x in (k_BTKH, v_BTKH))
    out_BNLH = _flash(
        q_BNLH, k_BKTH, v_BKTH, q_segments_BL, kv_segments_BT, jnp.asarray(q_offset, jnp.int32), tiling, interpret
    )
    return jnp.swapaxes(out_BNLH, 1, 2)[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _flash(q_BNLH, k_BKTH, v_BKTH, q_segments_BL, kv_segments_BT, q_offset, tiling, interpret):
    return forward(q_BNLH, k_BKTH, v_BKTH, q_segments_BL, kv_segments_BT, q_offset, tiling, interpret)[0]


def _flash_forward(*args):
    out_BNLH, lse_BN1L = forward(*args)
    out_BNLH = checkpoint_name(out_BNLH, OUTPUT_NAME)
    lse_BN1L = checkpoint_name(lse_BN1L, LSE_NAME)
    return out_BNLH, (*args[:6], out_BNLH, lse_BN1L)


def _flash_backward(tiling, interpret, saved, dout_BNLH):
    dq_BNLH, dk_BKTH, dv_BKTH = backward(*saved, dout_BNLH, tiling, interpret)
    return dq_BNLH, dk_BKTH, dv_BKTH, None, None, None


_flash.defvjp(_flash_forward, _flash_backward)
