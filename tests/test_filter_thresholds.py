"""Every rule on Chinese text at its threshold from both sides: one document at the limit, one just beyond.

The texts are built, so that the value is known; what is asked is whether this one rule speaks.
"""

import dataclasses
import functools
import importlib

import pytest

from ctllm_jax.common.config import build
from data_pipeline.filters.rules import FilterConfig, Filters, Language


@functools.cache
def filters(preset):
    return Filters(config(preset))


def config(preset):
    return build(FilterConfig, importlib.import_module("configs.corpus").get_config(preset).to_dict()["filters"])


def broken(preset, text, url=""):
    return {reason["rule"] for reason in filters(preset).judge("zh_cc", [text], [url])[0].reasons}


def han(count, begin=0):
    """So many distinct Chinese characters, none of which ends a sentence."""
    return "".join(chr(0x4E00 + begin + i) for i in range(count))


def bracketed(inside):
    return "【" + han(inside) + "】" + han(998 - inside, 1000)


def runs(mark, count):
    """100 characters with so many single marks."""
    return "".join(mark + han(1, i) for i in range(count)) + han(100 - 2 * count, 500)


def lines(ends, count):
    """100 lines, so many of which end (or begin, for a bullet) in the mark."""
    marked = [ends + han(5, 20 * i) if ends == "•" else han(5, 20 * i) + ends for i in range(count)]
    return "\n".join(marked + [han(7, 20 * i) for i in range(count, 100)])


def words(two, one):
    return "我们 " * two + "的 " * one


def repeated_gram(n, times, length=100):
    """A text of so many characters in which one n-gram occurs so many times, and nothing else does twice."""
    gram = han(n, 5000)
    text = "".join(gram + han(1, i) for i in range(times))
    return text + han(length - len(text), 500)


def repeated_block(size):
    """100 characters, of which the first `size` come again until the text is full."""
    return (han(size) * 3)[:100]


def sentences(distinct, total):
    return "".join(han(9, 10 * (i % distinct)) + "。" for i in range(total))


CASES = [  # preset, rule, at its limit, just beyond
    ("default", "bracketed", bracketed(100), bracketed(101)),
    ("default", "sentences", "一句话。又一句", "一句话。"),
    ("default", "characters", han(50), han(49)),
    ("released", "characters", han(10_000), han(10_001)),
    ("default", "mean_word_length", words(30, 70), words(29, 71)),
    ("released", "mean_word_length", words(30, 70), words(29, 71)),
    ("default", "mean_word_length", "甲 abcdefghijklmnopqrs", "甲 abcdefghijklmnopqrst"),
    ("default", "hash_runs", runs("#", 10), runs("#", 11)),
    ("default", "hash_runs", runs("##", 9)[:100], runs("#", 11)),
    ("default", "ellipsis_runs", runs("…", 10), runs("…", 11)),
    ("released", "ellipsis_runs", runs("…", 10), runs("…", 11)),
    ("default", "digits", "7" * 30 + han(70), "7" * 31 + han(69)),
    ("default", "digits", "７" * 30 + "，！" + han(70), "７" * 31 + "，！" + han(69)),
    ("default", "read_more_lines", lines("展开", 50), lines("展开", 51)),
    ("default", "read_more_lines", lines("。。。", 50), lines("。。。", 51)),
    ("released", "read_more_lines", lines("更多", 30), lines("更多", 31)),
    ("default", "bullet_lines", lines("•", 90), lines("•", 91)),
    ("default", "mean_line_length", f"{han(10)}\n\n{han(10)}", f"{han(10)}\n\n{han(9)}"),
    ("default", "punctuation", "没有，一个", "没有 一个"),
    ("released", "ascii_punctuation", "没有，一个", "没有、一个"),
    ("default", "distinct_characters", han(100) * 10 + han(1) * 5000, han(99) * 20),
    ("released", "distinct_in_all", (han(101) * 10)[:1000], han(100) * 10),
    ("default", "character_entropy", han(8) * 13, han(7) * 15),
    ("released", "character_entropy", han(21) * 5, han(20) * 5),
    ("default", "top_2gram", repeated_gram(2, 11), repeated_gram(2, 12)),
    ("default", "top_3gram", repeated_gram(3, 7), repeated_gram(3, 8)),
    ("default", "top_4gram", repeated_gram(4, 6), repeated_gram(4, 7)),
    ("ct_llm", "counted_2gram", repeated_gram(2, 11) + "。", repeated_gram(2, 12) + "。"),
    ("ct_llm", "counted_3gram", repeated_gram(3, 7) + "。", repeated_gram(3, 8) + "。"),
    ("ct_llm", "counted_4gram", repeated_gram(4, 5) + "。", repeated_gram(4, 6) + "。"),
    *[("default", f"duplicate_{n}gram", repeated_block(40), repeated_block(39)) for n in range(5, 11)],
    *[("ct_llm", f"duplicate_{n}gram", repeated_block(40) + "。", repeated_block(38) + "。") for n in range(5, 11)],
    ("ct_llm", "duplicate_sentences", sentences(70, 100), sentences(69, 100)),
    ("ct_llm", "duplicate_sentence_characters", sentences(80, 100), sentences(79, 100)),
]


@pytest.mark.parametrize(("preset", "rule", "at", "beyond"), CASES)
def test_a_document_at_the_limit_passes_and_one_just_beyond_does_not(preset, rule, at, beyond):
    assert rule not in broken(preset, at)
    assert rule in broken(preset, beyond)


@pytest.mark.parametrize("preset", ["default", "ct_llm", "released"])
def test_every_chinese_rule_has_a_case(preset):
    rules = set(config(preset).rules["chinese"])
    same = {rule for _, rule, _, _ in CASES}
    assert rules <= same


def test_the_language_score_is_compared_at_its_limit():
    text = "今天我们去河边散步，然后回家吃饭。"
    score = filters("ct_llm").judge("zh_cc", [text], [""])[0].signals["language_score"]
    for limit, passes in ((score, True), (score + 1e-6, False)):
        one = dataclasses.replace(config("ct_llm"), languages={"zh_cc": Language(("zh",), limit)})
        reasons = Filters(one).judge("zh_cc", [text], [""])[0].reasons
        assert ("language_score" not in {reason["rule"] for reason in reasons}) == passes


@pytest.mark.parametrize(("preset", "rejected"), [("default", True), ("ct_llm", True), ("released", False)])
def test_confident_english_is_chinese_for_the_released_script_alone(preset, rejected):
    """It reads the score and not the label."""
    text = "The river rises in the mountains and flows through nine provinces. It then reaches the sea."
    assert ("language_label" in broken(preset, text)) == rejected
    assert "language_score" not in broken(preset, text)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("孟子说：仁德的言辞不如仁德的声望深入人心，良善的政措不如良善的教育更能赢得民众。", True),  # "ja" to the model
        ("東京は日本の首都であり、世界でも有数の大都市である。多くの人々が暮らしている。", False),
    ],
)
def test_han_characters_alone_tell_chinese_and_kana_do_not(text, passes):
    language = Language(labels=("xx",), min_score=0.4, min_han=0.5)  # a model that is never right
    one = dataclasses.replace(config("default"), languages={"zh_cc": language})
    reasons = {reason["rule"] for reason in Filters(one).judge("zh_cc", [text], [""])[0].reasons}
    assert ("language_label" not in reasons) == passes


def test_copies_of_a_text_are_repetition_for_all_but_the_released_script():
    copies = "春眠不觉晓处闻啼鸟夜来风雨声花落知多少。" * 6
    assert {f"duplicate_{n}gram" for n in range(5, 11)} <= broken("default", copies) & broken("ct_llm", copies)
    assert not {rule for rule in broken("released", copies) if rule.endswith("gram")}
