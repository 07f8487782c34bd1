"""Losses as pure functions. Sums over valid tokens, never means of means: the caller divides by the global count.

Legend: B sequences, L positions, V vocabulary, P preference pairs.
"""

import jax
import jax.numpy as jnp

from ctllm_jax.precision import wide


def token_logprobs(logits_BLV: jax.Array, labels_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each label, log-sum-exp of each position), both fp32 [B, L]."""
    logits_BLV = logits_BLV.astype(wide(logits_BLV.dtype))
    lse_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    label_BL = jnp.take_along_axis(logits_BLV, labels_BL[..., None], axis=-1)[..., 0]
    return label_BL - lse_BL, lse_BL


def lm_loss(
    logprob_BL: jax.Array, lse_BL: jax.Array, weights_BL: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """Next-token cross-entropy in nats.

    Args:
      logprob_BL, lse_BL: as `token_logprobs` gives them, or `cross_entropy.label_logprobs` without the logits.
      weights_BL: 1 where a label counts, else 0.
      z_loss: weight of the squared log-sum-exp (PaLM, arXiv 2204.02311), which keeps logits from drifting.

    Returns:
      (objective summed over counted labels, z-loss included; plain negative log-likelihood of each sequence, [B]).
    """
    nll_B = -jnp.sum(logprob_BL * weights_BL, axis=-1)
    return jnp.sum(nll_B) + z_loss * jnp.sum(weights_BL * lse_BL**2), nll_B


def dpo_loss(
    policy_P2: jax.Array, reference_P2: jax.Array, valid_P: jax.Array, beta: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Direct preference optimisation, sigmoid loss (arXiv 2305.18290, eq. 7): -log s(beta ((pi-ref)_w - (pi-ref)_l)).

    Args:
      policy_P2: summed log-probabilities of (chosen, rejected) completions under the policy.
      reference_P2: the same under the reference.
      valid_P: which pairs count.
      beta: strength of the pull towards the reference.

    Returns:
      (loss summed over pairs, sums over pairs: `count` and the diagnostics).
    """
    rewards_P2 = beta * (policy_P2 - reference_P2)
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    count_P = valid_P.astype(jnp.float32)
    loss = jnp.sum(-jax.nn.log_sigmoid(margin_P) * count_P)
    return loss, {
        "count": jnp.sum(count_P),
        "loss": loss,
        "reward_chosen": jnp.sum(rewards_P2[:, 0] * count_P),
        "reward_rejected": jnp.sum(rewards_P2[:, 1] * count_P),
        "margin": jnp.sum(margin_P * count_P),
        "accuracy": jnp.sum((margin_P > 0) * count_P),
    }
