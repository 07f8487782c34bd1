"""Runs an attention kernel on the shards of a mesh: XLA cannot partition a Pallas call by itself.

Batch and heads are independent. Over the context axis every device gathers the keys and values of the whole sequence
and keeps its own queries; the gradients of what was gathered are summed back by the gather's transpose.

Legend as in `ctllm_jax.attention`.
"""

import functools

import jax

from ctllm_jax.common.errors import UserError
from ctllm_jax.sharding import RULES, devices_over, spec

Kernel = functools.partial  # (q, k, v, q_segments, kv_segments, *, q_offset) -> out, everything else bound

AXES = {
    "queries": ("batch", "length", "heads", None),
    "keys and values": ("batch", "length", "kv_heads", None),
    "segments": ("batch", "length"),
}


def attention(
    kernel: Kernel,
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    q_segments_BL: jax.Array,
    kv_segments_BL: jax.Array,
) -> jax.Array:
    """Attention of a whole sequence (L = T, no cache) under the mesh in use, or without one.

    Raises:
      UserError: an axis does not divide over the mesh.
    """
    arrays = (q_BLNH, k_BLKH, v_BLKH, q_segments_BL, kv_segments_BL)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(*arrays, q_offset=0)
    names = ("queries", "keys and values", "keys and values", "segments", "segments")
    for name, array in zip(names, arrays, strict=True):
        _check_divides(mesh, name, array.shape)

    def on_shard(q_BLNH, k_BLKH, v_BLKH, q_segments_BL, kv_segments_BL):
        whole = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k_BLKH, v_BLKH, kv_segments_BL))
        k_BTKH, v_BTKH, kv_segments_BT = whole
        # The literal 0 tells a kernel that the queries start where the keys do.
        q_offset = jax.lax.axis_index("context") * q_BLNH.shape[1] if mesh.shape["context"] > 1 else 0
        return kernel(q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT, q_offset=q_offset)

    in_specs = tuple(spec(AXES[name]) for name in names)
    # A Pallas call does not say over which mesh axes its results vary, so that check is off.
    run = jax.shard_map(on_shard, in_specs=in_specs, out_specs=spec(AXES["queries"]), check_vma=False)
    return run(*arrays)


def _check_divides(mesh, name: str, shape: tuple[int, ...]) -> None:
    for size, axis in zip(shape, AXES[name], strict=True):
        if size % (ways := devices_over(mesh.shape, axis)):
            raise UserError(
                f"attention: {axis} {size} of the {name} does not divide over {ways} devices "
                f"(mesh: {' x '.join(RULES[axis])})"
            )
