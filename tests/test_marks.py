"""Marks read from judgements, against FastChat's and AlignBench's parsers, and what marks come to."""

import json
import re
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from tiny_models import NO_REFERENCE, REFERENCE

from ctllm_jax.evaluate.judged import verdict
from ctllm_jax.evaluate.judged.marks import agreement, compared, graded, means, repeatability, summary
from ctllm_jax.evaluate.judged.verdict import read_mark, read_preference

GOLDEN = REFERENCE / "judge" / "judge_golden.json"
needs_reference = pytest.mark.skipif(not GOLDEN.exists(), reason=NO_REFERENCE)
# Where we differ on purpose, and what we read: forms that they miss, and marks that do not exist.
FASTCHAT = {"8分": 8, "评分：[[ 8 ]]": 8, "评分：【【9】】": 9, "Rating: [[8/10]]": 8, "评分：[[９]]": 9}
FASTCHAT |= {"评分：[[11]]": None, "[[0]]": None}
ALIGN_BENCH = {"{'综合得分': 7.5}": 7.5, "综合得分: 8": 8, '{"综合得分": 8}': 8, "{'综合得分':8}": 8}


@needs_reference
def test_fastchats_marks():
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))["fastchat"]
    theirs = {case["text"]: None if case["rating"] == -1 else case["rating"] for case in cases}
    ours = {text: read_mark(text).value for text in theirs}
    assert {text: ours[text] for text in ours if ours[text] != theirs[text]} == FASTCHAT


@needs_reference
def test_align_benchs_marks():
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))["alignbench"]
    theirs = {case["text"]: None if case["score"] == -1 else case["score"] for case in cases}
    ours = {text: read_mark(text).value for text in theirs}
    assert {text: ours[text] for text in ours if ours[text] != theirs[text]} == ALIGN_BENCH
    for case in cases:
        if case["text"] not in ALIGN_BENCH:
            assert read_mark(case["text"]).aspects == case["rating"]


@needs_reference
def test_fastchats_means():
    case = json.loads(GOLDEN.read_text(encoding="utf-8"))["aggregate"]
    rows = [
        row(record["category"], record["turn"], None if record["score"] == -1 else record["score"])
        | {"category": record["category"]}
        for record in case["records"]
    ]
    found = summary(rows, 20)
    assert found["mean"] == pytest.approx(case["average"])
    assert found["turns"] == pytest.approx({"1": case["turn1"], "2": case["turn2"]})
    assert (found["n"], found["without"]) == (5, 1)


@pytest.mark.parametrize(
    ("text", "value", "form"),
    [
        ("评分：[[8]]", 8, "brackets"),
        ("［［９．５］］", 9.5, "brackets"),
        ("【【 9 】】", 9, "brackets"),
        ("[[8分]]，[[8]]", 8, "brackets"),
        ("[[10]]，之前是 [[3]]", 10, "first of several brackets"),
        ("评分：**8**", 8, "label"),
        ("综合得分：７／１０", 7, "label"),
        ("Score: 7.5.", 7.5, "label"),
        ("满分10分，得分：8分", 8, "label"),
        ("<think>也许 [[3]]？</think>评分：[[6]]", 6, "brackets"),
        ("９/10", 9, "plain"),
        ("我给8分。", 8, "plain"),
        ("第一轮评分：6，第二轮评分：8", None, "contradictory"),
        ("好处 3 分，坏处 4 分。", None, "contradictory"),
        ("评分：[[100]]", None, "out of range"),
        ("[[0.5]]", None, "out of range"),
        ("评分：8/20", None, "missing"),
        ("评分：80%", None, "missing"),
        ("2024/10/10，阅读需要8分钟，列表是 [4]", None, "missing"),
        ("", None, "missing"),
    ],
)
def test_a_mark_is_read_where_one_is_plainly_given(text, value, form):
    found = read_mark(text)
    assert (found.value, found.form) == (value, form)


# The pattern of labelled marks in its plain form, whose time grows with the fourth power of the white space in it.
LABEL = re.compile(
    r"(?:评分|得分|分数|打分|总分|rating|score)[\"'*]*\s*(?:[:=为是]|is)?\s*(?:\*\*)?[\[【(]?\s*(-?[0-9]+(?:\.[0-9]*)?)"
    r"(?:\s*/\s*10(?![0-9/])|\s*分)?(?!\s*/|[0-9%]|\.[0-9])",
    re.IGNORECASE,
)
JUDGED = ["评分", "Score", *"8 1 . - / 10 分 % [ ( 【 * ** \" ' : = 是 is".split(), " ", " \n"]


@hypothesis.settings(max_examples=500, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.sampled_from(JUDGED), max_size=12).map(lambda parts: "评分" + "".join(parts)))
def test_labelled_marks_are_found_as_the_plain_pattern_finds_them(text):
    assert verdict._LABEL.findall(text) == LABEL.findall(text)


def test_a_long_judgement_is_read_at_once():
    start = time.process_time()
    assert read_mark("评分" + " " * 40_000).form == "missing"
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("text", "side"),
    [("更好：[[A]]", "A"), ("【【 Ｂ 】】", "B"), ("[[C]]……[[C]]", "C"), ("[[A]] 或 [[B]]", None), ("A 更好", None)],
)
def test_a_preference_is_read_where_it_is_the_only_one(text, side):
    assert read_preference(text) == side


def row(id: str, turn: int, value: float | None, judge: str = "j", sample: int = 0, characters: int = 10) -> dict:
    form = "missing" if value is None else "brackets"
    about = {"id": id, "category": id[0], "turn": turn, "judge": judge, "sample": sample}
    return {**about, "value": value, "form": form, "characters": characters, "cut": 0}


def test_means_by_mark_and_by_category():
    rows = [row("a1", 1, 4), row("a1", 2, 6), row("a2", 1, 8), row("b1", 1, 1), row("c1", 1, None)]
    found = means(rows, 100)
    assert found["mean"] == 19 / 4 and found["macro"] == (6 + 1) / 2
    assert found["categories"]["c"] == {"mean": None, "interval": None, "n": 0}
    assert found["categories"]["b"] == {"mean": 1.0, "interval": [1.0, 1.0], "n": 1}
    assert means([row("a1", 1, None)], 10)["mean"] is None


def test_the_interval_is_that_of_questions_not_of_marks():
    random = np.random.default_rng(1)
    values = random.integers(1, 11, 100)
    once = [row(f"a{i}", 1, float(value)) for i, value in enumerate(values)]
    often = [row(f"a{i}", 1, float(value), sample=s) for i, value in enumerate(values) for s in range(9)]
    one, nine = means(once, 4_000), means(often, 4_000)
    assert nine["interval"] == pytest.approx(one["interval"])
    half = 1.96 * values.std() / 10
    assert one["interval"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.08)


def test_agreement_between_judges_and_with_oneself():
    rows = [row(f"a{i}", 1, value, "one") for i, value in enumerate((2, 4, 6, 8))]
    rows += [row(f"a{i}", 1, value, "other") for i, value in enumerate((3, 5, 7, None))]
    assert agreement(rows) == {
        "one, other": {
            "n": 3,
            "pearson": pytest.approx(1),
            "spearman": pytest.approx(1),
            "difference": 1.0,
            "within_one": 1.0,
        }
    }
    assert repeatability(rows) is None
    again = [row("a1", 1, 4, sample=0), row("a1", 1, 6, sample=1), row("a2", 1, 5, sample=0), row("a2", 1, 5, sample=1)]
    assert repeatability(again) == {"n": 2, "deviation": pytest.approx(2**0.5 / 2), "same": 0.5}
    found = graded(rows, 10)
    assert list(found["judges"]) == ["one", "other"]
    assert found["all"]["mean"] == 35 / 7 and found["judges"]["one"]["mean"] == 5


def test_a_preference_for_length_shows():
    lengths = [row(f"a{i}", 1, float(i + 1), characters=100 * i * i) for i in range(6)]
    assert summary(lengths, 10)["length_correlation"] == pytest.approx(1)
    assert summary([{**entry, "value": 11 - entry["value"]} for entry in lengths], 10)["length_correlation"] < -0.99
    assert summary([{**entry, "value": 5.0} for entry in lengths], 10)["length_correlation"] is None


def test_a_win_needs_both_orders():
    verdicts = [
        ("A", "B", 9, 5),
        ("A", "A", 9, 5),
        ("B", "A", 9, 5),
        ("C", "C", 5, 5),
        ("C", "B", 5, 5),
        (None, "A", 5, 5),
    ]
    rows = [
        {"id": f"a{i}", "category": "a", "forward": forward, "backward": backward, "characters": [one, other]}
        for i, (forward, backward, one, other) in enumerate(verdicts)
    ]
    found = compared(rows, 10)
    assert (found["wins"], found["ties"], found["losses"], found["without"]) == (1, 3, 1, 1)
    assert found["win_rate"]["mean"] == 0.5 and found["consistent"] == 3 / 5
    assert (found["first"], found["longer"]) == (4 / 7, 0.5)
