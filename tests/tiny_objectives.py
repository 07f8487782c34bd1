"""Objectives with the values that most tests want."""

from ctllm_jax.objectives import ObjectiveConfig
from ctllm_jax.preference import PreferenceConfig

PREFERENCE = {
    "loss": "sigmoid",
    "beta": 0.5,
    "label_smoothing": 0.0,
    "divergence": "reverse_kl",
    "sft_weight": 0.0,
    "tail_weight": 1.0,
    "policy_weighted": False,
    "reference": "live",
}


def lm(z_loss: float = 0.0, cross_entropy: str = "auto", name: str = "lm", logit_metrics: bool = False):
    """An objective of sequences."""
    return ObjectiveConfig(name, z_loss, cross_entropy, logit_metrics, None)


def dpo(cross_entropy: str = "auto", logit_metrics: bool = False, **changes):
    """Sigmoid DPO with beta 0.5 and a live reference, but for the changes."""
    return ObjectiveConfig("dpo", 0.0, cross_entropy, logit_metrics, PreferenceConfig(**PREFERENCE | changes))
