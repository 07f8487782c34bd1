"""Attention by cuDNN, through JAX's public `jax.nn.dot_product_attention`.

That function knows causality but no segments: documents are kept apart by a mask, which cuDNN takes as a bias that it
adds to the scores. The mask is held: [B, 1, L, T] in the inputs' 16-bit dtype, 2 B L T bytes on a device (32 MiB for
a row of 4096), and in the backward pass its gradient, which cuDNN computes and nobody reads, as much again. Tiles that
the mask hides entirely are computed all the same; tiles beyond the diagonal are not, except under a context axis.

JAX gives no name to what the backward pass needs of the forward pass (softmax statistics), so no remat policy keeps it:
under every policy but "none" the forward kernel runs twice.

Legend as in `ctllm_jax.attention`.
"""

import jax
import jax.numpy as jnp

from ctllm_jax.attention.tiles import padded


def attention(
    q_BLNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    q_segments_BL: jax.Array,
    kv_segments_BT: jax.Array,
    *,
    q_offset: jax.Array | int = 0,
    implementation: str = "cudnn",
) -> jax.Array:
    """See `ctllm_jax.attention.attention`. Differentiable in q, k and v.

    The queries are a stretch of the sequence that the keys are: segment l of the queries is segment `q_offset + l` of
    the keys.

    Args:
      q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT: as there; float16 or bfloat16, any lengths.
      q_offset: as there; the literal 0 lets cuDNN skip what lies beyond the diagonal.
      implementation: "xla" runs the same mask and padding anywhere, for tests.
    """
    L = q_BLNH.shape[1]
    # With a bias, the backward pass takes even lengths only.
    q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT = (
        padded(x, 2) for x in (q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT)
    )
    # Padding sees padding here, itself at least, so no row of the softmax is empty; what it gives is dropped below, and
    # with it all gradients that come from it.
    mask_BLT = q_segments_BL[:, :, None] == kv_segments_BT[:, None, :]
    starts_at_0 = isinstance(q_offset, int) and q_offset == 0
    if not starts_at_0:  # is_causal means that query l stands at key l
        slot_L = q_offset + jnp.arange(q_BLNH.shape[1])
        mask_BLT &= slot_L[:, None] >= jnp.arange(k_BTKH.shape[1])
    out_BLNH = jax.nn.dot_product_attention(
        q_BLNH,
        k_BTKH,
        v_BTKH,
        mask=mask_BLT[:, None],
        scale=q_BLNH.shape[-1] ** -0.5,
        is_causal=starts_at_0,
        implementation=implementation,
    )
    return jnp.where(q_segments_BL[:, :, None, None] == 0, 0, out_BLNH)[:, :L]
