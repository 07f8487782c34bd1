"""What a step takes, counted without compiling: memory by category, FLOPs, bytes.

Arguments are counted from the very shapes and shardings that the trainer uses, so they are exact. Temporary memory is a
model of what XLA holds at its two fullest moments, calibrated against compiled programs (tests/test_plan.py holds it to
them): when the loss has its logits, and when the backward pass is in its first layer.

Legend: B rows, L length, D model width, F feed-forward width, N query heads, K key/value heads, H head size,
V vocabulary (padded), Y layers; tokens are those of one device in one microbatch.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from ctllm_jax.cross_entropy import CHUNK, choose_form
from ctllm_jax.duration import Clock
from ctllm_jax.hardware import Slice
from ctllm_jax.model import REMAT_POLICIES, ModelConfig, count_params, flops_per_token
from ctllm_jax.optim import OptimizerConfig, make_optimizer
from ctllm_jax.sharding import devices_over, mesh_sizes
from ctllm_jax.step import abstract_batch, abstract_state
from ctllm_jax.train_config import TrainConfig

FP32 = 4
_ANY_CLOCK = Clock(tokens=1, epoch=1.0, run=10**12)  # longer than any schedule; shapes do not depend on it


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device gets of a step."""

    mesh: dict[str, int]
    rows: int  # sequences in a microbatch
    length: int  # positions of each
    microbatches: int

    @property
    def tokens(self) -> int:
        """Tokens in a microbatch."""
        return self.rows * self.length

    def ways(self, *axes: str) -> int:
        """Devices that the logical axes are divided over."""
        return devices_over(self.mesh, *axes)


def share(config: TrainConfig, target: Slice) -> Share:
    """One device's part of a step.

    Raises:
      UserError: the mesh does not fit the slice.
      ValueError: the batch does not divide over it.
    """
    mesh = mesh_sizes(config.mesh, target.devices)
    row_ways, length_ways = devices_over(mesh, "batch"), devices_over(mesh, "length")
    if config.batch_size % (row_ways * config.microbatches) or config.model.max_length % length_ways:
        raise ValueError(
            f"batch_size {config.batch_size} in {config.microbatches} microbatches of {config.model.max_length} tokens "
            f"does not divide over {row_ways} x {length_ways} devices"
        )
    rows = config.sides * config.batch_size // (row_ways * config.microbatches)
    return Share(mesh, rows, config.model.max_length // length_ways, config.microbatches)


@functools.lru_cache
def count(model: ModelConfig) -> int:
    """Number of parameters."""
    return count_params(model)


# ---- Memory


def arguments(config: TrainConfig, target: Slice) -> dict[str, int]:
    """Bytes of a device's arguments: parameters, moments, average, a live reference, batch; padded as a TPU's are."""
    padded = target.chip.platform == "tpu"
    model, optimizer, mesh = _laid_out(config, target)
    state = _state_bytes(model, optimizer, mesh, padded)
    batch = _batch_bytes(config.batch_size, model.max_length, config.sides, mesh, padded)
    counted = {"parameters": state["all"], "moments": state["moments"], "batch": batch}
    if optimizer.ema_half_life:
        counted["average"] = state["average"]
    return {**counted, "reference": counted["parameters"]} if config.objective.reference == "live" else counted


def parameter_bytes(config: TrainConfig, target: Slice) -> dict[str, int]:
    """A device's fp32 parameters: all, those of the layers, those of the head."""
    return _state_bytes(*_laid_out(config, target), False)


def _laid_out(config: TrainConfig, target: Slice) -> tuple:
    # What the shapes depend on and no more, so that a search counts each layout once.
    model = dataclasses.replace(config.model, remat="full", attention="xla")
    return model, config.optimizer, tuple(mesh_sizes(config.mesh, target.devices).items())


@functools.lru_cache(maxsize=1024)
def _state_bytes(
    model: ModelConfig, optimizer: OptimizerConfig, mesh: tuple[tuple[str, int], ...], padded: bool
) -> dict[str, int]:
    state = abstract_state(model, make_optimizer(optimizer, model, _ANY_CLOCK), _abstract_mesh(dict(mesh)))
    head = state.params["embed" if model.tie_embeddings else "head"]
    return {
        "all": _bytes(state.params, padded),
        "layers": _bytes(state.params["layers"], padded),
        "head": _bytes(head, padded),
        "moments": _bytes((state.moments, state.step, state.skipped, state.norms_W), padded),
        "average": _bytes(state.average, padded),
    }


@functools.lru_cache(maxsize=1024)
def _batch_bytes(batch_size: int, length: int, sides: int, mesh: tuple[tuple[str, int], ...], padded: bool) -> int:
    return _bytes(abstract_batch(batch_size, length, (2,) if sides == 2 else (), _abstract_mesh(dict(mesh))), padded)


def _abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _bytes(tree, padded: bool) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        elements = math.prod(shape)
        if padded and len(shape) < 2:  # vectors and scalars fill whole rows of 128 lanes
            elements = -(-elements // 128) * 128
        total += elements * leaf.dtype.itemsize
    return total


def kept_per_token(model: ModelConfig, tensor: int) -> int:
    """Bytes that a layer keeps of a token for the backward pass; `tensor` devices share heads and feed-forward."""
    queries, keys = model.num_heads * model.head_dim // tensor, model.num_kv_heads * model.head_dim // tensor
    width, hidden = model.d_model, model.d_ff // tensor
    widths = {
        "attention_output": queries,
        "query": queries,
        "key": keys,
        "value": keys,
        "attention_residual": width,
        "gate": hidden,
        "up": hidden,
    }
    itemsize = jnp.dtype(model.dtype).itemsize
    lse = FP32 * model.num_heads // tensor
    kept = REMAT_POLICIES[model.remat]
    if kept is None:  # as JAX's autodiff keeps: each norm's input and quotient in fp32 and its output; five of SwiGLU
        norms, swiglu = 2 * (2 * FP32 + itemsize) * width, itemsize * 5 * hidden  # gate, three of silu, the product
        return norms + swiglu + itemsize * (2 * queries + 2 * keys + hidden) + lse
    return itemsize * (width + sum(widths.get(name, 0) for name in kept)) + (lse if "attention_lse" in kept else 0)


def temporary(config: TrainConfig, target: Slice) -> dict[str, int]:
    """Bytes of a device beyond its arguments at the fullest moment, by category; an estimate."""
    model, part = config.model, share(config, target)
    tensor, ways = part.mesh["tensor"], part.ways("embed", "heads")
    parameters = parameter_bytes(config, target)
    item = jnp.dtype(model.dtype).itemsize
    common = {"kept activations": model.num_layers * part.tokens * kept_per_token(model, tensor)}
    if target.chip.platform == "tpu":  # rounded once, before the layers; a GPU rounds each layer's when it is used
        common["weights in compute dtype"] = parameters["layers"] * item // FP32
    if part.microbatches > 1:
        common["summed gradients"] = parameters["all"]
    loss = {"loss": _loss_bytes(config, part, target)}
    layer = {
        "gradients": parameters["layers"] + parameters["head"],
        "one layer's backward pass": _layer_bytes(model, part, parameters["layers"] * ways // model.num_layers),
    }
    return {**common, **max(loss, layer, key=lambda moment: sum(moment.values()))}


def _loss_bytes(config: TrainConfig, part: Share, target: Slice) -> int:
    """The gathered head, its gradient before it is reduced, and logits: all of them, or a chunk's."""
    model, item = config.model, jnp.dtype(config.model.dtype).itemsize
    vocab = model.padded_vocab_size // part.mesh["tensor"]
    head = model.d_model * vocab
    hidden = part.tokens * model.d_model
    if loss_form(config, part, target) == "dense":
        logits = FP32 * part.tokens * vocab
        # A GPU holds the logits beside their gradient; a TPU puts the one into the other's place.
        return item * head + (2 * logits if target.chip.platform == "gpu" else logits + FP32 * head) + 2 * item * hidden
    chunk = min(CHUNK, vocab)
    shares = part.ways("embed")
    return item * head + FP32 * head // shares + 2 * FP32 * part.tokens * chunk + (FP32 + 2 * item) * hidden


def loss_form(config: TrainConfig, part: Share, target: Slice) -> str:
    """Dense or chunked cross-entropy, as the objective will choose."""
    tokens = part.tokens * part.ways("batch", "length")
    return choose_form(config.objective.form, tokens, config.model.padded_vocab_size, part.mesh, target.chip)


def _layer_bytes(model: ModelConfig, part: Share, layer: int) -> int:
    """Gathered weights of two layers (one is fetched ahead), a layer's unreduced gradient, and its activations with
    their gradients. `layer` is the bytes of one layer's whole fp32 weights."""
    tensor, item = part.mesh["tensor"], jnp.dtype(model.dtype).itemsize
    gathered = 3 * layer * item // FP32 // tensor
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // tensor
    activations = part.tokens * item * (2 * heads + 4 * model.d_model + 4 * model.d_ff // tensor)
    scores = 0
    if model.attention == "xla":  # scores and their gradient in fp32, weights in the compute dtype
        context = part.mesh["context"]
        scores = part.rows * model.num_heads // tensor * part.length * part.length * context * (2 * FP32 + 2 * item)
    return gathered + activations + scores


# ---- Work


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does in a step."""

    model_flops: float  # causal: the visible half of attention; without recomputation
    model_flops_full: float  # the other convention: the whole square
    hardware_flops: float  # with what is computed again
    memory_bytes: float  # least traffic with its memory


def work(config: TrainConfig, target: Slice) -> Work:
    """FLOPs and bytes of a device in a step."""
    model, part = config.model, share(config, target)
    tokens = part.tokens * part.microbatches / part.mesh["tensor"]
    causal, full = (flops_per_token(model, model.max_length, causal=flag) for flag in (True, False))
    again = recomputed_per_token(config, part, target)
    parameters = parameter_bytes(config, target)
    item = jnp.dtype(model.dtype).itemsize
    gathered = parameters["layers"] * item // FP32 * part.ways("embed")
    activations = model.num_layers * part.tokens * kept_per_token(model, part.mesh["tensor"])
    state = (9 if config.optimizer.ema_half_life else 7) * parameters["all"]  # an average is read and written
    traffic = state + part.microbatches * (5 * gathered + 2 * activations)
    reference = 4 / 3 if config.objective.reference == "live" else 1.0  # it goes forward only: a third of the work more
    return Work(tokens * causal * reference, tokens * full * reference, tokens * (causal * reference + again), traffic)


def recomputed_per_token(config: TrainConfig, part: Share, target: Slice) -> float:
    """FLOPs of a token that the backward pass spends on what was not kept."""
    model, kept = config.model, REMAT_POLICIES[config.model.remat]
    D, F, N, K, H = model.d_model, model.d_ff, model.num_heads, model.num_kv_heads, model.head_dim
    costs = {
        "query": 2 * D * N * H,
        "key": 2 * D * K * H,
        "value": 2 * D * K * H,
        "attention_output": 2 * N * H * model.max_length,  # causal
        "attention_residual": 2 * N * H * D,
        "gate": 2 * D * F,
        "up": 2 * D * F,
    }
    again = 0 if kept is None else model.num_layers * sum(cost for name, cost in costs.items() if name not in kept)
    chunked = loss_form(config, part, target) == "chunked"
    return again + (2 * D * model.padded_vocab_size if chunked else 0)
