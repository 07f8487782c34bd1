"""AdamW with a warm-up and a decay, as CT-LLM trained (Megatron defaults: betas 0.9 and 0.95, decay 0.1, clip 1.0)."""

import dataclasses

import jax
import optax

from ctllm_jax.model import ModelConfig, logical_axes

SCHEDULES = ("constant", "cosine", "wsd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; steps count optimizer updates."""

    learning_rate: float  # peak
    final_learning_rate: float
    schedule: str  # one of SCHEDULES
    warmup_steps: int
    decay_fraction: float  # wsd only: share of the steps, at the end, over which the rate falls linearly
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is unknown; there are: {', '.join(SCHEDULES)}")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the update number, over `steps` updates in all."""
    peak, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    rise = optax.linear_schedule(0.0, peak, warmup)
    rest = max(steps - warmup, 1)
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
    if config.schedule == "cosine":
        return optax.join_schedules([rise, optax.cosine_decay_schedule(peak, rest, alpha=final / peak)], [warmup])
    decay = max(int(steps * config.decay_fraction), 1)
    fall = optax.linear_schedule(peak, final, decay)
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, steps - decay])


def decay_mask(model: ModelConfig) -> dict:
    """True for every matrix, False for every norm scale: each parameter is in exactly one of the two groups."""
    return jax.tree.map(
        lambda axes: any(axis not in (None, "layers") for axis in axes),
        logical_axes(model),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def make_optimizer(config: OptimizerConfig, model: ModelConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decoupled decay on matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask(model),
        ),
    )
