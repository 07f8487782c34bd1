"""In which precision things are added up."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def wide(dtype: DTypeLike) -> jnp.dtype:
    """What norms, softmaxes and sums over values of a dtype are computed in: fp32, or fp64 for fp64.

    Training computes in bf16 or fp32. In fp64, what is claimed to be the same however it is computed (by microbatch,
    layout or mesh) can be told from what merely rounds alike.
    """
    return jnp.promote_types(dtype, jnp.float32)
