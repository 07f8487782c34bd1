"""Sentences that repeat an earlier one: each rule at its threshold, and against the rules written out plainly."""

from collections import Counter

import hypothesis
import hypothesis.strategies as st
import pytest

from data_pipeline.dedup import similar_lines as module
from data_pipeline.dedup.similar_lines import similar_lines, split

HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"


def altered(sentence, count):
    """The sentence with its first characters exchanged for others."""
    return "甲乙丙丁戊"[:count] + sentence[count:]


@pytest.mark.parametrize(
    ("rule", "length", "edits", "same"),
    [
        ("paper", 20, 1, True),  # 1 < 2.0
        ("paper", 20, 2, False),
        ("paper", 21, 2, True),  # 2 < 2.1
        ("paper", 10, 1, False),
        ("paper", 11, 1, True),
        ("released", 20, 2, True),  # 2 <= 2.0
        ("released", 20, 3, False),
        ("released", 16, 1, True),
        ("released", 15, 1, False),  # up to 15 characters: only the same
        ("released", 15, 0, True),
        ("paper", 3, 0, True),
    ],
)
def test_thresholds_from_both_sides(rule, length, edits, same):
    first = HAN[: length - 1] + "。"
    text, dropped = similar_lines(first + altered(first, edits), rule)
    assert text == first if same else len(text) == 2 * length
    assert [(line.repeats, line.distance) for line in dropped] == [(first, edits)] * same


def test_the_papers_own_example_of_lengths_23_and_25():
    first, second = HAN[:22] + "。", HAN[:22] + "甲乙。"
    assert similar_lines(first + second, "paper")[0] == first


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("一。二！三？", ["一。", "二！", "三？"]),
        ("一……二…三", ["一……", "二…", "三"]),
        ("前言【注】后文[1]完", ["前言", "【注】", "后文", "[1]", "完"]),
        ("一\n二。\n三", ["一\n二。", "\n三"]),  # newlines end no sentence
        ("", []),
    ],
)
def test_sentences_end_where_the_script_ends_them(text, parts):
    assert split(text) == parts


def plain_distance(a, b):
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j - 1] + (x != y), above[j] + 1, row[-1] + 1))
        above = row
    return above[-1]


def plain_same(first, second, rule):
    """The rules with all their questions, as they are published."""
    shorter, longer = sorted((len(first), len(second)))
    bags = Counter(first), Counter(second)
    overlap = (bags[0] & bags[1]).total() / (bags[0] | bags[1]).total()
    distance = plain_distance(first, second)
    if rule == "paper":
        return overlap > 1 / 3 and 10 * distance < shorter
    if (longer - shorter) / longer >= 0.3 or overlap < 1 / 3:
        return False
    return distance == 0 if shorter <= 15 else 10 * distance <= longer


SENTENCES = st.lists(
    st.text(st.sampled_from("天地玄黄甲"), min_size=1, max_size=4).flatmap(
        lambda unit: st.tuples(st.integers(1, 14), st.integers(0, 60), st.sampled_from("天乙丙")).map(
            lambda drawn: (unit * drawn[0])[: drawn[1]] + drawn[2] + (unit * drawn[0])[drawn[1] :] + "。"
        )
    ),
    max_size=8,
)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(SENTENCES, st.sampled_from(module.RULES))
def test_the_kernel_decides_as_the_rules_written_out(sentences, rule):
    expected = {
        later: next(first for first in sentences[:later] if plain_same(first, sentences[later], rule))
        for later in range(len(sentences))
        if any(plain_same(first, sentences[later], rule) for first in sentences[:later])
    }
    text, dropped = similar_lines("".join(sentences), rule)
    assert [(line.sentence, line.repeats) for line in dropped] == [(sentences[i], of) for i, of in expected.items()]
    assert text == "".join(sentence for i, sentence in enumerate(sentences) if i not in expected)
    assert all(line.distance == plain_distance(line.sentence, line.repeats) for line in dropped)


def test_a_sentence_is_compared_with_so_many_before_it(monkeypatch):
    text = "".join(f"第{i}句话。" for i in range(50))
    monkeypatch.setattr(module, "WITHIN", 50)
    assert len(similar_lines(text + "第0句话。", "paper")[1]) == 1
    monkeypatch.setattr(module, "WITHIN", 49)
    assert similar_lines(text + "第0句话。", "paper")[1] == []
