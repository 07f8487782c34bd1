"""Collectives of a step, counted from the mesh: bytes that a device sends, how often, over which link.

What XLA places where the sharding rules ask for it: parameters are gathered over fsdp for the forward and again for
the backward pass, and their gradients scattered, in the compute dtype; replicas add their gradients; tensor and context
axes exchange activations in every layer. A ring passes (n - 1) / n of the whole result, an all-reduce twice that.
"""

import dataclasses
import math

import jax.numpy as jnp

from ctllm_jax.hardware import Slice
from ctllm_jax.plan.arithmetic import FP32, parameter_bytes, share
from ctllm_jax.train_config import TrainConfig

AXES = ("slice", "data", "fsdp", "tensor", "context")  # outermost first, as `sharding.make_mesh` lays them out
AWAITED = ("tensor", "context")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange in a step."""

    what: str
    kind: str  # as XLA names it
    axis: str
    ways: int
    bytes: int  # that a device sends each time
    times: int  # in a step
    link: str  # "link" within a slice or host, "network" between them
    seconds: float  # all of them at the link's whole bandwidth: no less
    awaited: bool  # the next product needs the result, so no work of the same layer can hide it


def collectives(config: TrainConfig, target: Slice) -> list[Collective]:
    """All collectives of a step whose axis has more than one device."""
    model, part = config.model, share(config, target)
    mesh, item = part.mesh, jnp.dtype(model.dtype).itemsize
    parameters = parameter_bytes(config, target)
    fsdp, tensor, context = mesh["fsdp"], mesh["tensor"], mesh["context"]
    whole = parameters["all"] * fsdp * item // FP32  # a tensor share of the parameters, gathered, in the compute dtype
    hidden = part.tokens * model.d_model * item
    keys = 2 * part.tokens * context * model.num_kv_heads * model.head_dim * item // tensor
    layers, parts = model.num_layers, config.microbatches
    recomputed = model.remat != "none"
    rows = [
        ("parameters", "all-gather", "fsdp", _ring(whole, fsdp), 2 * parts),
        ("gradients", "reduce-scatter", "fsdp", _ring(whole, fsdp), parts),
        ("gradients", "all-reduce", "data", 2 * _ring(whole // fsdp, mesh["data"]), parts),
        ("gradients", "all-reduce", "slice", 2 * _ring(whole // fsdp, mesh["slice"]), parts),
        ("activations", "all-reduce", "tensor", 2 * _ring(hidden, tensor), (5 if recomputed else 4) * layers * parts),
        ("keys and values", "all-gather", "context", _ring(keys, context), (2 if recomputed else 1) * layers * parts),
        ("their gradients", "reduce-scatter", "context", _ring(keys, context), layers * parts),
    ]
    found = []
    for what, kind, axis, size, times in rows:
        if mesh[axis] > 1:
            link = link_of(axis, mesh, target)
            bandwidth = target.chip.link_bandwidth if link == "link" else target.chip.network_bandwidth
            found.append(
                Collective(what, kind, axis, mesh[axis], size, times, link, size * times / bandwidth, axis in AWAITED)
            )
    return found


def _ring(size: int, ways: int) -> int:
    return size * (ways - 1) // ways


def link_of(axis: str, mesh: dict[str, int], target: Slice) -> str:
    """Whether an axis stays within a slice or host ("link"), or leaves it ("network")."""
    inner = math.prod(mesh[name] for name in AXES[AXES.index(axis) :])
    return "link" if inner <= math.prod(target.shape) else "network"
