"""Keys and values of earlier tokens, from which later ones go on.

The layers' parts lie in one array that passes through all layers, each of which writes its own in place: cut up by
layers and put together again, a cache would be copied at every token. Heads come before slots, so that the slots of a
head lie side by side, as products with them want it.

Legend: Y layers, B batch, T cache slots, K key/value heads, H head size, L new tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, filled up to slot `length`; segment 0 marks unused and padding slots."""

    k_YBKTH: jax.Array
    v_YBKTH: jax.Array
    segments_BT: jax.Array
    length: jax.Array  # int32, or [B] where the rows are filled unequally: they take one token at a time


def put_heads(old_YBKTH: jax.Array, new_BLKH: jax.Array, layer: jax.Array, length: jax.Array) -> jax.Array:
    """All layers' keys or values with the new ones of one layer, from slot `length` on."""
    new_BKLH = new_BLKH.swapaxes(1, 2).astype(old_YBKTH.dtype)
    if length.ndim:
        B, K = new_BKLH.shape[:2]
        # Every index given: a slice among them has TPU compilers turn the whole cache over, there and back.
        return old_YBKTH.at[layer, jnp.arange(B)[:, None], jnp.arange(K), length[:, None]].set(new_BKLH[:, :, 0])
    start = [jnp.int32(index) for index in (layer, 0, 0, length, 0)]
    return jax.lax.dynamic_update_slice(old_YBKTH, new_BKLH[None], start)


def put_segments(old_BT: jax.Array, new_BL: jax.Array, length: jax.Array) -> jax.Array:
    """The slots' segments with those of the new tokens, from slot `length` on."""
    if length.ndim:
        return old_BT.at[jnp.arange(len(new_BL)), length].set(new_BL[:, 0])
    return jax.lax.dynamic_update_slice_in_dim(old_BT, new_BL, length, axis=1)
