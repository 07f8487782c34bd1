"""The device mesh and the one table that maps logical axes to mesh axes.

Mesh axes: slice (replicas joined by a slower network: TPU slices over DCN, GPU hosts), data (replicas), fsdp
(parameters sharded, gathered when used), tensor (within a layer), context (along the sequence). Auto axes throughout:
XLA places the collectives, the constraints here say where the arrays lie.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ctllm_jax.common.errors import UserError

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),
    "length": ("context",),
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; exactly one may be -1, which takes what is left."""

    data: int  # [devices] that hold the same parameters
    fsdp: int  # [devices] over which parameters and batch are split
    tensor: int  # [devices] over which heads and widths are split
    context: int  # [devices] over which a sequence is split
    slice: int = 1  # [slices] or hosts joined by a slower network, as replicas


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Lays out all devices (or the given ones) as the config says.

    The slice axis is outermost. TPU devices say which slice they belong to; others are taken in order of process, so
    that a slice is made of whole hosts.

    Raises:
      UserError: the axes do not multiply to the number of devices, or the slices are not those that the devices name.
    """
    devices = devices if devices is not None else jax.devices()
    sizes = mesh_sizes(config, len(devices))
    shape, rest = tuple(sizes.values()), (1, *tuple(sizes.values())[1:])
    if devices[0].platform == "tpu":
        found = len({getattr(device, "slice_index", 0) for device in devices})
        if found != sizes["slice"]:
            raise UserError(f"mesh.slice is {sizes['slice']}, but the devices belong to {found} slices")
        if found > 1:
            along = (sizes["slice"], *(1 for _ in rest[1:]))
            grid = mesh_utils.create_hybrid_device_mesh(rest, along, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each mesh axis, slice first, with -1 worked out; UserError as `make_mesh`."""
    sizes = {"slice": config.slice, **{axis: getattr(config, axis) for axis in ("data", "fsdp", "tensor", "context")}}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) == 1 and fixed > 0:
        sizes[free[0]] = devices // fixed
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != devices:
        raise UserError(f"mesh {dataclasses.asdict(config)} does not fit {devices} devices")
    return sizes


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array with these logical axes.

    Raises:
      ValueError: two of its axes map to the same mesh axis.
    """
    entries = [RULES[axis] if axis is not None else () for axis in axes]
    used = [mesh_axis for entry in entries for mesh_axis in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {used}")
    return PartitionSpec(*(entry if len(entry) > 1 else (entry[0] if entry else None) for entry in entries))


def devices_over(sizes: Mapping[str, int], *axes: str | None) -> int:
    """How many devices logical axes are divided over, in a mesh of these sizes; axes that it lacks count for 1."""
    return math.prod(sizes.get(name, 1) for axis in axes if axis is not None for name in RULES[axis])


def shardings(mesh: Mesh, abstract: Any, logical: Any) -> Any:
    """NamedShardings for a tree of arrays, given the tree of their logical axes.

    Raises:
      UserError: a dimension does not divide by the mesh axes it is laid over.
    """

    def place(path, leaf, axes):
        for size, axis in zip(leaf.shape, axes, strict=True):
            if size % (ways := devices_over(mesh.shape, axis)):
                name = "/".join(str(getattr(entry, "key", entry)) for entry in path)
                over = " x ".join(RULES[axis])
                raise UserError(f"{name} {leaf.shape}: size {size} does not divide over {ways} devices of axis {over}")
        return NamedSharding(mesh, spec(axes))

    return jax.tree_util.tree_map_with_path(place, abstract, logical)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """States where an activation lies. Does nothing outside `jax.set_mesh`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))
