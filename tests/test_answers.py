"""What a store says of its answers."""

import types

import pytest

from data_pipeline.answers import warnings

CHAT = {"documents": 100, "truncated": 0, "dropped": 0}
PAIRS = {**CHAT, "tokens_chosen": 1000, "tokens_rejected": 1000}


def said(kind: str, pad_id: int | None = None, **changes) -> list[str]:
    """The sentences on a store of two sources, the second with changes."""
    counts = PAIRS if kind == "preference" else CHAT
    return warnings(
        {"zh": counts, "en": {**counts, **changes}}, kind, 64, types.SimpleNamespace(eos_id=2, pad_id=pad_id)
    )


def test_where_all_is_well_nothing_is_said():
    assert said("chat") == said("preference") == said("preference", pad_id=3) == []


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("chat", {"truncated": 7}, "7 of 200 examples were longer than 64 tokens and cut"),
        ("chat", {"dropped": 3}, "3 of 200 examples were dropped: cutting at 64 tokens left no answer"),
        ("preference", {"dropped": 3}, "left no answer, or two that do not differ"),
        ("preference", {"tokens_chosen": 1400}, "chosen answers have 1.20 times the tokens of rejected ones"),
        ("chat", {"pad_id": 2}, "the tokenizer pads with the id that ends a document"),
    ],
)
def test_each_trouble_has_its_sentence(kind, changes, sentence):
    (found,) = said(kind, **changes)
    assert sentence in found
