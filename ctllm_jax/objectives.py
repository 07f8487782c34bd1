"""What a run minimises: each objective turns a batch into sums, so that any split of the batch adds up to the same.

Legend: B sequences or pairs, L positions, S sources.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.cross_entropy import FORMS, choose_form, label_logprobs
from ctllm_jax.hardware import chip_of, current_device
from ctllm_jax.losses import dpo_loss, lm_loss, token_logprobs
from ctllm_jax.model import ModelConfig, forward, head, hidden_states

Batch = dict[str, jax.Array]
BATCH_FIELDS = {  # [B, L] or [B, 2, L]; beside them "source", int32 [B]
    "tokens": np.int32,
    "positions": np.int32,
    "segments": np.int32,
    "labels": np.int32,
    "weights": np.float32,
}
# (params, reference params or None, batch) -> (objective summed, sums of diagnostics)
Objective = Callable[[dict, dict | None, Batch], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Which loss, and its constants."""

    name: str  # "lm" (pretraining, and SFT on chat stores) or "dpo" (preference stores)
    z_loss: float
    dpo_beta: float
    cross_entropy: str  # "dense", "chunked" (without the logits), or by memory: see cross_entropy.choose_form

    def __post_init__(self):
        if self.name not in STORE_KINDS:
            raise ValueError(f"objective {self.name!r} is unknown; there are: {', '.join(STORE_KINDS)}")
        if self.cross_entropy not in FORMS:
            raise ValueError(f"cross_entropy {self.cross_entropy!r} is unknown; there are: {', '.join(FORMS)}")


STORE_KINDS = {"lm": ("pretrain", "chat"), "dpo": ("preference",)}


def make_objective(config: ObjectiveConfig, model: ModelConfig, num_sources: int) -> Objective:
    """The objective as a pure function. Its diagnostics always hold `count`, the global divisor of everything else."""

    def logprobs(params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs = batch["tokens"], batch["positions"], batch["segments"]
        mesh_shape = jax.sharding.get_abstract_mesh().shape
        chip = chip_of(current_device())
        form = choose_form(config.cross_entropy, batch["tokens"].size, model.padded_vocab_size, mesh_shape, chip)
        if form == "dense":
            return token_logprobs(forward(model, params, *inputs)[0], batch["labels"])
        x_BLD = hidden_states(model, params, *inputs)
        return label_logprobs(x_BLD, head(model, params), batch["labels"], model.vocab_size)

    def lm(params: dict, _: dict | None, batch: Batch):
        loss, nll_B = lm_loss(*logprobs(params, batch), batch["weights"], config.z_loss)
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
        logprob, _ = logprobs(params, flat)
        return jnp.sum(logprob * flat["weights"], axis=-1).reshape(B, 2)

    def dpo(params: dict, reference: dict, batch: Batch):
        reference_B2 = jax.lax.stop_gradient(sequence_logprobs(reference, batch))
        # A pair whose answers carry no learned token (a padding row) must not count.
        valid_B = jnp.all(jnp.sum(batch["weights"], axis=-1) > 0, axis=-1)
        loss, sums = dpo_loss(sequence_logprobs(params, batch), reference_B2, valid_B, config.dpo_beta)
        sums["tokens"] = jnp.sum(batch["weights"])
        return loss, sums

    return {"lm": lm, "dpo": dpo}[config.name]
