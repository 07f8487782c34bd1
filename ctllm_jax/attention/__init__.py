"""Attention: one entry point, a table of backends. What a backend does not support is an error, never a fallback.

Legend: B batch, L query length, T key length, N query heads, K key/value heads (N a multiple of K), H head size.
"""

from collections.abc import Callable

import jax

from ctllm_jax.attention import xla
from ctllm_jax.common.errors import UserError

BACKENDS: dict[str, Callable[..., jax.Array]] = {"xla": xla.attention}


def attention(
    q_BLNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    q_segments_BL: jax.Array,
    kv_segments_BT: jax.Array,
    *,
    q_offset: jax.Array | int = 0,
    backend: str = "xla",
) -> jax.Array:
    """Causal scaled dot-product attention within segments.

    Query l stands at key slot `q_offset + l`; it sees the key slots up to its own that carry its segment id.

    Args:
      q_BLNH: queries, already rotated; scaled here by 1/sqrt(H).
      k_BTKH: keys, already rotated.
      v_BTKH: values.
      q_segments_BL: segment of each query, int32; 0 marks padding.
      kv_segments_BT: segment of each key slot, int32.
      q_offset: key slot of the first query (nonzero when decoding with a cache).
      backend: a name in `BACKENDS`.

    Returns:
      Mixed values, [B, L, N, H], in q's dtype.

    Raises:
      UserError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise UserError(f"attention backend {backend!r} is unknown; there are: {', '.join(sorted(BACKENDS))}")
    return BACKENDS[backend](q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT, q_offset=q_offset)
