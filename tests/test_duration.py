"""Durations: what is read, what it is in steps, and what has no meaning."""

import pytest

from ctllm_jax.common.errors import UserError
from ctllm_jax.duration import Clock, Duration, parse

CLOCK = Clock(tokens=512 * 4096, epoch=12.5, run=1000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("600 steps", Duration(600, "steps")),
        ("1 step", Duration(1, "steps")),
        (" 598_278steps ", Duration(598_278, "steps")),
        ("1254.68e9 tokens", Duration(1254.68e9, "tokens")),
        ("1e+12 tokens", Duration(1e12, "tokens")),
        ("2.5 epochs", Duration(2.5, "epochs")),
        ("1 epoch", Duration(1, "epochs")),
        ("3%", Duration(3, "%")),
        ("0 %", Duration(0, "%")),
    ],
)
def test_a_number_and_its_unit_are_read(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "600", "steps", "-3 steps", "3 hours", "1e-3 epochs", "3 4 steps", "_1 steps", "nan %"]
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(ValueError, match="is not a duration: give a number of steps, tokens, epochs or %"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "steps"),
    [("1254.68e9 tokens", 598_278), ("7 steps", 7), ("2 epochs", 25), ("3 epochs", 38), ("10%", 100), ("0.04%", 0)],
)
def test_every_unit_comes_to_the_nearest_whole_step(text, steps):
    assert CLOCK.steps(text) == steps


def test_what_the_data_or_the_question_do_not_know_is_refused():
    with pytest.raises(UserError, match="'3 epochs': an epoch has no length here .* give steps or tokens"):
        Clock(tokens=1, run=10).steps("3 epochs")
    with pytest.raises(UserError, match="the run cannot last '50%' of itself; give steps, tokens or epochs"):
        Clock(tokens=1, epoch=1.0).steps("50%")
