"""Filters: what each measure measures, and on which side of its limit a document falls."""

import dataclasses
import importlib

import numpy as np
import pytest

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from data_pipeline.filters import measures
from data_pipeline.filters.batch import MeasureConfig, TextBatch
from data_pipeline.filters.language import LanguageConfig
from data_pipeline.filters.rules import FilterConfig, Filters, Limits, Verdict, broken

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
    return float(measures.measure(family, TextBatch([text], CONFIG.measures))[name][0])


def judged(subset: str, text: str, config: FilterConfig = CONFIG) -> Verdict:
    return Filters(config).judge(subset, [text], [""])[0]


def test_a_lower_bound_may_exclude_its_own_value():
    assert broken({"digits": 0.1}, {"digits": Limits(above=0.1)}) == [
        {"rule": "digits", "value": 0.1, "bound": "above", "threshold": 0.1}
    ]
    assert broken({"digits": 0.100001}, {"digits": Limits(above=0.1)}) == []


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
        ("chinese", "han", "山ab、𠀀", 0.5),
        ("chinese", "kana_hangul", "山のｶ가", 0.75),
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
        ("english", "lorem_ipsum", "Lorem Ipsum dolor...", 1 / 20),
        ("english", "lines", "one\n\ntwo\n", 2),
        ("english", "hash_runs", "##a#bcdefg", 0.2),
        ("english", "ellipsis_runs", "a...b……cd.", 0.2),
        ("english", "punctuation", "a, b. (c)", 4),
        ("english", "not_alphabetic", "ab 12, +", 0.5),
        ("english", "digits", "ab12", 0.5),
        ("english", "sentences", "One. Two! Three", 3),
        ("english", "characters", "ﬁne", 4),
        ("english", "ellipsis_lines", "a...\nb…\nc\nd", 0.5),
        ("english", "bullet_lines", "- a\n* b\nc\nd", 0.5),
        ("english", "read_more_lines", "Read More\nb", 0.5),
        ("english", "duplicate_lines", "a\nb\na\na", 0.5),
        ("english", "duplicate_line_characters", "aaa\nb\nb", 0.2),
        ("code", "longest_line", "a\nbcd\n", 3),
        ("code", "mean_line_length", "a\nbcd", 2),
        ("code", "alphanumeric", "a1+-", 0.5),
        ("code", "alphabetic", "a1+-", 0.25),
        ("code", "lines", "a\n\nb", 2),
        ("code", "characters", "a\nb", 3),
        ("code", "generated", "# This file was automatically generated.\nx = 1\n", 1),
        ("code", "generated", "// Code generated by protoc. DO NOT EDIT.\n", 1),
        ("code", "generated", "// code generated, code generated by hand: Do Not Edit\n", 1),
        ("code", "generated", "// do not edit code generated\n", 0),
        ("code", "generated", "code generated " * 50_000, 0),  # not in the square of its length
        ("code", "generated", "x = 1\n" * 5 + "# auto-generated\n", 0),  # below the fifth line
        ("code", "generated", "def automatic(): pass\n", 0),
        ("code", "encoded", "aB3+" * 16 + "=" * 64, 1),
        ("code", "encoded", "aB3+" * 15 + "\n\n", 0),
        ("code", "longest_encoded", "x = '" + "aB3+" * 20 + "'", 80),
        ("code", "longest_encoded", "{0x00,0x1f,0x2e,0x3d,0x4c,0x5b,0x6a,0x79}", 39),
        ("code", "longest_encoded", "'" + "\\u4e00" * 8 + "'", 48),
    ],
)
def test_a_measure_measures_what_it_says(family, name, text, value):
    assert measured(family, name, text) == pytest.approx(value)


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


def test_rulers_and_the_lines_of_tables_are_no_repetition():
    ruled = "甲乙丙\n======\n| ---- | ---- |\n丁戊己____庚"
    short = "甲乙丙\n=\n| - | - |\n丁戊己_庚"
    for name in ("top_2gram", "top_4gram", "duplicate_5gram"):
        assert measured("chinese", name, ruled) == measured("chinese", name, short)


def test_a_documents_values_do_not_depend_on_its_neighbours():
    texts = [PROSE, PROSE * 3, "短", "another text entirely, of other words"]
    together = measures.measure("chinese", TextBatch(texts, CONFIG.measures))
    for i, text in enumerate(texts):
        alone = measures.measure("chinese", TextBatch([text], CONFIG.measures))
        assert {name: column[i] for name, column in together.items()} == {n: c[0] for n, c in alone.items()}


def test_bracket_text_of_megabytes_is_measured_in_linear_time():
    assert measured("chinese", "bracketed", "【" * 1_000_000) == 0


def test_good_prose_passes_every_rule_in_its_own_language_only():
    chinese, english = (judged(subset, PROSE) for subset in ("zh_cc", "en"))
    assert chinese.reasons == [] and chinese.signals["language"] == "zh"
    assert set(measures.names("chinese")) <= set(chinese.signals)
    assert {"language_label", "words"} <= {reason["rule"] for reason in english.reasons}


def test_every_broken_rule_is_recorded_with_value_and_threshold():
    verdict = judged("zh_cc", "12345 67890")
    rules = {reason["rule"]: reason for reason in verdict.reasons}
    assert {"characters", "digits", "sentences", "punctuation"} <= set(rules)
    for name in ("characters", "digits"):
        limit = getattr(CONFIG.rules["chinese"][name], rules[name]["bound"])
        assert rules[name]["threshold"] == limit and rules[name]["value"] == verdict.signals[name]
    assert not verdict.passed_rules


def test_code_is_not_asked_for_its_language():
    verdict = judged("code", "def add(a, b):\n    return a + b\n")
    assert verdict.reasons == [] and "language" not in verdict.signals


@pytest.mark.parametrize(
    "change",
    [
        {"rules": {"chinese": {"colour": Limits(max=1)}}},
        {"rules": {"klingon": {}}},
        {"languages": {"zh_mars": CONFIG.languages["en"]}},
        {"languages": {"en": CONFIG.languages["zh_cc"]}},
    ],
)
def test_a_rule_or_subset_that_does_not_exist_is_an_error(change):
    with pytest.raises(UserError, match="colour|klingon|zh_mars|min_han"):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeasureConfig((), "pkuseg", None), "'pkuseg' is neither"),
        (lambda: MeasureConfig((), "rjieba", 0), "segmented_characters"),
        (lambda: LanguageConfig(None, "\n"), "line_break"),
        (lambda: LanguageConfig(0, ""), "sample_characters must be at least 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_an_error(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_measure_without_a_limit_is_still_recorded():
    free = dataclasses.replace(CONFIG, rules={}, languages={})
    verdict = judged("zh_cc", "短", free)
    assert verdict.reasons == [] and verdict.signals["characters"] == 1
