"""Sampling options, each held to a few lines of numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.sampling import Options, SamplingConfig, choose

V, DRAWS = 40, 4_000
PLAIN = SamplingConfig(max_tokens=1, temperature=1.0, top_k=0, top_p=1.0, seed=0)
LOGITS_V = (np.random.default_rng(0).normal(size=V) * 2).astype(np.float32)
SEEN_V = np.arange(V) % 3 == np.argmax(LOGITS_V) % 3  # the most probable one is punished
CHOOSE = jax.jit(choose)


def expected(config: SamplingConfig) -> np.ndarray:
    """Probabilities [V] of the next token."""
    logits = LOGITS_V.astype(np.float64)
    if config.repetition_penalty != 1:
        factor = np.where(logits > 0, 1 / config.repetition_penalty, config.repetition_penalty)
        logits = np.where(SEEN_V, logits * factor, logits)
    if config.temperature == 0:
        return np.eye(V)[np.argmax(logits)]
    weights = np.exp(logits / config.temperature)
    order = np.argsort(-weights)
    if config.top_k:
        weights[order[config.top_k :]] = 0
    weights /= weights.sum()
    reached = np.cumsum(weights[order])
    weights[order[1:][reached[:-1] >= config.top_p]] = 0
    weights[weights < config.min_p * weights.max()] = 0
    return weights / weights.sum()


def drawn(rows: list[SamplingConfig], seed: int = 0) -> np.ndarray:
    """[DRAWS, rows] tokens."""
    B = len(rows)
    keys = jax.random.split(jax.random.key(seed), (DRAWS, B))
    many = jax.vmap(CHOOSE, in_axes=(None, None, None, 0))
    return np.asarray(many(jnp.tile(LOGITS_V, (B, 1)), jnp.tile(SEEN_V, (B, 1)), Options.of(rows), keys))


CASES = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.4},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 3.0},
    {"repetition_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 3.0},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.03, "repetition_penalty": 1.3},
    {"top_k": 6, "top_p": 0.5},
    {"top_p": 0.9, "min_p": 0.2},
]


def test_each_option_gives_numpys_probabilities():
    """All rows in one batch: each has options of its own."""
    rows = [dataclasses.replace(PLAIN, **case) for case in CASES]
    for case, row, tokens in zip(CASES, rows, drawn(rows).T, strict=True):
        wanted, count = expected(row), np.bincount(tokens, minlength=V)
        assert not count[wanted == 0].any(), case
        deviation = np.sqrt(wanted * (1 - wanted) / DRAWS)
        assert np.all(np.abs(count / DRAWS - wanted) <= 4.5 * deviation), case


def test_a_row_is_the_same_in_any_company():
    sampled = dataclasses.replace(PLAIN, temperature=1.5, top_p=0.9)
    keys = jax.random.split(jax.random.key(3), 4)

    def tokens(rows):
        B = len(rows)
        arrays = jnp.tile(LOGITS_V, (B, 1)), jnp.tile(SEEN_V, (B, 1))
        return np.asarray(CHOOSE(*arrays, Options.of(rows), keys[:B])).tolist()

    together = tokens([sampled, dataclasses.replace(PLAIN, temperature=0.0), sampled, None])
    assert tokens([sampled]) == together[:1]
    assert together[1] == together[3] == int(np.argmax(LOGITS_V))  # a row that nobody reads costs no random number


def test_ids_at_minus_infinity_are_never_chosen():
    logits_BV = jnp.tile(jnp.where(jnp.arange(V) < 3, LOGITS_V, -jnp.inf), (200, 1))
    rows = [dataclasses.replace(PLAIN, temperature=50.0, repetition_penalty=2.0)] * 200
    seen_BV, keys = jnp.ones((200, V), bool), jax.random.split(jax.random.key(0), 200)
    assert set(np.asarray(CHOOSE(logits_BV, seen_BV, Options.of(rows), keys)).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": ("",)}, "stop string"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **wrong)
