"""The preset `released` decides as the official CT-LLM script did on 9,676 real documents, and keeps the same bytes."""

import gzip
import hashlib
import json
import pathlib

import pytest
from test_filter_thresholds import config

from data_pipeline.filters.rules import Filters

SHARED = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"
DOCUMENTS = SHARED / "corpus" / "zh-00000.jsonl.gz"
DECISIONS = SHARED / "reference" / "official_filter" / "zh-00000.jsonl.gz"
RULES = {  # the script's names for them
    "bracket ratio": "bracketed",
    "Number of senteces less than 1": "sentences",
    "Word count less than 50 or larger than 10000": "characters",
    "Mean word length less than 1.3 or larger than 10": "mean_word_length",
    "Digit over non_punctuation words": "digits",
    "Lines ending with readmore etc.": "read_more_lines",
    "Line starting with bullet point": "bullet_lines",
    "Unique words fraction": "distinct_in_all",
    "Entropy of unigram distribution": "character_entropy",
    "fasttext score": "language_score",
}


def read(path):
    with gzip.open(path) as lines:
        return [json.loads(line) for line in lines]


def differences(preset):
    """(id, what we decided, what the script did) of every document on which they differ."""
    decisions = {decision["id"]: decision for decision in read(DECISIONS)}
    documents = read(DOCUMENTS)
    filters, found = Filters(preset), []
    for begin in range(0, len(documents), 512):
        batch = documents[begin : begin + 512]
        verdicts = filters.judge("zh_cc", [item["text"] for item in batch], [item["url"] for item in batch])
        for document, verdict in zip(batch, verdicts, strict=True):
            decision = decisions.pop(document["id"])
            if not same(verdict, decision):
                found.append((document["id"], verdict.reasons, decision))
    assert not decisions
    return found


def same(verdict, decision):
    if decision["kept"] or not verdict.reasons:
        digest = hashlib.sha1(verdict.text.encode()).hexdigest()
        return decision["kept"] and not verdict.reasons and digest == decision["text_sha1"]
    ((rule, value),) = decision["flag"].items()
    first = verdict.reasons[0]  # the script stops at the first broken rule
    return first["rule"] == RULES[rule] and first["value"] == pytest.approx(value, abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not DECISIONS.exists(), reason="../shared/data is not here")
def test_every_decision_is_the_official_scripts():
    assert differences(config("released")) == []
