"""One optimizer step as a pure function, and where its arrays lie: what the trainer runs and `ctllm plan` compiles.

Needs no data: `abstract_state` and `abstract_batch` describe the arguments for any mesh, be its devices at hand or only
described.

Legend: B sequences or pairs of the global batch, L positions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax.model import ModelConfig, abstract_params, logical_axes
from ctllm_jax.objectives import BATCH_FIELDS, Batch, Objective
from ctllm_jax.sharding import shardings, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes. `skipped` counts steps whose gradient was not finite: they change nothing else."""

    params: dict
    optimizer: Any
    step: jax.Array
    skipped: jax.Array


def train_step(
    state: TrainState,
    reference: dict | None,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    microbatches: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Gradients are sums over microbatches divided once by the global count of what was predicted."""

    def part(sums, piece):
        grads, metrics = jax.grad(objective, has_aux=True)(state.params, reference, piece)
        return jax.tree.map(jnp.add, sums, (grads, metrics)), None

    # Every part takes rows from every device: part j has the rows i * microbatches + j.
    pieces = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], pieces)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(jax.grad(objective, has_aux=True), state.params, reference, first),
    )
    if microbatches == 1:
        (grads, metrics), _ = part(zeros, first)
    else:
        (grads, metrics), _ = jax.lax.scan(part, zeros, pieces)
    count = jnp.maximum(metrics["count"], 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    norm = optax.tree.norm(grads)
    updates, moments = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(norm)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    state = TrainState(
        params=keep(params, state.params),
        optimizer=keep(moments, state.optimizer),
        step=state.step + 1,
        skipped=state.skipped + ~finite,
    )
    return state, {**metrics, "grad_norm": norm, "skipped": state.skipped}


def state_shardings(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where a state lies: moments with their parameters, counters everywhere."""
    params, layout = abstract_params(model), shardings(mesh, abstract_params(model), logical_axes(model))
    everywhere = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        layout,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(layout, moments, everywhere, everywhere)


def start_state(params: dict, optimizer: optax.GradientTransformation, layout: TrainState) -> TrainState:
    """The state before the first step, of parameters that lie as `layout` says."""
    moments = jax.jit(optimizer.init, out_shardings=layout.optimizer)(params)
    step, skipped = (jax.device_put(np.int32(0), layout.step) for _ in range(2))
    return TrainState(params, moments, step, skipped)


def abstract_state(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state."""
    params, counter = abstract_params(model), jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(params, jax.eval_shape(optimizer.init, params), counter, counter)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(model, optimizer, mesh),
    )


def batch_sharding(mesh: Mesh, sides: tuple[int, ...], narrow: bool) -> NamedSharding:
    """Where a batch's arrays lie: [B, L], [B, 2, L] with sides (2,), or [B] if narrow."""
    return NamedSharding(mesh, spec(("batch",) if narrow else ("batch", *(None for _ in sides), "length")))


def abstract_batch(batch_size: int, length: int, sides: tuple[int, ...], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch, as `data.batches` makes it; sides is (2,) for preference pairs."""
    wide, narrow = (batch_sharding(mesh, sides, narrow) for narrow in (False, True))
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *sides, length), dtype, sharding=wide)
        for name, dtype in BATCH_FIELDS.items()
    }
    return {**batch, "source": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=narrow)}


def jit_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    microbatches: int,
    layout: TrainState,
    xla_options: dict[str, str] | None = None,
) -> Callable[[TrainState, dict | None, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step` compiled for states that lie as `layout` says; the state given to it is used up."""
    return jax.jit(
        functools.partial(train_step, objective=objective, optimizer=optimizer, microbatches=microbatches),
        out_shardings=(layout, layout.step),  # metrics lie everywhere, as the counters do
        donate_argnums=0,
        compiler_options=xla_options or None,
    )
