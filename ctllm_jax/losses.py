"""Losses as pure functions. Sums over valid tokens, never means of means: the caller divides by the global count.

Those of preference pairs are in `ctllm_jax.preference`.

Legend: B sequences, L positions, V vocabulary.
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


def dft_loss(logprob_BL: jax.Array, weights_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Dynamic fine-tuning (arXiv 2508.05629): each token's cross-entropy times its probability, which is held fixed.

    Unlikely tokens then pull no harder than likely ones.

    Args:
      logprob_BL, weights_BL: as in `lm_loss`.

    Returns:
      (objective summed over counted labels; plain negative log-likelihood of each sequence, [B]).
    """
    probability_BL = jax.lax.stop_gradient(jnp.exp(logprob_BL))
    loss = -jnp.sum(probability_BL * logprob_BL * weights_BL)
    return loss, -jnp.sum(logprob_BL * weights_BL, axis=-1)


def logit_metrics(logits_BLV: jax.Array, labels_BL: jax.Array, vocab_size: int) -> dict[str, jax.Array]:
    """What the logits themselves say at each position, fp32 [B, L], without a gradient.

    Args:
      logits_BLV: minus infinity from `vocab_size` on.

    Returns:
      entropy: of the predicted distribution, in nats. token_accuracy: whether the label is the likeliest id.
      mean_logit: over the vocabulary.
    """
    logits_BLV = jax.lax.stop_gradient(logits_BLV).astype(jnp.float32)
    own_BLV = jnp.where(jnp.arange(logits_BLV.shape[-1]) < vocab_size, logits_BLV, 0)
    mean_BL = jnp.sum(jax.nn.softmax(logits_BLV) * own_BLV, axis=-1)
    return {
        "entropy": jax.nn.logsumexp(logits_BLV, axis=-1) - mean_BL,
        "token_accuracy": (jnp.argmax(logits_BLV, axis=-1) == labels_BL).astype(jnp.float32),
        "mean_logit": jnp.sum(own_BLV, axis=-1) / vocab_size,
    }
