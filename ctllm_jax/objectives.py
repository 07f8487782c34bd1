"""What a run minimises: each objective turns a batch into sums, so that any split of the batch adds up to the same.

Legend: B sequences or pairs (2B: the sequences of pairs), L positions, S sources, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax import losses
from ctllm_jax.cross_entropy import FORMS, choose_form, label_logprobs
from ctllm_jax.hardware import chip_of, current_device
from ctllm_jax.model import ModelConfig, forward, head, hidden_states
from ctllm_jax.preference import Pairs, PreferenceConfig, preference_loss

Batch = dict[str, jax.Array]
BATCH_FIELDS = {  # [B, L], or [B, 2, L] for pairs
    "tokens": np.int32,
    "positions": np.int32,
    "segments": np.int32,
    "labels": np.int32,
    "weights": np.float32,
}
# Beside them "source", int32 [B]; and of pairs "reference", float32 [B, 2]: the answers' log-probabilities under the
# reference where they were computed beforehand, else 0.

# (params, reference params or None, batch) -> (objective summed, sums of diagnostics)
Objective = Callable[[dict, dict | None, Batch], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Which loss, and its constants."""

    name: str  # one of OBJECTIVES: "lm" (pretraining, SFT on chat stores), "dft" (SFT), "dpo" (preference stores)
    z_loss: float  # [1] weight of the square of the log-partition; for "lm", else 0
    cross_entropy: str  # "dense", "chunked" (without the logits), or by memory: see cross_entropy.choose_form
    logit_metrics: bool  # log entropy, token accuracy and mean logit as well; takes the dense form
    preference: PreferenceConfig | None  # for "dpo", else None

    def __post_init__(self):
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective {self.name!r} is unknown; there are: {', '.join(OBJECTIVES)}")
        if self.cross_entropy not in FORMS:
            raise ValueError(f"cross_entropy {self.cross_entropy!r} is unknown; there are: {', '.join(FORMS)}")
        if (self.name == "dpo") != (self.preference is not None):
            raise ValueError(f"objective {self.name!r}: the group preference is for objective 'dpo', which needs it")
        if self.z_loss and self.name != "lm":
            raise ValueError(f"objective {self.name!r} has no z_loss; leave it at 0")
        if self.needs_logits and self.cross_entropy == "chunked":
            raise ValueError("logit_metrics and policy_weighted need logits; cross_entropy 'chunked' never has them")

    @property
    def form(self) -> str:
        """The cross-entropy's form as `choose_form` is asked for it."""
        return "dense" if self.needs_logits else self.cross_entropy

    @property
    def needs_logits(self) -> bool:
        """Whether something besides the labels' log-probabilities is read from the logits."""
        return self.logit_metrics or (self.preference is not None and self.preference.policy_weighted)

    @property
    def reference(self) -> str:
        """Where the reference's log-probabilities come from, one of preference.REFERENCES."""
        return self.preference.reference if self.preference else "none"


def make_objective(config: ObjectiveConfig, model: ModelConfig, num_sources: int) -> Objective:
    """The objective as a pure function. Its diagnostics always hold `count`, the global divisor of everything else."""
    return OBJECTIVES[config.name](config, model, num_sources)


def whole_step(batch: Batch) -> Batch:
    """What an objective must know of all rows of a step, added before the step is split; nothing for plain sequences.

    Pairs get "token_share" [B, 2], equal in all rows: the step's pairs by its answer tokens, of either side. Sums over
    tokens times it are, divided by the pairs, means over the tokens of the step.
    """
    if "reference" not in batch:  # only pairs have it
        return batch
    tokens_2 = jnp.sum(batch["weights"], axis=(0, 2))
    share_2 = jnp.sum(_valid_pairs(batch)) / jnp.maximum(tokens_2, 1.0)
    return {**batch, "token_share": jnp.broadcast_to(share_2, (len(batch["tokens"]), 2))}


# ---- The model's part


class TokenScores(NamedTuple):
    """What the model says of each label; the logits only in the dense form."""

    logprob_BL: jax.Array
    lse_BL: jax.Array
    logits_BLV: jax.Array | None


def _score(config: ObjectiveConfig, model: ModelConfig, params: dict, batch: Batch) -> TokenScores:
    inputs = batch["tokens"], batch["positions"], batch["segments"]
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    chip = chip_of(current_device())
    form = choose_form(config.form, batch["tokens"].size, model.padded_vocab_size, mesh_shape, chip)
    if form == "dense":
        logits_BLV = forward(model, params, *inputs)[0]
        return TokenScores(*losses.token_logprobs(logits_BLV, batch["labels"]), logits_BLV)
    x_BLD = hidden_states(model, params, *inputs)
    return TokenScores(*label_logprobs(x_BLD, head(model, params), batch["labels"], model.vocab_size), None)


# ---- Sequences


def _lm(config: ObjectiveConfig, model: ModelConfig, num_sources: int) -> Objective:
    """Next-token cross-entropy, plain or as dynamic fine-tuning has it; counts tokens."""

    def lm(params: dict, _: dict | None, batch: Batch):
        scores = _score(config, model, params, batch)
        if config.name == "dft":
            loss, nll_B = losses.dft_loss(scores.logprob_BL, batch["weights"])
        else:
            loss, nll_B = losses.lm_loss(scores.logprob_BL, scores.lse_BL, batch["weights"], config.z_loss)
        tokens_B = jnp.sum(batch["weights"], axis=-1)
        by_source_SB = (batch["source"][None, :] == jnp.arange(num_sources)[:, None]).astype(jnp.float32)
        sums = {
            "count": jnp.sum(tokens_B),
            "loss": jnp.sum(nll_B),
            "source_loss": by_source_SB @ nll_B,
            "source_tokens": by_source_SB @ tokens_B,
        }
        if config.name == "dft":
            sums["dft_loss"] = loss
        if config.logit_metrics:
            found = losses.logit_metrics(scores.logits_BLV, batch["labels"], model.vocab_size)
            sums |= {name: jnp.sum(values_BL * batch["weights"]) for name, values_BL in found.items()}
        return loss, sums

    return lm


# ---- Pairs


def _dpo(config: ObjectiveConfig, model: ModelConfig, num_sources: int) -> Objective:
    """The preference loss of `config.preference`; counts pairs."""
    del num_sources

    def dpo(params: dict, reference: dict | None, batch: Batch):
        batch = batch if "token_share" in batch else whole_step(batch)
        scores = _score(config, model, params, _flat(batch))
        policy_B2, rest_B2 = _answer_sums(config, scores.logprob_BL, batch)
        if config.reference == "live":
            theirs = _answer_sums(config, _score(config, model, reference, _flat(batch)).logprob_BL, batch)
            reference_B2, reference_rest_B2 = jax.lax.stop_gradient(theirs)
            ratios_B2 = (policy_B2 - reference_B2) + (rest_B2 - reference_rest_B2)
            reference_B2 += reference_rest_B2
        else:
            reference_B2 = batch["reference"]
            ratios_B2 = policy_B2 + rest_B2 - reference_B2
        pairs = Pairs(
            policy_P2=policy_B2 + rest_B2,
            reference_P2=reference_B2,
            ratios_P2=ratios_B2,
            tokens_P2=jnp.sum(batch["weights"], axis=-1),
            valid_P=_valid_pairs(batch),
            token_share_P=batch["token_share"][:, 0],
            weight_P=_policy_weights(scores, batch) if config.preference.policy_weighted else None,
        )
        loss, sums = preference_loss(pairs, config.preference)
        if config.logit_metrics:
            sums |= _answer_metrics(scores.logits_BLV, batch, model.vocab_size)
        return loss, sums

    return dpo


def answer_logprobs(config: ObjectiveConfig, model: ModelConfig, params: dict, batch: Batch) -> jax.Array:
    """Log-probability of either answer of each pair, summed over its tokens, [B, 2]."""
    sums_B2, rest_B2 = _answer_sums(config, _score(config, model, params, _flat(batch)).logprob_BL, batch)
    return sums_B2 + rest_B2


def _flat(batch: Batch) -> Batch:
    """A batch of pairs as one of sequences, chosen and rejected by turns."""
    return {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in BATCH_FIELDS}


def _valid_pairs(batch: Batch) -> jax.Array:
    """Which pairs count, bool [B]: not those whose answers carry no learned token (padding rows)."""
    return jnp.all(jnp.sum(batch["weights"], axis=-1) > 0, axis=-1)


def _answer_sums(config: ObjectiveConfig, logprob_2BL: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums over the answers' tokens [B, 2]; tokens beyond the shorter answer's length count `tail_weight` each.

    In two parts, for a loss is of small differences between them: sums of multiples of 2^-10, exact in fp32 up to
    16,384 nats in whatever order a mesh adds them up, and of what is left of each token, which is little.
    """
    weights_B2L = batch["weights"]
    if config.preference.tail_weight != 1:  # LD-DPO, arXiv 2409.06411
        shared_B = jnp.min(jnp.sum(weights_B2L, axis=-1), axis=-1)
        beyond_B2L = jnp.cumsum(weights_B2L, axis=-1) > shared_B[:, None, None]
        weights_B2L = weights_B2L * jnp.where(beyond_B2L, config.preference.tail_weight, 1.0)
    weighted_B2L = logprob_2BL.reshape(weights_B2L.shape) * weights_B2L
    coarse_B2L = jax.lax.stop_gradient(jnp.round(weighted_B2L * 1024) / 1024)
    return jnp.sum(coarse_B2L, axis=-1), jnp.sum(weighted_B2L - coarse_B2L, axis=-1)


def _policy_weights(scores: TokenScores, batch: Batch) -> jax.Array:
    """WPO's weights of pairs [B], at most 1 (arXiv 2406.11827, eq. 2): the answers' probabilities, as geometric means
    over tokens, each against the probability that two draws of the policy agree there."""
    agree_BL = jax.nn.logsumexp(2 * scores.logits_BLV, axis=-1) - 2 * scores.lse_BL
    relative_B2L = (scores.logprob_BL - agree_BL).reshape(batch["weights"].shape)
    tokens_B2 = jnp.maximum(jnp.sum(batch["weights"], axis=-1), 1.0)
    mean_B2 = jnp.sum(relative_B2L * batch["weights"], axis=-1) / tokens_B2
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.sum(mean_B2, axis=-1)), 1.0))


def _answer_metrics(logits_2BLV: jax.Array, batch: Batch, vocab_size: int) -> dict[str, jax.Array]:
    """`losses.logit_metrics` by side, summed so that divided by the pairs they are means over the step's tokens."""
    weights_B2L = batch["weights"] * batch["token_share"][..., None]
    sums = {}
    for name, values_2BL in losses.logit_metrics(logits_2BLV, _flat(batch)["labels"], vocab_size).items():
        sums_2 = jnp.sum(values_2BL.reshape(weights_B2L.shape) * weights_B2L, axis=(0, 2))
        sums |= {f"{name}_chosen": sums_2[0], f"{name}_rejected": sums_2[1]}
    return sums


OBJECTIVES = {"lm": _lm, "dft": _lm, "dpo": _dpo}
STORE_KINDS = {"lm": ("pretrain", "chat"), "dft": ("chat",), "dpo": ("preference",)}
