"""Preference losses: what a pair of answers, one better than the other, costs a policy.

Each is a function of how much likelier the policy makes either answer than the reference does. With w and l the log
ratios log pi(y|x) - log ref(y|x) of the chosen and the rejected answer (sums over their tokens), h = w - l, b = beta,
e = label_smoothing and s the logistic function, the formulas stand beside the functions.

Legend: P pairs, 2 (chosen, rejected) answers.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

REFERENCES = ("cached", "live", "none")
_DISCOPOP_TEMPERATURE = 0.05  # arXiv 2406.08414


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """A preference loss and its constants. What a loss would not read must be left at its neutral value."""

    loss: str  # one of LOSSES
    beta: float  # [1] strength of the pull towards the reference
    label_smoothing: float  # [share] pairs that are taken to be the wrong way round; for SMOOTHED losses, else 0
    divergence: str  # from the reference, one of DIVERGENCES
    sft_weight: float  # [1] of the chosen answers' mean negative log-likelihood per token, added to the loss; or 0
    tail_weight: float  # [1] of an answer's tokens beyond the length of the shorter answer (LD-DPO); 1 is plain
    policy_weighted: bool  # weigh pairs by how likely the policy makes them (WPO, arXiv 2406.11827, eq. 2)
    reference: str  # "cached" (computed once and kept with the run), "live" (with every step) or "none" (0)

    def __post_init__(self):
        for what, value, known in (
            ("loss", self.loss, LOSSES),
            ("divergence", self.divergence, DIVERGENCES),
            ("reference", self.reference, REFERENCES),
        ):
            if value not in known:
                raise ValueError(f"preference {what} {value!r} is unknown; there are: {', '.join(known)}")
        if self.beta <= 0:
            raise ValueError(f"beta {self.beta} must be positive")
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ValueError(f"loss {self.loss!r} has no label smoothing; it is for: {', '.join(SMOOTHED)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing {self.label_smoothing} must be at least 0 and less than 0.5")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss 'exo_pair' needs label_smoothing above 0 (it takes its logarithm)")
        if self.divergence != "reverse_kl" and self.loss in ("aot", "sft"):
            raise ValueError(f"loss {self.loss!r} does not read log ratios; leave divergence at 'reverse_kl'")
        if self.policy_weighted and self.whole_step:
            raise ValueError(
                f"loss {self.loss!r} sorts the pairs of a step, so none of its terms is a pair's own; policy_weighted, "
                "which weighs such terms, is not for it"
            )
        if not 0 <= self.tail_weight <= 1:
            raise ValueError(f"tail_weight {self.tail_weight} must lie between 0 and 1")
        if self.sft_weight < 0:
            raise ValueError(f"sft_weight {self.sft_weight} must not be negative")

    @property
    def whole_step(self) -> bool:
        """Whether the loss compares the pairs of a step, so that the step cannot be gone through in parts."""
        return self.loss in ("aot", "aot_unpaired")


class Pairs(NamedTuple):
    """What the losses read.

    Attributes:
      policy_P2, reference_P2: log-probabilities of the answers, summed over their tokens.
      tokens_P2: tokens of the answers.
      valid_P: which pairs count.
      token_share_P: valid pairs per chosen token, of the whole step: makes a mean over pairs one over tokens.
      weight_P: of each pair's loss; None for 1.
      ratios_P2: policy_P2 less reference_P2, where it is known more closely than they are.
    """

    policy_P2: jax.Array
    reference_P2: jax.Array
    tokens_P2: jax.Array
    valid_P: jax.Array
    token_share_P: jax.Array
    weight_P: jax.Array | None
    ratios_P2: jax.Array | None = None


def preference_loss(pairs: Pairs, config: PreferenceConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and its diagnostics.

    Rewards are beta times the log ratios; accuracy is the share of pairs whose chosen answer has the higher one. `kl`
    is the mean over answers of log ref(y|x) - log pi(y|x), in nats an answer. Where the reference wrote the answers it
    is an unbiased estimate of KL(ref || pi); of answers that q wrote, of KL(q || pi) - KL(q || ref), which may be
    negative.

    Returns:
      (loss summed over pairs, sums over pairs: `count` and the diagnostics).
    """
    ratios_P2 = pairs.policy_P2 - pairs.reference_P2 if pairs.ratios_P2 is None else pairs.ratios_P2
    scores_P2 = DIVERGENCES[config.divergence](ratios_P2)
    loss_P = LOSSES[config.loss](scores_P2, pairs, config)
    if pairs.weight_P is not None:
        loss_P *= pairs.weight_P
    if config.sft_weight:
        loss_P += config.sft_weight * sft(scores_P2, pairs, config)
    count_P = pairs.valid_P.astype(jnp.float32)
    rewards_P2 = config.beta * ratios_P2
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    loss = jnp.sum(loss_P * count_P)
    sums = {
        "count": jnp.sum(count_P),
        "loss": loss,
        "margin": jnp.sum(margin_P * count_P),
        "accuracy": jnp.sum((margin_P > 0) * count_P),
        "kl": -jnp.sum(jnp.mean(ratios_P2, axis=1) * count_P),
    }
    for side, name in enumerate(("chosen", "rejected")):
        sums[f"reward_{name}"] = jnp.sum(rewards_P2[:, side] * count_P)
        sums[f"logprob_{name}"] = jnp.sum(pairs.policy_P2[:, side] * count_P)
        sums[f"tokens_{name}"] = jnp.sum(pairs.tokens_P2[:, side] * count_P)
    return loss, sums


# ---- Losses: (scores_P2, which are w and l under the divergence; pairs; config) -> loss_P


def dpo(scores_P2, pairs, config):
    """-(1 - e) log s(b h) - e log s(-b h): DPO (arXiv 2305.18290, eq. 7); with e > 0, conservative DPO."""
    return _smoothed(config.beta * _margin(scores_P2), config.label_smoothing)


def robust(scores_P2, pairs, config):
    """(-(1 - e) log s(b h) + e log s(-b h)) / (1 - 2e): unbiased under labels flipped at rate e (arXiv 2403.00409)."""
    x_P, e = config.beta * _margin(scores_P2), config.label_smoothing
    return (-(1 - e) * log_sigmoid(x_P) + e * log_sigmoid(-x_P)) / (1 - 2 * e)


def hinge(scores_P2, pairs, config):
    """max(0, 1 - b h): SLiC (arXiv 2305.10425)."""
    return jax.nn.relu(1 - config.beta * _margin(scores_P2))


def ipo(scores_P2, pairs, config):
    """(w/|y_w| - l/|y_l| - 1/(2b))^2: IPO (arXiv 2310.12036, eq. 17) per token, as TRL has it after its authors."""
    return (_margin(_per_token(scores_P2, pairs)) - 1 / (2 * config.beta)) ** 2


def ipo_sum(scores_P2, pairs, config):
    """(h - 1/(2b))^2: IPO on whole answers, as the paper and the original DPO code have it."""
    return (_margin(scores_P2) - 1 / (2 * config.beta)) ** 2


def sigmoid_norm(scores_P2, pairs, config):
    """-log s(b (w/|y_w| - l/|y_l|)): DPO per token, as Tulu 3 has it (arXiv 2411.15124)."""
    return -log_sigmoid(config.beta * _margin(_per_token(scores_P2, pairs)))


def apo_zero(scores_P2, pairs, config):
    """1 - s(b w) + s(b l): chosen answers up, rejected ones down (arXiv 2408.06266)."""
    return 1 - sigmoid(config.beta * scores_P2[:, 0]) + sigmoid(config.beta * scores_P2[:, 1])


def apo_down(scores_P2, pairs, config):
    """s(b w) + 1 - s(b h): both down, rejected ones further; for policies better than their data (arXiv 2408.06266)."""
    return sigmoid(config.beta * scores_P2[:, 0]) + 1 - sigmoid(config.beta * _margin(scores_P2))


def bco_pair(scores_P2, pairs, config):
    """-log s(b w) - log s(-b l): a classifier of single answers, without its moving offset (arXiv 2404.04656)."""
    return -log_sigmoid(config.beta * scores_P2[:, 0]) - log_sigmoid(-config.beta * scores_P2[:, 1])


def nca_pair(scores_P2, pairs, config):
    """-log s(b w) - (log s(-b w) + log s(-b l)) / 2: noise contrast, keeps the chosen up (arXiv 2402.05369)."""
    w_P, l_P = config.beta * scores_P2[:, 0], config.beta * scores_P2[:, 1]
    return -log_sigmoid(w_P) - 0.5 * log_sigmoid(-w_P) - 0.5 * log_sigmoid(-l_P)


def exo_pair(scores_P2, pairs, config):
    """q log(q / (1 - e)) + (1 - q) log((1 - q) / e), q = s(b h): EXO (arXiv 2402.00856, eq. 16)."""
    x_P, e = config.beta * _margin(scores_P2), config.label_smoothing
    keep_P = sigmoid(x_P) * (log_sigmoid(x_P) - jnp.log1p(-e))
    return keep_P + sigmoid(-x_P) * (log_sigmoid(-x_P) - jnp.log(e))


def sppo_hard(scores_P2, pairs, config):
    """(w - 1/(2b))^2 + (l + 1/(2b))^2: self-play with certain labels (arXiv 2405.00675)."""
    return (scores_P2[:, 0] - 0.5 / config.beta) ** 2 + (scores_P2[:, 1] + 0.5 / config.beta) ** 2


def discopop(scores_P2, pairs, config):
    """(1 - m) (-log s(b h)) + m exp(-b h), m = s(b h / 0.05): found by search (arXiv 2406.08414, eq. 5)."""
    x_P = config.beta * _margin(scores_P2)
    mix_P = sigmoid(x_P / _DISCOPOP_TEMPERATURE)
    return -(1 - mix_P) * log_sigmoid(x_P) + mix_P * jnp.exp(-x_P)


def aot(scores_P2, pairs, config):
    """DPO of sorted margins: the policy's n-th smallest over the step against the reference's (arXiv 2406.05882)."""
    policy_P, reference_P = _margin(pairs.policy_P2), _margin(pairs.reference_P2)
    delta_P = _ranked(policy_P, pairs.valid_P) - _ranked(reference_P, pairs.valid_P)
    return _smoothed(config.beta * delta_P, config.label_smoothing)


def aot_unpaired(scores_P2, pairs, config):
    """DPO of sorted log ratios: the n-th smallest w of the step against the n-th smallest l (arXiv 2406.05882)."""
    delta_P = _ranked(scores_P2[:, 0], pairs.valid_P) - _ranked(scores_P2[:, 1], pairs.valid_P)
    return _smoothed(config.beta * delta_P, config.label_smoothing)


def sft(scores_P2, pairs, config):
    """-log pi(y_w|x), as a mean over the chosen tokens of the step: fine-tuning on the chosen answers."""
    return -pairs.policy_P2[:, 0] * pairs.token_share_P


LOSSES: dict[str, Callable[[jax.Array, Pairs, PreferenceConfig], jax.Array]] = {
    "sigmoid": dpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "sigmoid_norm": sigmoid_norm,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "bco_pair": bco_pair,
    "nca_pair": nca_pair,
    "exo_pair": exo_pair,
    "sppo_hard": sppo_hard,
    "discopop": discopop,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "sft": sft,
}
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")

# f'(ratio) of an f-divergence less its constant, as a function of the log ratio (arXiv 2309.16240, table 1).
DIVERGENCES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "reverse_kl": lambda ratios: ratios,  # f = u log u: plain DPO
    "forward_kl": lambda ratios: -jnp.exp(-ratios),  # f = -log u
    "js": log_sigmoid,  # f = u log u - (u + 1) log((u + 1) / 2)
}


def _margin(scores_P2: jax.Array) -> jax.Array:
    return scores_P2[:, 0] - scores_P2[:, 1]


def _smoothed(x_P: jax.Array, e: float) -> jax.Array:
    return -(1 - e) * log_sigmoid(x_P) - e * log_sigmoid(-x_P) if e else -log_sigmoid(x_P)


def _per_token(scores_P2: jax.Array, pairs: Pairs) -> jax.Array:
    return scores_P2 / jnp.maximum(pairs.tokens_P2, 1.0)


def _ranked(values_P: jax.Array, valid_P: jax.Array) -> jax.Array:
    """The valid values in ascending order, at the places of the valid pairs; anything finite elsewhere."""
    ordered_P = jnp.sort(jnp.where(valid_P, values_P, jnp.finfo(values_P.dtype).max))
    return ordered_P[jnp.maximum(jnp.cumsum(valid_P) - 1, 0)]
