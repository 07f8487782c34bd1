"""One optimizer step as a pure function, and where its arrays lie: what the trainer runs and `ctllm plan` compiles.

Needs no data: `abstract_state` and `abstract_batch` describe the arguments for any mesh, whether its devices are at
hand or only described.

Legend: B sequences or pairs of the global batch, L positions, Y layers, W gradient norms that are remembered.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax.lora import NO_ADAPTERS, trained
from ctllm_jax.model import ModelConfig, abstract_params, logical_axes
from ctllm_jax.objectives import BATCH_FIELDS, Batch, Objective, whole_step
from ctllm_jax.optim import Optimizer, averaged, is_spike
from ctllm_jax.precision import wide
from ctllm_jax.sharding import shardings, spec

UPDATE_METRICS = (  # what a step reports of its update; its other metrics are sums over what was predicted
    "grad_norm",
    "update_norm",
    "param_norm",
    "layers/grad_norm",  # [Y]
    "layers/update_ratio",  # [Y], norm of the update over that of the parameters
    "learning_rate",
    "skipped",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
      params: fp32 parameters: all, or those of LoRA adapters alone.
      moments: the optimizer's, laid out as the parameters.
      step: updates so far, those that were skipped among them.
      skipped: updates that were skipped: the gradient was not finite, or a spike.
      norms_W: norms of the last finite gradients, by step modulo W; NaN where there has been none.
      average: exponential moving average of the parameters, fp32 and laid out as they are; None where none is kept.
    """

    params: dict
    moments: Any
    step: jax.Array
    skipped: jax.Array
    norms_W: jax.Array
    average: dict | None = None

    @property
    def model(self) -> dict:
        """The run's parameters for everybody but the trainer: their average, where one is kept."""
        return self.params if self.average is None else self.average

    @property
    def rest(self) -> tuple:
        """What resuming needs besides `model`: the other fields in order, then the parameters unless they are it."""
        rest = self.moments, self.step, self.skipped, self.norms_W
        return rest if self.average is None else (*rest, self.params)


def joined_state(model: dict, rest: tuple) -> TrainState:
    """The state with this `model` and this `rest`."""
    moments, step, skipped, norms_W, *params = rest
    return TrainState(*(params or [model]), moments, step, skipped, norms_W, model if params else None)


def train_step(
    state: TrainState,
    reference: dict | None,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: Optimizer,
    microbatches: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, and its metrics. A skipped one leaves parameters, moments and average as they are, to the last bit.

    A spike's norm is remembered like any other, so norms that stay high soon count as normal.
    """
    grads, sums = gradient(state.params, reference, batch, objective, microbatches)
    norm = optax.tree.norm(grads)
    rate = optimizer.rate(state.step)
    direction, moments = optimizer.direction.update(grads, state.moments, state.params)
    updates = jax.tree.map(lambda x: -rate * x, direction)
    finite = jnp.isfinite(norm)
    accepted = finite & ~is_spike(norm, state.norms_W, optimizer.spike_deviations)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(accepted, new, old))
    after = TrainState(
        params=keep(optax.apply_updates(state.params, updates), state.params),
        moments=keep(moments, state.moments),
        step=state.step + 1,
        skipped=state.skipped + ~accepted,
        norms_W=_remember(state.norms_W, norm, finite, state.step),
    )
    if state.average is not None:
        average = averaged(state.average, after.params, after.step - after.skipped, optimizer.ema_half_life)
        after = dataclasses.replace(after, average=keep(average, state.average))
    values = (
        norm,
        optax.tree.norm(updates),
        optax.tree.norm(state.params),
        _by_layer(grads),
        _by_layer(updates) / _by_layer(state.params),
        rate,
        after.skipped,
    )
    return after, {**sums, **dict(zip(UPDATE_METRICS, values, strict=True))}


def gradient(
    params: dict, reference: dict | None, batch: Batch, objective: Objective, microbatches: int
) -> tuple[dict, dict[str, jax.Array]]:
    """(gradient of the mean objective, sums of its diagnostics) over a batch, computed part by part.

    The parts' sums are added up and divided once, by the global count of what was predicted.
    """
    grads, sums = summed(lambda piece: jax.grad(objective, has_aux=True)(params, reference, piece), batch, microbatches)
    count = jnp.maximum(sums["count"], 1.0)
    return jax.tree.map(lambda g: g / count, grads), sums


def summed(function: Callable[[Batch], Any], batch: Batch, parts: int) -> Any:
    """Sums of a function's results for the parts of a batch, computed in turn with the memory of one part."""

    def add(sums, piece):
        return jax.tree.map(jnp.add, sums, function(piece)), None

    # Every part takes rows from every device: part j has the rows i * parts + j.
    pieces = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), whole_step(batch))
    first = jax.tree.map(lambda x: x[0], pieces)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))
    return add(zeros, first)[0] if parts == 1 else jax.lax.scan(add, zeros, pieces)[0]


def _by_layer(tree: dict) -> jax.Array:
    """Euclidean norm of each layer's part of a tree like the parameters [Y]."""
    squares = jax.tree.map(lambda x: jnp.sum(x * x, axis=range(1, x.ndim)), tree["layers"])
    return jnp.sqrt(sum(jax.tree.leaves(squares)))


def _remember(norms_W: jax.Array, norm: jax.Array, finite: jax.Array, step: jax.Array) -> jax.Array:
    """`norms_W` with a step's norm in place of the oldest, if it is finite."""
    place = step % norms_W.size
    return norms_W.at[place].set(jnp.where(finite, norm, norms_W[place]))


def state_shardings(
    model: ModelConfig, optimizer: Optimizer, mesh: Mesh, ranks: Mapping[str, int] = NO_ADAPTERS
) -> TrainState:
    """Where a state lies: moments with their parameters, counters everywhere.

    With `ranks`, those of LoRA adapters by matrix, the state is the adapters' alone.
    """
    params = trained(abstract_params(model, ranks))
    layout = shardings(mesh, params, trained(logical_axes(model, ranks)))
    everywhere = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree_utils.tree_map_params(
        optimizer.direction,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.direction.init, params),
        layout,
        transform_non_params=lambda _: everywhere,
    )
    average = layout if optimizer.ema_half_life else None
    return TrainState(layout, moments, everywhere, everywhere, everywhere, average)


def start_state(params: dict, optimizer: Optimizer, layout: TrainState) -> TrainState:
    """The state before the first step, of parameters that lie as `layout` says."""
    moments = jax.jit(optimizer.direction.init, out_shardings=layout.moments)(params)
    step, skipped = (jax.device_put(np.int32(0), layout.step) for _ in range(2))
    # Not by device_put, which has the processes compare what they put: NaN differs from itself.
    norms_W = jnp.full(optimizer.spike_window, jnp.nan, jnp.float32, device=layout.norms_W)
    average = None  # else a copy, for a step donates both
    if optimizer.ema_half_life:
        average = jax.tree.map(lambda x: jnp.array(x, wide(x.dtype), copy=True), params)
    return TrainState(params, moments, step, skipped, norms_W, average)


def abstract_state(model: ModelConfig, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state."""
    params, counter = abstract_params(model), jax.ShapeDtypeStruct((), jnp.int32)
    norms_W = jax.ShapeDtypeStruct((optimizer.spike_window,), jnp.float32)
    average = None
    if optimizer.ema_half_life:
        average = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, wide(x.dtype)), params)
    state = TrainState(params, jax.eval_shape(optimizer.direction.init, params), counter, counter, norms_W, average)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(model, optimizer, mesh),
    )


def batch_sharding(mesh: Mesh, sides: tuple[int, ...], narrow: bool) -> NamedSharding:
    """Where a batch's arrays lie: [B, L], [B, 2, L] with sides (2,), or [B] and [B, 2] if narrow."""
    return NamedSharding(mesh, spec(("batch",) if narrow else ("batch", *(None for _ in sides), "length")))


def abstract_batch(batch_size: int, length: int, sides: tuple[int, ...], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch, as `data.batches` makes it; sides is (2,) for preference pairs."""
    wide, narrow = (batch_sharding(mesh, sides, narrow) for narrow in (False, True))
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *sides, length), dtype, sharding=wide)
        for name, dtype in BATCH_FIELDS.items()
    }
    batch["source"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=narrow)
    if sides:
        batch["reference"] = jax.ShapeDtypeStruct((batch_size, *sides), jnp.float32, sharding=narrow)
    return batch


def jit_step(
    objective: Objective,
    optimizer: Optimizer,
    microbatches: int,
    layout: TrainState,
    compiler_options: dict[str, str] | None = None,
) -> Callable[[TrainState, dict | None, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step` compiled for states that lie as `layout` says; the state given to it is used up."""
    return jax.jit(
        functools.partial(train_step, objective=objective, optimizer=optimizer, microbatches=microbatches),
        out_shardings=(layout, layout.step),  # metrics lie everywhere, as the counters do
        donate_argnums=0,
        compiler_options=compiler_options or None,
    )
