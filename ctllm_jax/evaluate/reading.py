"""How a model reads a text: what each token cost it, and what it had expected there instead.

Legend: B rows (one), L length, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.common import html
from ctllm_jax.common.errors import UserError
from ctllm_jax.generate import decodable
from ctllm_jax.loading import LoadedModel, check_ids
from ctllm_jax.model import ModelConfig, forward

_DARKEST = 12.0  # nats of a token that is drawn darkest; guessing among 4,096 costs 8.3


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a text as a model read it.

    Attributes:
      text: the token; a byte that is part of a character as <0xE6>.
      nats: its negative log-probability after all that comes before it.
      guesses: the likeliest tokens in its place with their probabilities, the likeliest first.
    """

    text: str
    nats: float
    guesses: tuple[tuple[str, float], ...]


def read(model: LoadedModel, text: str, guesses: int = 3) -> list[Token]:
    """Reads a text as the beginning of a document.

    Args:
      model: whose probabilities; its context is the longest text.
      text: what is read.
      guesses: how many likely tokens are told at each place.

    Raises:
      UserError: the text is empty, too long, or of another vocabulary.
    """
    tokenizer = model.tokenizer
    ids, most = [tokenizer.opening_id, *tokenizer.encode(text)], model.config.max_length
    if not 2 <= len(ids) <= most + 1:
        raise UserError(f"the text has {len(ids) - 1} tokens; there must be 1 to {most} ({model.name})")
    check_ids(model, [ids])
    with model.in_use():
        logprobs_LV = np.asarray(_logprobs(decodable(model.config, tokenizer), model.params, jnp.array([ids[:-1]])))
    names = [name for _, name in tokenizer.pieces()]
    likely_LG = np.argsort(-logprobs_LV, axis=-1, kind="stable")[:, :guesses]
    return [
        Token(
            names[token],
            -float(logprobs_V[token]),
            tuple((names[guess], float(np.exp(logprobs_V[guess]))) for guess in likely_G),
        )
        for token, logprobs_V, likely_G in zip(ids[1:], logprobs_LV, likely_LG, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(config: ModelConfig, params: dict, tokens_BL: jax.Array) -> jax.Array:
    """Log-probabilities [L, V] in fp32 of what may follow each token of the only row."""
    positions_BL = jnp.arange(tokens_BL.shape[1])[None]
    logits_BLV, _ = forward(config, params, tokens_BL, positions_BL, jnp.ones_like(tokens_BL))
    return jax.nn.log_softmax(logits_BLV[0], axis=-1)


def drawn(tokens: Sequence[Token]) -> str:
    """The text as HTML, the darker the more a token surprised; resting the pointer on one shows what was expected."""
    return html.shaded(
        [
            (
                token.text,
                token.nats / _DARKEST,
                f"{token.nats:.2f} nats; expected: "
                + ", ".join(f"{guess} {probability:.0%}" for guess, probability in token.guesses),
            )
            for token in tokens
        ]
    )
