"""Attention: one entry point, a table of backends. What a backend does not support is an error, never a fallback.

Legend: B batch, L query length, T key length, N query heads, K key/value heads (N a multiple of K), H head size.
"""

import dataclasses
from collections.abc import Callable

import jax

from ctllm_jax.attention import cudnn, flash, sharded, xla
from ctllm_jax.common.errors import UserError
from ctllm_jax.hardware import current_device


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation and what it supports; None stands for anything."""

    call: Callable[..., jax.Array]  # arguments of `attention`, without `backend`
    platforms: tuple[str, ...] | None
    head_sizes: tuple[int, ...] | None
    dtypes: tuple[str, ...] | None
    cache: str  # the backend that serves calls with a key/value cache: few queries, a start known only at run time

    def refusals(self, platform: str, head_size: int, dtype: str) -> list[str]:
        """What of a request this backend does not support, in words; empty if it supports all of it."""
        asked = ("platform", platform, self.platforms), ("head size", head_size, self.head_sizes)
        asked += (("dtype", dtype, self.dtypes),)
        return [f"{what} {value}" for what, value, supported in asked if supported and value not in supported]


def _on_shards(kernel: Callable[[], sharded.Kernel]) -> Callable[..., jax.Array]:
    def call(q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT, *, q_offset=0):
        assert isinstance(q_offset, int) and q_offset == 0  # calls with a cache go to another backend
        return sharded.attention(kernel(), q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT)

    return call


def _flash_on(platform: str) -> Callable[..., jax.Array]:
    def kernel() -> sharded.Kernel:
        return sharded.Kernel(flash.attention, tiling=flash.tiling_for(platform, current_device().device_kind))

    return _on_shards(kernel)


_FLASH_SUPPORT = {"head_sizes": (64, 128, 256), "dtypes": ("bfloat16", "float32"), "cache": "xla"}
BACKENDS: dict[str, Backend] = {
    "xla": Backend(xla.attention, platforms=None, head_sizes=None, dtypes=None, cache="xla"),
    "pallas_tpu": Backend(_flash_on("tpu"), platforms=("tpu",), **_FLASH_SUPPORT),
    "pallas_gpu": Backend(_flash_on("gpu"), platforms=("gpu",), **_FLASH_SUPPORT),
    # cuDNN takes head sizes up to 256 on Hopper, but JAX asks a GPU at hand for that, so it cannot be compiled ahead.
    "cudnn": Backend(
        _on_shards(lambda: sharded.Kernel(cudnn.attention)),
        platforms=("gpu",),
        head_sizes=tuple(range(8, 129, 8)),
        dtypes=("bfloat16", "float16"),
        cache="xla",
    ),
}


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

    Query l stands at key slot `q_offset + l`; it sees the key slots up to its own that carry its segment id. Padding
    (segment 0) sees nothing and is seen by nothing: its output and its gradients are zero.

    A call with a key/value cache (L differs from T, or q_offset is anything but the literal 0) goes to the backend
    that the table names under `cache`: the flash kernels gain nothing with few queries.

    Args:
      q_BLNH: queries, already rotated; scaled here by 1/sqrt(H).
      k_BTKH: keys, already rotated.
      v_BTKH: values.
      q_segments_BL: segment of each query, int32, not negative; 0 marks padding.
      kv_segments_BT: segment of each key slot, likewise.
      q_offset: key slot of the first query (nonzero when decoding with a cache): one for all rows, or [B].
      backend: a name in `BACKENDS`.

    Returns:
      Mixed values, [B, L, N, H], in q's dtype.

    Raises:
      UserError: an unknown backend, or one that does not support the platform, head size or dtype; or a mesh over
        which heads or length do not divide.
    """
    if backend not in BACKENDS:
        raise UserError(f"attention backend {backend!r} is unknown; there are: {', '.join(sorted(BACKENDS))}")
    has_cache = q_BLNH.shape[1] != k_BTKH.shape[1] or not (isinstance(q_offset, int) and q_offset == 0)
    name = BACKENDS[backend].cache if has_cache else backend
    request = (current_device().platform, q_BLNH.shape[-1], str(q_BLNH.dtype))
    if refusals := BACKENDS[name].refusals(*request):
        able = ", ".join(other for other in sorted(BACKENDS) if not BACKENDS[other].refusals(*request))
        raise UserError(f"attention backend {name!r} does not support {' and '.join(refusals)}; these do: {able}")
    return BACKENDS[name].call(q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT, q_offset=q_offset)
