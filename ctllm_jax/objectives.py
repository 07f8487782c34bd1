"""What a run minimises: each objective turns a batch into sums, so that any split of the batch adds up to the same.

Legend: B sequences or pairs, L positions, S sources.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ctllm_jax.losses import dpo_loss, lm_loss, token_logprobs
from ctllm_jax.model import ModelConfig, forward

Batch = dict[str, jax.Array]
# (params, reference params or None, batch) -> (objective summed, sums of diagnostics)
Objective = Callable[[dict, dict | None, Batch], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Which loss, and its constants."""

    name: str  # "lm" (pretraining, and SFT on chat stores) or "dpo" (preference stores)
    z_loss: float
    dpo_beta: float

    def __post_init__(self):
        if self.name not in STORE_KINDS:
            raise ValueError(f"objective {self.name!r} is unknown; there are: {', '.join(STORE_KINDS)}")


STORE_KINDS = {"lm": ("pretrain", "chat"), "dpo": ("preference",)}


def make_objective(config: ObjectiveConfig, model: ModelConfig, num_sources: int) -> Objective:
    """The objective as a pure function. Its diagnostics always hold `count`, the global divisor of everything else."""

    def logits(params: dict, batch: Batch) -> jax.Array:
        return forward(model, params, batch["tokens"], batch["positions"], batch["segments"])[0]

    def lm(params: dict, _: dict | None, batch: Batch):
        loss, nll_B = lm_loss(logits(params, batch), batch["labels"], batch["weights"], config.z_loss)
        tokens_B = jnp.sum(batch["weights"], axis=-1)
        by_source_SB = (batch["source"][None, :] == jnp.arange(num_sources)[:, None]).astype(jnp.float32)
        sums = {
            "count": jnp.sum(tokens_B),
            "loss": jnp.sum(nll_B),
            "source_loss": by_source_SB @ nll_B,
            "source_tokens": by_source_SB @ tokens_B,
        }
        return loss, sums

    def sequence_logprobs(params: dict, batch: Batch) -> jax.Array:
        B, _, L = batch["tokens"].shape
        flat = {name: array.reshape(2 * B, L) for name, array in batch.items() if name != "source"}
        logprob, _ = token_logprobs(logits(params, flat), flat["labels"])
        return jnp.sum(logprob * flat["weights"], axis=-1).reshape(B, 2)

    def dpo(params: dict, reference: dict, batch: Batch):
        reference_B2 = jax.lax.stop_gradient(sequence_logprobs(reference, batch))
        # A pair whose answers carry no learned token (a padding row) must not count.
        valid_B = jnp.all(jnp.sum(batch["weights"], axis=-1) > 0, axis=-1)
        loss, sums = dpo_loss(sequence_logprobs(params, batch), reference_B2, valid_B, config.dpo_beta)
        sums["tokens"] = jnp.sum(batch["weights"])
        return loss, sums

    return {"lm": lm, "dpo": dpo}[config.name]
