"""Configs as typed dataclasses."""

import dataclasses

import pytest

from ctllm_jax.common import config
from ctllm_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    maybe: Inner | None
    steps: int
    flag: bool
    words: tuple[str, ...]
    table: dict[str, float]

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps {self.steps} is negative")


GOOD = {
    "inner": {"rate": 1},
    "maybe": None,
    "steps": 3,
    "flag": True,
    "words": ["a", "b"],
    "table": {"zh": 1, "en": 0.5},
}


def test_a_mapping_becomes_typed_dataclasses():
    built = config.build(Outer, GOOD)
    assert built == Outer(Inner(1.0), None, 3, True, ("a", "b"), {"zh": 1.0, "en": 0.5})
    assert isinstance(built.inner.rate, float) and isinstance(built.table["zh"], float)
    assert config.build(Outer, {**GOOD, "maybe": {"rate": 2}}).maybe == Inner(2.0)
    assert config.build(Outer, dataclasses.asdict(built)) == built


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepps": 3}, r"config: unknown key 'stepps'; known keys: flag, inner, maybe, steps, table, words"),
        ({"inner": {"rate": 1, "extra": 2}}, r"config\.inner: unknown key 'extra'"),
        ({"maybe": {"rate": 1, "extra": 2}}, r"config\.maybe: unknown key 'extra'"),
        ({"inner": {}}, r"config\.inner: key 'rate' is missing"),
        ({"inner": 3}, r"config\.inner: expected a group of keys, found 3"),
        ({"inner": None}, r"config\.inner: expected a group of keys, found None"),
        ({"inner": {"rate": "1e-3"}}, r"config\.inner\.rate: expected a number, found '1e-3'"),
        ({"inner": {"rate": True}}, r"config\.inner\.rate: expected a number, found True"),
        ({"steps": 3.0}, r"config\.steps: expected a whole number, found 3\.0"),
        ({"steps": True}, r"config\.steps: expected a whole number, found True"),
        ({"flag": 1}, r"config\.flag: expected True or False, found 1"),
        ({"words": "ab"}, r"config\.words: expected a list, found 'ab'"),
        ({"words": ["a", 1]}, r"config\.words\[1\]: expected text, found 1"),
        ({"table": {"zh": "x"}}, r"config\.table\.zh: expected a number, found 'x'"),
        ({"steps": -1}, r"config: steps -1 is negative"),
    ],
)
def test_what_is_wrong_in_a_config_is_named_with_its_path(change, message):
    with pytest.raises(UserError, match=message):
        config.build(Outer, {**GOOD, **change})


def test_a_missing_key_is_an_error():
    with pytest.raises(UserError, match="config: key 'steps' is missing"):
        config.build(Outer, {key: value for key, value in GOOD.items() if key != "steps"})
