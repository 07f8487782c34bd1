"""Compiled measures equal the plain reference on whatever Unicode holds, and for any neighbours in the batch."""

import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from test_filter_thresholds import config

from data_pipeline.filters import measures, reference, rewrite, tables
from data_pipeline.filters.batch import TextBatch, code_points, fold, utf8
from data_pipeline.filters.repetition import repetition

MEASURES = config("default").measures
TELLING = '一二三的。.…!?；;”"#＃【】〖•- \t\n\r\u3000\u2028\x1c\x00展开更多12１②㍿ﬁ½aAÅ'  # what some rule looks at
TELLING += "e\u0301か\u3099\u1100\u1161\u11a8가ﾊﾟ\u0327\u0345\U0001f600\u200d\ufe0f\U00020000\ud800\udfff\ufdfa"
ANY = st.characters(exclude_categories=())  # with surrogates
TEXTS = st.one_of(
    st.text(ANY, max_size=60),
    st.text(st.sampled_from(TELLING), max_size=120),
    st.text(st.sampled_from("ab \n"), max_size=80),
    st.lists(st.sampled_from(["春眠不觉晓", "。", "\n", "  ", "展开", "•", "……", "x"]), max_size=40).map("".join),
)
checked = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)


def strings(points_T, ends_N):
    begins_N = ends_N - np.diff(ends_N, prepend=0)
    return [
        points_T[begin:end].tobytes().decode("utf-32-le", "surrogatepass")
        for begin, end in zip(begins_N, ends_N, strict=True)
    ]


@checked
@hypothesis.given(st.lists(TEXTS, max_size=4))
def test_chinese_measures_equal_their_reference(texts):
    found = measures.measure("chinese", TextBatch(texts, MEASURES))
    for i, text in enumerate(texts):
        plain = reference.chinese(text, MEASURES)
        assert {name: column[i] for name, column in found.items()} == pytest.approx(plain, abs=1e-9)


@checked
@hypothesis.given(st.lists(TEXTS, max_size=4))
def test_folding_by_table_is_nfkc(texts):
    assert strings(*fold(texts, *code_points(texts))) == [unicodedata.normalize("NFKC", text) for text in texts]


def test_folding_by_table_is_nfkc_for_every_character_between_letters():
    texts = ["".join(f"a{chr(code)}가" for code in range(begin, begin + 4096)) for begin in range(0, 0x110000, 4096)]
    assert strings(*fold(texts, *code_points(texts))) == [unicodedata.normalize("NFKC", text) for text in texts]


def test_marks_without_end_fold_in_linear_time_and_as_many_as_scripts_have_exactly():
    """Python takes the square of a run of marks to put them in order: minutes for the last text."""
    texts = ["e" + "\u0301\u0316" * 128 + "か\u3099", "\u0316" * 256 + "x", "a" + "\u0301\u0316" * 300_000 + "b"]
    first, second, last = strings(*fold(texts, *code_points(texts)))
    assert [first, second] == [unicodedata.normalize("NFKC", text) for text in texts[:2]]
    assert (last[:2], last[-1]) == ("\u00e1\u0316", "b") and sorted(last[1:-1]) == sorted(texts[2][2:-1])


def test_tables_say_what_python_says_of_every_character():
    flags, categories = tables.flags(), tables.categories()
    for code in [*range(0x40000), *range(0x40000, 0x110000, 97), 0xE0001, 0x10FFFF]:
        character = chr(code)
        said = [bool(flags[code] & flag) for flag in (tables.SPACE, tables.WORD, tables.DIGIT)]
        assert said == [character.isspace(), character.isalnum() or character == "_", character.isdecimal()]
        assert chr(categories[code]) == unicodedata.category(character)[0]


@checked
@hypothesis.given(st.lists(st.lists(st.sampled_from(["a", "bc", "def", "ghij"]), max_size=60), min_size=1, max_size=3))
def test_repetition_of_words_equals_its_reference(documents):
    ids = {"a": 7, "bc": 1, "def": 3, "ghij": 2}
    words = [word for document in documents for word in document]
    symbols_T = np.array([ids[word] for word in words], np.uint32)
    ends_N = np.cumsum([len(document) for document in documents])
    found = repetition(symbols_T, np.array([len(word) for word in words], np.int64), ends_N)
    for i, document in enumerate(documents):
        plain = reference.repetition(document, [len(word) for word in document])
        assert {name: column[i] for name, column in found.items()} == pytest.approx(plain)


NAMES = st.text(st.sampled_from("abz09.-A_ ，,我\n/:w"), max_size=60)
LINKS = st.lists(st.sampled_from(["http://", "www.", "a.b.c", "..", ".com", "x-y", "我", "。", " ", "V1"]), max_size=14)


@checked
@hypothesis.given(st.one_of(NAMES, LINKS.map("".join), TEXTS))
def test_released_links_go_in_linear_time_as_its_expressions_say(text):
    assert rewrite.remove_links_as_released(text) == rewrite.reference_links(text)


@pytest.mark.parametrize("size", [500_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_megabytes_of_anything_are_measured_and_rewritten_in_time(size):
    """Each would take hours where time grows with the square of the length."""
    for unit in ("【", "a-", "a.", "(http://", "一二三四五", "\u0301"):
        text = unit * (size // len(unit.encode()))
        assert rewrite.remove_links(text) and rewrite.remove_links_as_released(text) is not None
        values = measures.measure("chinese", TextBatch([text], MEASURES))
        assert values["characters"][0] == len(unicodedata.normalize("NFKC", text))


def test_a_lone_surrogate_reaches_no_encoder():
    assert utf8("a\ud800b") == "a\ufffdb" and utf8("𠀀") == "𠀀"
