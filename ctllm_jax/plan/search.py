"""Other ways to put the same training on the same slice: meshes, remat policies, microbatches, ranked or nearest first.

The batch, the model and the optimizer stay as they are, so that every candidate trains the same model. Candidates are
weighed by arithmetic; the best are compiled.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from ctllm_jax.attention import BACKENDS
from ctllm_jax.common.errors import UserError
from ctllm_jax.hardware import Slice
from ctllm_jax.model import REMAT_POLICIES
from ctllm_jax.plan.estimate import Plan, make_plan
from ctllm_jax.sharding import MeshConfig, mesh_sizes
from ctllm_jax.train_config import TrainConfig

MARGIN = 0.95  # of a chip's memory: what the arithmetic may fill, as it is off by a few percent
SHOWN = 12  # candidates of a ranking
COMPILED = 3  # of them that are compiled
_INNER = (1, 2, 4, 8)  # devices of the tensor and the context axis that are tried


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config, the flags that make it from the one that was given, and its plan."""

    config: TrainConfig
    flags: str
    changes: int  # settings that differ
    plan: Plan


def rank(config: TrainConfig, target: Slice, tokens: float) -> list[Candidate]:
    """Candidates that fit by arithmetic, fastest first; those that need less memory first among equals.

    Raises:
      UserError: there is none.
    """
    fitting = _fitting(_layouts(config, target), target, tokens)
    if not fitting:
        raise UserError(f"nothing that was tried fits {target.name}: take more or larger chips")
    return sorted(fitting, key=_weight)[:SHOWN]


def prove(ranking: Sequence[Candidate], target: Slice, tokens: float) -> list[Candidate]:
    """The ranking with its first candidates compiled, those in the order of their estimates."""
    proven = [
        dataclasses.replace(one, plan=make_plan(one.config, target, tokens=tokens, compiling=True))
        for one in ranking[:COMPILED]
    ]
    return sorted(proven, key=lambda one: (not one.plan.fits, one.plan.seconds)) + list(ranking[COMPILED:])


def nearest(config: TrainConfig, target: Slice, tokens: float, compiling: bool) -> Candidate | None:
    """The candidate that fits with the fewest changes, the fastest of them; compiled, as a proof, where that can be."""
    layouts = sorted(_layouts(config, target), key=lambda layout: layout.changes)
    tries = COMPILED
    for _, equal in itertools.groupby(layouts, key=lambda layout: layout.changes):
        for one in sorted(_fitting(equal, target, tokens), key=_weight):
            if not compiling:
                return one
            plan = make_plan(one.config, target, tokens=tokens, compiling=True)
            if plan.fits:
                return dataclasses.replace(one, plan=plan)
            tries -= 1
            if not tries:
                return None
    return None


def _weight(one: Candidate) -> tuple[float, float]:
    """Seconds that a step cannot hide, by arithmetic (the largest floor, collectives that are waited for); then memory.

    Between near equals (2 %) the one that has less to hide is the better one.
    """
    floors = one.plan.floor_seconds
    waiting = sum(collective.seconds for collective in one.plan.collectives if collective.awaited)
    return max(floors.values()) + waiting + 0.02 * sum(floors.values()), one.plan.needed


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A candidate that has not been weighed."""

    config: TrainConfig
    flags: str
    changes: int


def _layouts(config: TrainConfig, target: Slice) -> Iterator[_Layout]:
    attention = _backend(config, target)
    for mesh, remat, microbatches in itertools.product(_meshes(config, target), REMAT_POLICIES, _microbatches(config)):
        model = dataclasses.replace(config.model, remat=remat, attention=attention)
        other = dataclasses.replace(config, model=model, mesh=mesh, microbatches=microbatches)
        yield _Layout(other, *_flags(config, other, target))


def _fitting(layouts: Iterable[_Layout], target: Slice, tokens: float) -> list[Candidate]:
    """Those that go on the slice and, by arithmetic, into its memory."""
    found = []
    for layout in layouts:
        try:
            plan = make_plan(layout.config, target, tokens=tokens, compiling=False)
        except (UserError, ValueError):
            continue  # does not divide
        if plan.needed <= MARGIN * target.chip.memory:
            found.append(Candidate(layout.config, layout.flags, layout.changes, plan))
    return found


def _meshes(config: TrainConfig, target: Slice) -> list[MeshConfig]:
    """Parameters over a whole slice, or over a part of it with replicas beside; heads and length over a few devices."""
    model, found = config.model, []
    slices = target.count if target.chip.platform == "tpu" or target.count == config.mesh.slice else 1
    inside = target.devices // slices
    for tensor, context in itertools.product(_INNER, _INNER):
        divides = all(size % tensor == 0 for size in (model.num_heads, model.num_kv_heads, model.d_ff))
        if inside % (tensor * context) or not divides or model.padded_vocab_size % tensor:
            continue
        rest = inside // (tensor * context)
        for data in (size for size in (1, 2, 4, 8, 16, 32, 64) if rest % size == 0):
            if model.d_model % (rest // data) == 0:
                found.append(MeshConfig(data, rest // data, tensor, context, slices))
    return found


def _microbatches(config: TrainConfig) -> list[int]:
    return [parts for parts in (2**power for power in range(12)) if config.batch_size % parts == 0]


def _backend(config: TrainConfig, target: Slice) -> str:
    """Our kernels where they support the model, as plain JAX holds the scores; else what the config names."""
    kernels = f"pallas_{target.chip.platform}"
    refused = BACKENDS[kernels].refusals(target.chip.platform, config.model.head_dim, config.model.dtype)
    return config.model.attention if refused or config.model.attention == "cudnn" else kernels


def _flags(config: TrainConfig, other: TrainConfig, target: Slice) -> tuple[str, int]:
    """(command-line flags that turn one config into the other, how many settings they change)."""
    flags = []
    try:
        before = mesh_sizes(config.mesh, target.devices)
    except UserError:
        before = dataclasses.asdict(config.mesh)
    for axis, size in mesh_sizes(other.mesh, target.devices).items():
        if before[axis] != size:
            flags.append(f"--config.mesh.{axis}={size}")
    if other.microbatches != config.microbatches:
        flags.append(f"--config.microbatches={other.microbatches}")
    for name in ("remat", "attention"):
        if getattr(other.model, name) != getattr(config.model, name):
            flags.append(f"--config.model.{name}={getattr(other.model, name)}")
    return " ".join(flags), len(flags)
