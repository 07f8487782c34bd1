"""AdamW with a warm-up and a decay, as CT-LLM trained (Megatron defaults: betas 0.9 and 0.95, decay 0.1, clip 1.0)."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from ctllm_jax.common.errors import UserError
from ctllm_jax.duration import Clock, parse
from ctllm_jax.lora import NO_ADAPTERS, trained
from ctllm_jax.model import ModelConfig, logical_axes

SCHEDULES = ("constant", "cosine", "linear", "wsd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule, and which gradients are not used."""

    learning_rate: float  # [1] peak
    final_learning_rate: float  # [1] at the end of the run
    schedule: str  # one of SCHEDULES
    warmup: str  # duration of the rise from 0, the rate of the first step, to the peak
    decay: str  # wsd: duration of the fall at the end; the others: "", cosine and linear fall from warm-up to end
    beta1: float  # [1] decay of the mean of gradients
    beta2: float  # [1] decay of the mean of their squares
    epsilon: float  # [1] added to the root of that mean
    weight_decay: float  # [1] times the learning rate, of matrices
    clip_norm: float  # [norm] gradients of a larger global norm are scaled down to it (0: none are)
    spike_window: int  # [steps] gradient norms that a new one is compared with
    spike_deviations: float  # [deviations] from so many above their mean on, a step is skipped (0: none is)
    ema_half_life: str = ""  # duration, of the moving average of the parameters; "": none is kept

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is unknown; there are: {', '.join(SCHEDULES)}")
        if (self.schedule == "wsd") != bool(self.decay):
            raise ValueError("decay is for schedule wsd, which needs it; for the others leave it empty")
        if self.learning_rate <= 0 or self.final_learning_rate < 0:
            raise ValueError(
                f"learning_rate {self.learning_rate} must be above 0, and final_learning_rate "
                f"{self.final_learning_rate} must not be negative"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.epsilon > 0):
            raise ValueError(
                f"AdamW needs beta1 {self.beta1} and beta2 {self.beta2} from 0 to below 1, and epsilon {self.epsilon} "
                "above 0"
            )
        if min(self.weight_decay, self.clip_norm, self.spike_deviations) < 0:
            raise ValueError(
                "weight_decay, clip_norm and spike_deviations must not be negative; 0 turns each of them off"
            )
        if self.spike_window < 1:
            raise ValueError("spike_window must be at least 1; to skip no spikes set spike_deviations to 0")
        for text in filter(None, (self.warmup, self.decay, self.ema_half_life)):
            parse(text)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How a gradient changes the parameters.

    Attributes:
      direction: from gradients to what the learning rate multiplies, before its minus sign.
      rate: learning rate of a step, which counts from 0.
      spike_window, spike_deviations: see `is_spike`.
      ema_half_life: [updates] see `averaged`; 0 where no average is kept.
    """

    direction: optax.GradientTransformation
    rate: optax.Schedule
    spike_window: int
    spike_deviations: float
    ema_half_life: int = 0


def make_optimizer(
    config: OptimizerConfig, model: ModelConfig, clock: Clock, ranks: Mapping[str, int] = NO_ADAPTERS
) -> Optimizer:
    """Clip by global norm, then AdamW (arXiv 1711.05101) with decoupled decay on matrices only.

    With `ranks`, those of LoRA adapters by matrix, it is the adapters' alone.
    """
    direction = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, decay_mask(model, ranks)),
    )
    half_life = max(clock.steps(config.ema_half_life), 1) if config.ema_half_life else 0
    return Optimizer(direction, schedule(config, clock), config.spike_window, config.spike_deviations, half_life)


def schedule(config: OptimizerConfig, clock: Clock) -> optax.Schedule:
    """Learning rate as a function of the step, which counts from 0, over `clock.run` steps in all.

    The rate of step `clock.run`, which the run does not take, would be the final one; that of its last is just above.

    Raises:
      UserError: warm-up and decay are longer than the run.
    """
    peak, final, warmup = config.learning_rate, config.final_learning_rate, clock.steps(config.warmup)
    fall = max(clock.steps(config.decay), 1) if config.schedule == "wsd" else 0
    if warmup + fall > clock.run:
        decay = f" and {fall} steps of decay ({config.decay!r})" if fall else ""
        raise UserError(
            f"a run of {clock.run} steps is too short for optimizer.warmup {config.warmup!r}, {warmup} steps{decay}: "
            "shorten them, for example to shares of the run such as '3%', or lengthen duration"
        )
    parts, starts = [optax.linear_schedule(0.0, peak, warmup)], [warmup]
    rest = max(clock.run - warmup, 1)
    if config.schedule == "cosine":
        parts.append(optax.cosine_decay_schedule(peak, rest, alpha=final / peak))
    elif config.schedule == "linear":
        parts.append(optax.linear_schedule(peak, final, rest))
    else:
        parts.append(optax.constant_schedule(peak))
    if config.schedule == "wsd":
        parts.append(optax.linear_schedule(peak, final, fall))
        starts.append(clock.run - fall)
    return optax.join_schedules(parts, starts)


def decay_mask(model: ModelConfig, ranks: Mapping[str, int] = NO_ADAPTERS) -> dict:
    """True for every matrix, False for every norm scale: each parameter is in exactly one of the two groups."""
    return jax.tree.map(
        lambda axes: any(axis not in (None, "layers") for axis in axes),
        trained(logical_axes(model, ranks)),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def is_spike(norm: jax.Array, recent_W: jax.Array, deviations: float) -> jax.Array:
    """Whether a norm lies more than `deviations` standard deviations above the mean of the last W, as OLMo's optimizer
    judges it.

    Nothing is a spike while fewer than W norms are known (the others are NaN), or if `deviations` is 0.
    """
    if not deviations:
        return jnp.bool_(False)
    return norm > jnp.mean(recent_W) + deviations * jnp.std(recent_W)


def averaged(average: dict, params: dict, updates: jax.Array, half_life: int) -> dict:
    """The exponential moving average of parameters after an update, itself included.

    Parameters weigh 2^(-age / half_life), their age in updates, and the weights add up to 1 from the first update on,
    as of Adam's means (arXiv 1412.6980): nothing is left of the start. In fp32 a parameter moves its average only where
    they differ by more than about 1e-7 * half_life of it.

    Args:
      average: of the parameters after all earlier updates, at least fp32; before the first update it does not matter.
      params: after this update.
      updates: their number, this one included.
      half_life: [updates].
    """
    share = jnp.expm1(-math.log(2) / half_life) / jnp.expm1(-math.log(2) / half_life * updates)
    return jax.tree.map(lambda old, new: old + share * (new - old), average, params)
