"""How the next token is chosen: the options of the field, for each row of a batch its own.

They are applied in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.

Legend: B rows of a batch, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, and where a text ends."""

    max_tokens: int  # [tokens] most new tokens of a sample
    temperature: float  # [1] 0 takes the most probable token
    top_k: int  # [tokens] only the k most probable tokens; 0 is all
    top_p: float  # [probability] only the most probable tokens that together reach this probability; 1 is all
    seed: int  # [1] of the random numbers
    min_p: float = 0.0  # [share] only tokens at least this times as probable as the most probable one; 0 is all
    repetition_penalty: float = 1.0  # [times] logits of earlier tokens are divided by it, or times it below 0
    stop: tuple[str, ...] = ()  # the text ends before the first of these

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens} is below 1")
        if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
        if not 0 <= self.min_p <= 1 or not 0 < self.repetition_penalty < float("inf"):
            raise ValueError("sampling needs 0 <= min_p <= 1 and repetition_penalty > 0")
        if not all(self.stop):
            raise ValueError("a stop string is empty")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
    """What `choose` reads of each row's `SamplingConfig`."""

    temperature_B: np.ndarray
    top_k_B: np.ndarray
    top_p_B: np.ndarray
    min_p_B: np.ndarray
    penalty_B: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[SamplingConfig | None]) -> "Options":
        """The options of rows; None, a row whose choice nobody reads, takes the most probable token."""

        def column(name: str, idle: float, dtype: type) -> np.ndarray:
            return np.array([getattr(row, name) if row else idle for row in rows], dtype)

        return cls(
            column("temperature", 0, np.float32),
            column("top_k", 0, np.int32),
            column("top_p", 1, np.float32),
            column("min_p", 0, np.float32),
            column("repetition_penalty", 1, np.float32),
        )


def choose(logits_BV: jax.Array, seen_BV: jax.Array, options: Options, keys_B: jax.Array) -> jax.Array:
    """The next token of each row.

    Args:
      logits_BV: fp32; ids that may not be chosen are at minus infinity.
      seen_BV: which tokens the penalty is for: those of the prompt and of the answer so far.
      options: of each row.
      keys_B: random keys, one for each row and token.

    Returns:
      token_B, int32.
    """
    penalty_B1 = options.penalty_B[:, None]
    punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(seen_BV, punished_BV, logits_BV)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        heat_B1 = jnp.where(options.temperature_B > 0, options.temperature_B, 1.0)[:, None]
        likely_BV = keep_likely(logits_BV / heat_B1, options.top_k_B, options.top_p_B, options.min_p_B)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, likely_BV).astype(jnp.int32)
        return jnp.where(options.temperature_B > 0, drawn_B, greedy_B)

    # Sorting the vocabulary takes longer than the rest; rows that are all greedy do without.
    return jax.lax.cond(jnp.any(options.temperature_B > 0), draw, lambda: greedy_B)


def keep_likely(logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array) -> jax.Array:
    """Sets to -inf all but the `top_k` largest logits (0: all), of those all but the fewest that reach probability
    `top_p`, and all that are less probable than `min_p` times the most probable."""
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    count_B1 = jnp.where(top_k_B > 0, top_k_B, logits_BV.shape[-1])[:, None]
    sorted_BV = jnp.where(jnp.arange(sorted_BV.shape[-1]) < count_B1, sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = (before_BV < top_p_B[:, None]) & (sorted_BV > -jnp.inf)
    kept_BV &= sorted_BV >= sorted_BV[:, :1] + jnp.log(min_p_B)[:, None]
    threshold_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
