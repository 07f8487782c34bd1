"""LoRA (arXiv 2106.09685): instead of a layer's matrices, small adapters beside them are trained.

A target, a matrix W of each layer, becomes W + scale * A B: A maps its inputs to R dimensions and is drawn at random, B
maps those to its outputs and begins at zero, so training begins with the model as it was. Parameters, gradients,
moments and checkpoints of a run are those of the adapters alone, `{"layers": {"adapters": {target: {"a", "b"}}}}`; the
frozen parameters go into a step beside them, where a live DPO reference goes otherwise, and are that reference too.

Legend: Y layers, R rank.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

# Matrices of a layer that may have an adapter, and how many axes of theirs are inputs.
TARGETS = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1}
NO_ADAPTERS: Mapping[str, int] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which matrices get adapters, and how large."""

    rank: int  # [1] 0: no adapters, all parameters are trained
    alpha: float  # [1] what an adapter adds counts alpha / rank times
    targets: tuple[str, ...]  # of TARGETS

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank {self.rank} must not be negative (0 trains all parameters)")
        if self.rank and not self.alpha > 0:
            raise ValueError(f"lora.alpha {self.alpha} must be positive")
        if self.rank and not self.targets:
            raise ValueError(f"lora.targets is empty; there are: {', '.join(TARGETS)}")
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise ValueError(f"lora.targets {unknown[0]!r} is unknown; there are: {', '.join(TARGETS)}")

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each target's adapter; empty without LoRA."""
        return dict.fromkeys(self.targets, self.rank) if self.rank else NO_ADAPTERS

    @property
    def scale(self) -> float:
        """How often what an adapter adds counts."""
        return self.alpha / self.rank


NO_LORA = LoraConfig(rank=0, alpha=1.0, targets=())


# ---- In the model


class Adapter(nnx.Module):
    """The addition to one matrix: `a` [Y, *inputs, R] and `b` [Y, R, *outputs]."""

    def __init__(self, matrix: nnx.Param, inputs: int, rank: int):
        """`matrix` [Y, *inputs, *outputs] has metadata as the model's parameters do; `inputs` is their number."""
        (layers, *shape), (axis, *axes), dtype = matrix[...].shape, matrix.get_metadata()["axes"], matrix[...].dtype
        self.a = nnx.Param(
            jnp.zeros((layers, *shape[:inputs], rank), dtype),
            axes=(axis, *axes[:inputs], None),
            init=math.prod(shape[:inputs]) ** -0.5,
        )
        self.b = nnx.Param(
            jnp.zeros((layers, rank, *shape[inputs:]), dtype), axes=(axis, None, *axes[inputs:]), init=0.0
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """What it adds to the product of x [..., *inputs] with the matrix, in a layer whose part is sliced already."""
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        return jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1)


class Adapters(nnx.Module):
    """Those of a stack of layers, by their matrices' names."""

    def __init__(self, block: nnx.Module, ranks: Mapping[str, int]):
        for name, rank in ranks.items():
            setattr(self, name, Adapter(getattr(block, name), TARGETS[name], rank))


def ranks_in(params: Mapping) -> Mapping[str, int]:
    """The rank of each adapter that parameters hold."""
    return {name: adapter["a"].shape[-1] for name, adapter in params["layers"].get("adapters", NO_ADAPTERS).items()}


# ---- In a run


def trained(tree: dict) -> dict:
    """The part of a tree like the parameters that a run trains: its adapters, or all of it where it has none."""
    return {"layers": {"adapters": tree["layers"]["adapters"]}} if "adapters" in tree["layers"] else tree


def joined(config: LoraConfig, params: dict, frozen: dict | None) -> dict:
    """What the model reads: frozen parameters with adapters in them, or, without LoRA, what is trained.

    Args:
      config: the run's.
      params: what is trained.
      frozen: the parameters that the adapters are beside; not read without LoRA.
    """
    if not config.rank:
        return params
    adapters = {
        name: {"a": adapter["a"], "b": config.scale * adapter["b"]}
        for name, adapter in params["layers"]["adapters"].items()
    }
    return {**frozen, "layers": {**frozen["layers"], "adapters": adapters}}


def adapted(config: LoraConfig, objective: Callable) -> Callable:
    """An objective as one of what is trained; its second argument then is what is frozen."""
    if not config.rank:
        return objective
    return lambda params, frozen, batch: objective(joined(config, params, frozen), frozen, batch)


def merged(config: LoraConfig, params: dict, frozen: dict) -> dict:
    """Parameters of a model without adapters that computes the same, up to rounding."""

    def merge(matrix: jax.Array, adapter: dict) -> jax.Array:
        product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision="highest"))(adapter["a"], adapter["b"])
        return (matrix + config.scale * product).astype(matrix.dtype)

    layers = frozen["layers"]
    adapters = params["layers"]["adapters"]
    return {**frozen, "layers": {**layers, **{name: merge(layers[name], adapters[name]) for name in adapters}}}
