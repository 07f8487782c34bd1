"""Rotary position embedding (arXiv 2104.09864), halves paired as Llama does, and the scalings that its successors use.

Legend: B batch, L length, N heads, H head size.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.precision import wide

KINDS = ("linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are lowered for contexts longer than a model was first trained with.

    "linear" divides all of them (arXiv 2306.15595). "llama3" divides those that turn less than `low_frequency_factor`
    times in the original context, leaves those that turn more than `high_frequency_factor` times, and blends between,
    as Llama 3.1 was released.
    """

    kind: str  # one of KINDS
    factor: float  # [times] by which frequencies are lowered
    low_frequency_factor: float = 1.0  # [turns] llama3 only, as the two below
    high_frequency_factor: float = 4.0  # [turns] in the original context, from which on a frequency stays
    original_length: int = 8192  # [tokens] of the context that the model was first trained with

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"rope scaling {self.kind!r} is unknown; there are: {', '.join(KINDS)}")
        if self.factor < 1 or self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError("rope scaling needs factor >= 1 and low_frequency_factor < high_frequency_factor")


def frequencies(head_size: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position of each pair of a head, [H / 2] fp32."""
    half = head_size // 2
    # In numpy and in this order: the roundings of transformers' table, which XLA's power does not reproduce.
    plain = 1 / np.float32(theta) ** (np.arange(half, dtype=np.float32) / np.float32(half))
    if scaling is None:
        return plain
    lowered = plain / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return lowered
    turns = scaling.original_length * plain / np.float32(2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / np.float32(high - low), 0, 1).astype(np.float32)
    return (1 - kept) * lowered + kept * plain


def rotate(x_BLNH: jax.Array, positions_BL: jax.Array, frequency: np.ndarray) -> jax.Array:
    """Turns each pair of a head by its position times its frequency, in fp32 (fp64 for fp64).

    With x = [a, b], the result is x cos + [-b, a] sin. The exchange of halves is a product with a signed permutation,
    which is exact: moving half of a register's lanes costs a TPU more than its whole matrix unit does for this.
    """
    head_size = x_BLNH.shape[-1]
    half = head_size // 2
    dtype = wide(x_BLNH.dtype)
    angle = positions_BL[..., None, None].astype(dtype) * np.tile(frequency, 2)
    exchange_HH = np.zeros((head_size, head_size), np.float32)
    exchange_HH[np.arange(half), np.arange(half) + half] = 1
    exchange_HH[np.arange(half) + half, np.arange(half)] = -1
    exchanged_BLNH = jnp.einsum(
        "BLNH,HI->BLNI",
        x_BLNH,
        exchange_HH.astype(x_BLNH.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    return (x_BLNH.astype(dtype) * jnp.cos(angle) + exchanged_BLNH * jnp.sin(angle)).astype(x_BLNH.dtype)
