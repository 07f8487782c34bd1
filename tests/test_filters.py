"""Filters: what each measure measures, and on which side of its limit a document falls."""

import collections
import dataclasses
import importlib

import numpy as np
import pytest

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from data_pipeline.filters import measures
from data_pipeline.filters.batch import TextBatch, code_points
from data_pipeline.filters.repetition import DUPLICATED, TOP, repetition
from data_pipeline.filters.rules import FilterConfig, Filters, Limits, broken

CONFIG = build(FilterConfig, importlib.import_module("configs.corpus").get_config().to_dict()["filters"])
BOUNDS = [
    (family, name, bound, threshold)
    for family, limits in CONFIG.rules.items()
    for name, limit in limits.items()
    for bound, threshold in dataclasses.asdict(limit).items()
    if threshold is not None
]
PROSE = (
    "黄河是中国第二长河，发源于青海省的巴颜喀拉山脉。它流经九个省区，最后在山东省注入渤海！\n"
    "沿岸的人们很早就学会了引水灌溉，种植小麦和粟米；历史学家因此称这里为文明的摇篮。\n"
    "今天，水利工程师正在研究怎样减少泥沙，让下游的城市不再担心洪水？答案还需要时间。"
)


def measured(family: str, name: str, text: str) -> float:
    return float(measures.measure(family, TextBatch([text]))[name][0])


@pytest.mark.parametrize(("family", "name", "bound", "threshold"), BOUNDS)
def test_a_value_at_its_limit_passes_and_one_just_beyond_fails(family, name, bound, threshold):
    limits = {name: CONFIG.rules[family][name]}
    beyond = threshold - 1e-6 if bound == "min" else threshold + 1e-6
    assert broken({name: threshold}, limits) == []
    assert broken({name: beyond}, limits) == [{"rule": name, "value": beyond, "bound": bound, "threshold": threshold}]


@pytest.mark.parametrize(
    ("family", "name", "text", "value"),
    [
        ("chinese", "sentences", "一。二！三？四；五", 5),
        ("chinese", "sentences", "一句话，没有结尾", 1),
        ("chinese", "characters", "ａｂｃ……", 9),  # NFKC: one ellipsis becomes three full stops
        ("chinese", "mean_word_length", "我们，学习。", 2),
        ("chinese", "mean_word_length", "，。！", 0),
        ("chinese", "hash_runs", "##一#二###三四", 0.3),
        ("chinese", "ellipsis_runs", "一……二...三.四", 2 / 10),
        ("chinese", "bracketed", "【一二】三四五六七八", 0.2),
        ("chinese", "bracketed", "【一\n二】", 0),
        ("chinese", "digits", "１2，三四", 0.5),  # punctuation does not count below the line
        ("chinese", "read_more_lines", "点击展开\n查看更多\n正文\n正文。。。", 0.75),
        ("chinese", "bullet_lines", "• 一\n  ● 二\n三\n四", 0.5),
        ("chinese", "mean_line_length", "一二三\n\n四", 2),
        ("chinese", "punctuation", "一，二。「三」", 4),
        ("chinese", "distinct_characters", "一一二二", 0.5),
        ("chinese", "distinct_characters", "".join(map(chr, range(0x4E00, 0x4E00 + 1000))) * 50, 1.0),
        ("chinese", "character_entropy", "一二三四", np.log(4)),
        ("english", "words", "one two  three\nfour", 4),
        ("english", "mean_word_length", "one three", 4),
        ("english", "stop_words", "The cat, and (the) dog", 3),
        ("english", "stop_word_share", "the cat", 0.5),
        ("english", "words_without_letter", "a 1 2 -", 0.75),
        ("english", "symbol_words", "#tag well... fine so", 0.5),
        ("english", "capital_words", "BUY NOW I say", 0.5),
        ("english", "distinct_words", "a b a b", 0.5),
        ("english", "word_entropy", "a b", np.log(2)),
        ("english", "curly_braces", "{ab}", 0.5),
        ("english", "lorem_ipsum", "Lorem Ipsum dolor", 1),
        ("english", "ellipsis_lines", "a...\nb…\nc\nd", 0.5),
        ("english", "bullet_lines", "- a\n* b\nc\nd", 0.5),
        ("english", "read_more_lines", "Read More\nb", 0.5),
        ("english", "duplicate_lines", "a\nb\na\na", 0.5),
        ("english", "duplicate_line_characters", "aaa\nb\nb", 0.2),
        ("code", "longest_line", "a\nbcd\n", 3),
        ("code", "mean_line_length", "a\nbcd", 2),
        ("code", "alphanumeric", "a1+-", 0.5),
    ],
)
def test_a_measure_measures_what_it_says(family, name, text, value):
    assert measured(family, name, text) == pytest.approx(value)


def slow_repetition(text: str) -> dict[str, float]:
    """The definition, written out: characters that lie in a later occurrence of an n-gram."""
    shares = {}
    for n in (*TOP, *DUPLICATED):
        grams = [text[i : i + n] for i in range(len(text) - n + 1)]
        counts = collections.Counter(grams)
        chosen = set(counts)
        if n in TOP:
            best = max(counts.values(), default=0)
            chosen = {min(gram for gram in counts if counts[gram] == best)} if best > 1 else set()
        seen, covered = set(), set()
        for i, gram in enumerate(grams):
            if gram in seen and gram in chosen:
                covered.update(range(i, i + n))
            seen.add(gram)
        shares[f"{'top' if n in TOP else 'duplicate'}_{n}gram"] = len(covered) / max(len(text), 1)
    return shares


def test_repetition_equals_its_definition_on_random_texts_in_one_batch():
    random = np.random.default_rng(0)
    texts = ["", "一", "aaaaaaaaaaaa", "abcabcabcabcabcabc", "𠀀𠀁" * 9]
    texts += ["".join(random.choice(list("abcde"), size)) for size in random.integers(2, 200, 40)]
    points, ends = code_points(texts)
    found = repetition(points, np.ones(len(points), np.int64), ends)
    for i, text in enumerate(texts):
        assert {name: values[i] for name, values in found.items()} == pytest.approx(slow_repetition(text)), text


def test_copies_of_a_text_count_as_repetition_by_position():
    """The released code counts distinct characters here and lets six copies pass."""
    once = "春眠不觉晓处闻啼鸟夜来风雨声花落知多少"
    assert measured("chinese", "duplicate_10gram", once * 6) == pytest.approx(5 / 6)
    assert measured("chinese", "duplicate_10gram", once) == 0


def test_word_repetition_is_weighted_by_characters():
    once = [f"w{i}{'x' * i}" for i in range(12)]
    assert measured("english", "duplicate_5gram", " ".join(once * 4)) == pytest.approx(3 / 4)


def test_a_table_padded_with_spaces_is_no_repetition():
    padded = "名称          数值          单位\n长度          一米          公制"
    assert measured("chinese", "top_2gram", padded) == measured(
        "chinese", "top_2gram", padded.replace("          ", " ")
    )


def test_a_documents_values_do_not_depend_on_its_neighbours():
    texts = [PROSE, PROSE * 3, "短", "another text entirely, of other words"]
    together = measures.measure("chinese", TextBatch(texts))
    for i, text in enumerate(texts):
        alone = measures.measure("chinese", TextBatch([text]))
        assert {name: column[i] for name, column in together.items()} == {n: c[0] for n, c in alone.items()}


def test_bracket_text_of_megabytes_is_measured_in_linear_time():
    assert measured("chinese", "bracketed", "【" * 1_000_000) == 0


def test_good_prose_passes_every_rule_in_its_own_language_only():
    filters = Filters(CONFIG)
    chinese, english = (filters.judge(subset, TextBatch([PROSE]))[0] for subset in ("zh_cc", "en"))
    assert chinese.reasons == [] and chinese.signals["language"] == "zh"
    assert set(measures.names("chinese")) <= set(chinese.signals)
    assert {"language_label", "words"} <= {reason["rule"] for reason in english.reasons}


def test_confident_english_does_not_pass_as_chinese():
    """The released filter reads the score and not the label."""
    text = "The river rises in the mountains and flows through nine provinces. It then reaches the sea."
    verdict = Filters(CONFIG).judge("zh_cc", TextBatch([text]))[0]
    label = next(reason for reason in verdict.reasons if reason["rule"] == "language_label")
    assert label["value"] == "en" and "zh" in label["threshold"]
    assert verdict.signals["language_score"] > 0.4


def test_every_broken_rule_is_recorded_with_value_and_threshold():
    verdict = Filters(CONFIG).judge("zh_cc", TextBatch(["12345 67890"]))[0]
    rules = {reason["rule"]: reason for reason in verdict.reasons}
    assert {"characters", "digits", "sentences", "punctuation"} <= set(rules)
    for name in ("characters", "digits"):
        limit = getattr(CONFIG.rules["chinese"][name], rules[name]["bound"])
        assert rules[name]["threshold"] == limit and rules[name]["value"] == verdict.signals[name]
    assert not verdict.passed_rules


def test_code_is_not_asked_for_its_language():
    verdict = Filters(CONFIG).judge("code", TextBatch(["def add(a, b):\n    return a + b\n"]))[0]
    assert verdict.reasons == [] and "language" not in verdict.signals


@pytest.mark.parametrize(
    "change",
    [
        {"rules": {"chinese": {"colour": Limits(max=1)}}},
        {"rules": {"klingon": {}}},
        {"languages": {"zh_mars": CONFIG.languages["en"]}},
    ],
)
def test_a_rule_or_subset_that_does_not_exist_is_an_error(change):
    with pytest.raises(UserError, match="colour|klingon|zh_mars"):
        dataclasses.replace(CONFIG, **change)


def test_a_measure_without_a_limit_is_still_recorded():
    free = dataclasses.replace(CONFIG, rules={}, languages={})
    verdict = Filters(free).judge("zh_cc", TextBatch(["短"]))[0]
    assert verdict.reasons == [] and verdict.signals["characters"] == 1
