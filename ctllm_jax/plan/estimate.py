"""A plan: memory, work, traffic, time and cost of a config on a slice, each with where it comes from."""

import dataclasses

from ctllm_jax.hardware import Slice
from ctllm_jax.plan import arithmetic, traffic
from ctllm_jax.plan.compile import Compiled, compiled
from ctllm_jax.plan.kernel_cycles import kernel_seconds
from ctllm_jax.train_config import TrainConfig

PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # matrix products of each attention kernel


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes, FLOPs and seconds of one device and step, unless the name says otherwise."""

    slice: str
    chip: str
    devices: int
    mesh: dict[str, int]
    attention: str
    remat: str
    loss: str
    batch_size: int
    rows: int  # sequences of a device in a microbatch
    microbatches: int
    tokens_per_step: int  # of all devices
    parameters: int
    memory: int  # that the chip has for a program
    arguments: dict[str, int]
    temporary: dict[str, int]
    work: arithmetic.Work
    collectives: list[traffic.Collective]
    compiled: Compiled | None
    floor_seconds: dict[str, float]  # what each resource needs at least, by arithmetic
    compiler_seconds: float | None  # the compiler's estimate without Pallas kernels
    kernel_seconds: float | None  # the estimate of the kernels, where it can be had
    budget_tokens: float  # to train on, all devices

    @property
    def needed(self) -> int:
        """Memory at the fullest moment: the compiler's figure, else the arithmetic's."""
        if self.compiled and not self.compiled.refusal:
            return self.compiled.peak
        return sum(self.arguments.values()) + sum(self.temporary.values())

    @property
    def fits(self) -> bool:
        """Whether the chip has the memory; a compiler that refuses is believed."""
        if self.compiled:
            return self.compiled.refusal is None
        return self.needed <= self.memory

    @property
    def seconds(self) -> float:
        """Time of a step: the compiler's estimate and the kernels', no less than the largest floor; else that floor."""
        floor = max(self.floor_seconds.values())
        if self.compiler_seconds is None:
            return floor
        return max(floor, self.compiler_seconds + (self.kernel_seconds or 0.0))

    @property
    def estimated(self) -> bool:
        """Whether `seconds` estimates all the work; else it is a least time, without the kernels or by floors."""
        if self.compiler_seconds is None:
            return False
        return self.kernel_seconds is not None or not self.compiled.kernels

    def share_of_peak(self, seconds: float) -> float:
        """Of the chip's peak, if a step takes so long: FLOPs of the model, the causal half of attention."""
        peak = self.work.hardware_flops / self.floor_seconds["FLOPs"]
        return self.work.model_flops / seconds / peak

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, at `seconds` a step."""
        return self.tokens_per_step / self.seconds

    @property
    def days(self) -> float:
        """For the token budget, at `seconds` a step and nothing lost."""
        return self.budget_tokens / self.tokens_per_second / 86_400


def make_plan(config: TrainConfig, target: Slice, *, tokens: float, compiling: bool) -> Plan:
    """Plans a config on a slice.

    Args:
      config: with an architecture.
      target: where it would run.
      tokens: billions to train on; 0 takes the config's steps.
      compiling: whether to compile, or to leave it at arithmetic.

    Raises:
      UserError: the mesh does not fit the slice.
      ValueError: the batch does not divide over it.
    """
    part = arithmetic.share(config, target)
    per_step = config.sides * config.batch_size * config.model.max_length
    work, exchanged = arithmetic.work(config, target), traffic.collectives(config, target)
    found = compiled(config, target) if compiling else None
    clock = target.chip.clock
    return Plan(
        slice=target.name,
        chip=target.chip.kind,
        devices=target.devices,
        mesh=part.mesh,
        attention=config.model.attention,
        remat=config.model.remat,
        loss=arithmetic.loss_form(config, part, target),
        batch_size=config.batch_size,
        rows=part.rows,
        microbatches=part.microbatches,
        tokens_per_step=per_step,
        parameters=arithmetic.count(config.model),
        memory=target.chip.memory,
        arguments=arithmetic.arguments(config, target),
        temporary=arithmetic.temporary(config, target),
        work=work,
        collectives=exchanged,
        compiled=found,
        floor_seconds={
            "FLOPs": work.hardware_flops / target.chip.peak_flops,
            "memory": work.memory_bytes / target.chip.memory_bandwidth,
            **{
                link: sum(one.seconds for one in exchanged if one.link == link)
                for link in ("link", "network")
                if any(one.link == link for one in exchanged)
            },
        },
        compiler_seconds=found.cycles / clock if found and found.cycles and clock else None,
        kernel_seconds=attention_seconds(config, target, found) if found else None,
        budget_tokens=tokens * 1e9 or float(config.clock(config.model.max_length).run * per_step),
    )


def attention_seconds(config: TrainConfig, target: Slice, found: Compiled) -> float | None:
    """Time of the attention kernels that a compiled step calls, by their static count; None where there is none.

    The count of long straight-line code can lie below what the matrix unit takes for the products (seen on v5e), so no
    kernel is taken to be faster than those of its visible half.
    """
    model, part = config.model, arithmetic.share(config, target)
    if not found.kernels or model.attention != "pallas_tpu":
        return None
    tensor, context = part.mesh["tensor"], part.mesh["context"]
    heads = model.num_heads // tensor, model.num_kv_heads // tensor
    each = kernel_seconds(target.chip.name, *heads, model.max_length, model.head_dim)
    if each is None:
        return None
    product = heads[0] * model.max_length**2 * model.head_dim / target.chip.peak_flops
    calls = {name.removeprefix("flash_attention_"): count for name, count in found.kernels.items()}
    total = sum(calls.get(name, 0) * max(each[name], products * product) for name, products in PRODUCTS.items())
    return total * part.rows / context
