"""docs/reference is what the code says: no key without a description, no number without a unit, no stale page."""

import dataclasses
import importlib
import pathlib
import re

import pytest

from ctllm_jax import keys
from ctllm_jax.train_config import TrainConfig
from ctllm_jax.verbs import VERBS

ROOT = pathlib.Path(__file__).resolve().parent.parent
RENEW = "python -m ctllm_jax.keys > docs/reference/config.md"


@pytest.mark.parametrize("name", VERBS)
def test_every_key_is_described_and_every_number_has_a_unit(name):
    found = list(keys.keys_of(getattr(importlib.import_module(VERBS[name].module), VERBS[name].config)))
    assert found
    assert not [key.path for key in found if not key.meaning], "no comment beside the key"
    numbers = [key for key in found if re.fullmatch("(None or )?(list of |table of )?(int|float)", key.kind)]
    assert not [key.path for key in numbers if not key.unit], "begin the comment with [unit]"


def test_the_page_is_what_the_generator_writes_now():
    page = (ROOT / "docs/reference/config.md").read_text(encoding="utf-8")
    assert page == keys.document(), RENEW


def test_names_that_a_description_goes_by_are_written_out():
    train = {key.path: key.meaning for key in keys.keys_of(TrainConfig)}
    assert train["optimizer.schedule"] == "one of SCHEDULES (constant, cosine, linear, wsd)"
    assert train["model.attention"].startswith("backend: a key of ctllm_jax.attention.BACKENDS (xla, pallas_tpu, ")
    assert train["objective.name"].startswith('one of OBJECTIVES: "lm"')
    assert train["log.tensorboard"].endswith("in RUN/tensorboard")


def test_descriptions_come_from_comments_and_docstrings_of_all_kinds():
    @dataclasses.dataclass
    class Inner:
        """width: [m] of a thing; name: what it is
        called. And on.

        Not of a key.
        """

        width: float
        name: str

    @dataclasses.dataclass
    class Outer(Inner):
        """Something."""

        many: tuple[int, ...] = ()  # [apples] in a basket

    assert keys.descriptions(Outer) == {
        "width": "[m] of a thing",
        "name": "what it is called. And on",
        "many": "[apples] in a basket",
    }
    found = {key.path: key for key in keys.keys_of(Outer)}
    assert found["many"] == keys.Key("many", "list of int", "apples", "in a basket")
    assert (found["width"].unit, found["name"].unit) == ("m", "")
