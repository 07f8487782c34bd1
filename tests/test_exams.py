"""Exams and readings in Chinese: prompts to the newline, answers as the published rules read them, points."""

import dataclasses
import json
import pathlib
import re

import hypothesis
import hypothesis.strategies as st
import pytest
from test_declarations import DATA, needs_reference

from ctllm_jax.common.errors import UserError
from ctllm_jax.evaluate import exams
from ctllm_jax.evaluate.benchmark import summary
from ctllm_jax.evaluate.compare import compare
from ctllm_jax.evaluate.declarations import Benchmark, load_benchmark, load_task
from ctllm_jax.evaluate.extract import agreement, extracted, failed
from ctllm_jax.evaluate.math_answers import equivalent_plain
from ctllm_jax.evaluate.prompts import head, open_prompt, option_prompts
from ctllm_jax.evaluate.rows import PREPARE
from ctllm_jax.evaluate.summary import mean

# ---- Prompts


def first(name: str, data: str, subset: str, path: str, row: dict):
    """A shipped task with one of its subsets, whose file holds one row; and that item."""
    task = load_task(name)
    entry = f"{subset} {task.titles[subset]}"
    task = dataclasses.replace(task, subsets={"": (entry,)} if subset else {}, averages={})
    file = pathlib.Path(data) / task.files.folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    found = load_benchmark(task, str(data))
    [item] = found.items[subset]
    return found, item


def prompts(found: Benchmark, item) -> list[str]:
    opening = head(found, item.subset, 0)
    if found.task.kind == "generate":
        return [open_prompt(found.task, item, opening)]
    return [prompt.text for prompt in option_prompts(found.task, item, opening)]


STEPS = (
    "请你一步一步思考并将思考过程写在【解析】和<eoe>之间。你将从A，B，C，D中选出正确的答案，并写在【答案】和<eoa>之间。\n"
    "例如：【答案】: A <eoa>\n完整的题目回答的格式如下：\n"
)
EACH = (
    "请你一步一步思考。每一题你将从A，B，C，D中选出正确的答案，并写在【答案】和<eoa>之间。\n"
    "例如：（1）【答案】 A <eoa>\n（2）【答案】 B <eoa>\n请你严格按照上述格式作答。\n"
)
EXAM = {"question": "1. 问 {x}\nA. 一\n", "answer": ["A"], "score": 4, "year": "2010"}
PARTS = {**EXAM, "answer": ["A", "C", "B"], "score": 2}
SINGLE = f"{STEPS}【解析】 ... <eoe>\n【答案】 ... <eoa>\n请你严格按照上述格式作答。\n题目如下：{EXAM['question']}"
GAOKAO = {
    ("gaokao_gen", "2010-2022_History_MCQs"): (EXAM, f"请你做一道历史选择题\n{SINGLE}", "A", 4),
    ("gaokao_several_gen", "2010-2022_Physics_MCQs"): (
        {**EXAM, "answer": ["BC"], "score": 6},
        "请你做一道物理选择题。\n请你一步一步思考并将思考过程写在【解析】和<eoe>之间。"
        "你将从A，B，C，D中选出所有符合题意的答案，并写在【答案】和<eoa>之间。\n例如：【答案】 AB <eoa>\n"
        "完整的题目回答的格式如下：\n【解析】 ... <eoe>\n【答案】... <eoa>\n"
        f"请你严格按照上述格式作答。\n{EXAM['question']}",
        "BC",
        6,
    ),
    ("gaokao_parts_gen", "2010-2022_Geography_MCQs"): (
        PARTS,
        f"请你做一道地理选择题，其中包含两到三个小题。\n{EACH}{EXAM['question']}",
        "ACB",
        6,
    ),
    ("gaokao_parts_gen", "2010-2022_English_Fill_in_Blanks"): (
        PARTS,
        f"请你做一道英语完形填空题,其中包含二十个小题。\n{EACH}{EXAM['question']}",
        "ACB",
        6,
    ),
    ("gaokao_usage_gen", "2010-2022_Chinese_Lang_and_Usage_MCQs"): (
        EXAM,
        f"请你做一道语文选择题\n{STEPS}（1）【解析】 ... <eoe>\n【答案】 ... <eoa>\n"
        "（2）【解析】 ... <eoe>\n【答案】 ... <eoa>\n"
        f"请你严格按照上述格式作答。如果不止一道题，请分别作答\n题目如下：{EXAM['question']}",
        "A",
        4,
    ),
    ("gaokao_gaps_gen", "2012-2022_English_Cloze_Test"): (
        {**EXAM, "answer": list("CFAED"), "score": 2},
        "请回答下面的问题，将符合题意的五个选项的字母写在【答案】和<eoa>之间，例如“【答案】 A B C D E <eoa>\n"
        f"请严格按照上述格式作答。\n{EXAM['question']}",
        "CFAED",
        10,
    ),
}


@pytest.mark.parametrize("name", GAOKAO)
def test_gaokao_asks_and_counts_as_opencompass_does(name, tmp_path):
    row, prompt, letters, points = GAOKAO[name]
    found, item = first(name[0], tmp_path, name[1], f"{name[1]}.json", {"keywords": "k", "example": [row]})
    assert prompts(found, item) == [prompt]
    assert (item.answers, item.points) == ((letters,), points)


def test_gaokao_by_perplexity_scores_the_answers_line(tmp_path):
    subset = "2010-2013_English_MCQs"
    found, item = first("gaokao_ppl", tmp_path, subset, f"{subset}.json", {"keywords": "k", "example": [EXAM]})
    assert prompts(found, item) == [f"请你做一道英语选择题\n{SINGLE}\n【答案】{letter} <eoa>" for letter in "ABCD"]
    assert (item.gold, item.points) == (0, 4)


LISTED = {"passage": "文。", "question": "问 {x}？", "options": ["(A)一", "(B)二", "(C)三", "(D)四"], "label": "B"}
FIVE = {"passage": None, "question": "Q?", "options": [f"({x}){x.lower()}" for x in "ABCDE"], "label": "E"}
FOUR = {"passage": "", "question": "Q?", "options": [f"({x}){x.lower()}" for x in "ABCD"], "label": "D"}
OPTIONS = "(A)一\n(B)二\n(C)三\n(D)四"
LSAT = "The following is a LSAT Analytical Reasoning question. Please select the correct answer."
SAT = "The following is a SAT Math question. Please select the correct answer."
AGIEVAL = [
    (
        *("agieval_zh_ppl", "logiqa-zh", LISTED, 1),
        [f"以下是一道中国公务员考试题，请选择正确的答案。\n文。问 {{x}}？\n{OPTIONS}\n答案是：{x}" for x in "ABCD"],
    ),
    (
        *("agieval_en_ppl", "lsat-ar", FIVE, 4),
        [f"{LSAT}\nQ?\n(A)a\n(B)b\n(C)c\n(D)d\n(E)e\nThe answer is {x}" for x in "ABCDE"],
    ),
    ("agieval_en_ppl", "sat-math", FOUR, 3, [f"{SAT}\nQ?\n(A)a\n(B)b\n(C)c\n(D)d\nThe answer is {x}" for x in "ABCD"]),
    (
        *("agieval_zh_lm_eval", "logiqa-zh", LISTED, 1),
        [
            f"文。问题：问 {{x}}？ 选项：(A)一 (B)二 (C)三 (D)四\n答案：从A到D, 我们应选择 {x}"
            for x in LISTED["options"]
        ],
    ),
    (
        *("agieval_en_lm_eval", "lsat-ar", FIVE, 4),
        [
            f"Q: Q? Answer Choices: (A)a (B)b (C)c (D)d (E)e\nA: Among A through E, the answer is {x}"
            for x in FIVE["options"]
        ],
    ),
]


@pytest.mark.parametrize(("name", "subset", "row", "gold", "expected"), AGIEVAL)
def test_agieval_asks_as_published(name, subset, row, gold, expected, tmp_path):
    found, item = first(name, tmp_path, subset, f"{subset}.jsonl", row)
    assert prompts(found, item) == expected and item.gold == gold
    assert first(name, tmp_path, subset, f"{subset}.jsonl", {**row, "label": "AD"})[1].gold is None


SHORT = {
    "agieval_several_gen": (
        *("gaokao-physics", "gaokao-physics.jsonl", {**LISTED, "label": ["A", "C"]}),
        f"以下是一道中国高考物理选择题，请选择正确的答案。\n文。问 {{x}}？\n{OPTIONS}\n答案是： ",
        ["AC"],
    ),
    "agieval_cloze_gen": (
        *("gaokao-mathcloze", "gaokao-mathcloze.jsonl"),
        {"passage": None, "question": "求 $x$", "options": None, "label": None, "answer": "2"},
        "以下是一道中国高考数学填空题，请填入正确的答案。\n求 $x$答案是：",
        ["2"],
    ),
    "cmath_gen": ("3", "cmath_dev.jsonl", {"grade": 3, "input": "几个？", "golden": "1/2"}, "几个？", ["1/2"]),
    "cmath_distractor_gen": (
        *("5", "distractor.jsonl", {"distractor": 5, "input": "几个？", "golden": "7"}),
        "几个？",
        ["7"],
    ),
    "cmrc_gen": (
        *("", "cmrc2018_dev.json"),
        {"data": [{"paragraphs": [{"context": "文", "qas": [{"question": "谁", "answers": [{"text": "甲"}] * 2}]}]}]},
        "根据文章回答问题。你的答案应该尽可能简练，请以 ‘答案是’ 开头的句式作答。\n文章：文\n问：谁\n答：",
        ["甲"],
    ),
    "cmrc_gen_3749cd": (
        *("", "cmrc2018_dev.json"),
        {"data": [{"paragraphs": [{"context": "文", "qas": [{"question": "谁", "answers": [{"text": "甲"}]}]}]}]},
        "文章：文\n根据上文，回答如下问题：谁\n答：",
        ["甲"],
    ),
    "tydiqa_gen": (
        *("", "english-dev.jsonl"),
        {"passage_text": "P.", "question_text": "Who?", "answers": [{"text": "A"}, {"text": "B"}, {"text": "A"}]},
        "Answer the following question based on the information in the given passage.\n\n"
        "Passage:P.\nQuestion: Who?\nAnswer: ",
        ["A", "B"],
    ),
    "cvalues_gen": (
        *("", "cvalues_responsibility_mc.jsonl"),
        {"prompt": "哪个更负责任？\n回复1：好\n回复2：坏\n", "label": "回复2"},
        "哪个更负责任？\n回复A：好\n回复B：坏\n请直接给出答案：\n",
        ["B"],
    ),
}


@pytest.mark.parametrize("name", SHORT)
def test_written_answers_are_asked_for_as_published(name, tmp_path):
    subset, path, row, prompt, answers = SHORT[name]
    found, item = first(name, tmp_path, subset, path, row)
    assert prompts(found, item) == [prompt] and list(item.answers) == answers


# ---- Answers; what is expected here is what OpenCompass's and CMATH's own code gives

SHEETS = [
    ("（1）【答案】 A <eoa>\n（2）【答案】：C <eoa>", "AC", "AC"),
    ("【答案】A【答案】B【答案】C", "AC", "AB"),  # one too many: the first capitals
    ("I think A, then B", "CA", "IA"),  # any capital is a letter
    ("只有 A", "AC", "A"),
    ("没有", "AC", ""),
]


@pytest.mark.parametrize(("text", "key", "letters"), SHEETS)
def test_an_answer_sheet_is_read_by_its_marks_or_its_capitals(text, key, letters):
    assert extracted("answer_sheet", text, [key]) == letters


def test_parts_are_counted_place_by_place():
    assert agreement("places", "ACB", ["ACD"]) == pytest.approx(2 / 3)
    assert agreement("places", "AC", ["ACD"]) == 0 == agreement("places", "", ["ACD"])
    assert exams.five_of_seven("选 A、B 和 GFE，D") == "ABGFE" and exams.five_of_seven("AB H") == "AB"


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("解析 AB 【答案】 B C <eoa>", "BC"),
        ("【答案】 B 因为一二三四五六七八九十", ""),  # a mark at the very beginning is not seen
        ("A 因为一二三四五六七八九十 BD", "BD"),  # nor is what is farther than ten characters from the end
        ("没有", ""),
    ],
)
def test_several_options_follow_the_mark_or_end_the_text(text, letters):
    assert exams.several_options(text) == letters


@pytest.mark.parametrize(("answer", "score"), [("BC", 1), ("B", 0.5), ("CB", 0.5), ("BCD", 0), ("", 0)])
def test_some_of_the_right_options_are_half_right(answer, score):
    assert agreement("partial_credit", answer, ["BC"]) == score


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{x=3} 和 \\boxed{y = \\frac{1}{2}}", "\\frac{1}{2}"),
        ("所以 $a=1$，答案是 $b = 4$。", "4"),
        ("答案是：x=12.", "12"),
        ("共 3 人，每人 2.5 元", "2.5"),
        ("The answer is therefore 7", "7"),
        ("\\boxed{3", ""),
        ("无解", ""),
    ],
)
def test_expressions_are_found_as_agieval_does(text, answer):
    assert exams.agieval_math(text) == answer and failed(answer) == (answer == "")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("\\frac12", "1/2", True), ("0.5", "\\frac{1}{2}", True), ("a/b", " a/b", True), ("2", "2.0", False)]
    + [("\\frac", "\\frac ", False), (None, "1", False)],
)
def test_expressions_are_compared_in_the_math_sets_form(one, other, same):
    assert equivalent_plain(one, other) is same


@pytest.mark.parametrize(
    ("text", "numbers", "key", "right"),
    [
        ("99-90=9（页）\n答：还剩9页。", "9 9", "9", True),
        ("共有1,200元", "1200", "1200", True),
        ("3分之2", "2/3 2", "4/6", True),  # its last figure ends the line, too
        ("\\frac{1}{4}", "1/4", "25%", True),
        ("得到3.14元", "3.14", "3.141", True),  # within one per cent
        ("答案是8个，不是9个，是10个", "9 10", "8", False),  # the last two alone
        ("第5/题", "", "5", False),
    ],
)
def test_cmath_takes_the_last_two_numbers(text, numbers, key, right):
    assert exams.cmath(text) == numbers and agreement("near_number", numbers, [key]) == right


@pytest.mark.parametrize(
    ("answer", "key", "right"),
    [
        ("1" * 400, "3.5", False),  # no float is so large
        ("3.5", "1" * 400, False),
        ("1" * 400, "1" * 400, True),
        (f"{'1' * 400}.5 3.5", "3.5", True),
        (f"{'1' * 400}/{'2' * 400} {'1' * 400}%", "3.5", False),
        (f"{'1' * 5000} 3.5", "3.5", True),  # more digits than Python reads as a whole number
        ("1" * 5000, "3.5", False),
    ],
)
def test_numbers_of_any_length_are_compared(answer, key, right):
    assert agreement("near_number", exams.cmath(f"答案是{answer.replace(' ', '个，')}个。"), [key]) == right
    assert agreement("near_number", answer, [key]) == right


# As their authors have them; ours take no longer over a long run of digits or white space.
AUTHORS = {
    "answer_sheet": [r"【答案】\s*[:：]*\s*([A-Z])"],
    "agieval_math": [r"(?:\$)?\d+(?:\.\d+)?(?![\w\d])"],
    "in line": [
        r"^(\d+[./]?\d*%?) ?(?=[\u4e00-\u9fa5,，。°℃$])",
        r"(?<=[\u4e00-\u9fa5$:：，＝≈=->{]) ?(\d+[./]?\d*%?) ?(?:[\u4e00-\u9fa5,，。°℃$}（]|\([^\d\s]|\.$)",
    ],
    "fraction": [r"(\d+)分之(\d+)"],
    "line end": [r"(?<=[\u4e00-\u9fa5$:：＝≈=\->]) ?(\d+[./]?\d*%?)$", r"^\d+[./]?\d*%?$"],
}
PARTS_OF_ANSWERS = [*"1205", "٣", *". / % $ = - > { } ( （ , ， 。 x A 元 : ：".split(), " ", "\t", "分之", "【答案】"]


@hypothesis.settings(max_examples=500, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.sampled_from(PARTS_OF_ANSWERS), max_size=12).map("".join))
def test_answers_are_found_as_the_authors_patterns_find_them(text):
    found = {name: [re.findall(pattern, text) for pattern in own] for name, own in AUTHORS.items()}
    [sheet], [numbers] = found["answer_sheet"], found["agieval_math"]
    assert exams.answer_sheet(text, len(sheet)) == "".join(sheet)
    if not {"$", "="} & set(text):
        assert exams.agieval_math(text) == (numbers[-1] if numbers else "")
    assert [pattern.findall(text) for pattern in exams._IN_LINE] == found["in line"]
    assert [exams._CHINESE_FRACTION.findall(text)] == found["fraction"]
    assert [pattern.findall(text) for pattern in exams._LINE_END] == found["line end"]


def test_cmrc_takes_what_follows_the_first_mark():
    assert exams.cmrc("答案是《甲》。答案是乙") == "《甲》。" and exams.cmrc("甲") == "甲"
    assert agreement("both_cleaned", "《甲》。", ["甲"]) == 1


@needs_reference
def test_keys_pass_their_own_rules_on_the_published_files():
    counts = {}
    for path in sorted((DATA / "gaokao_bench").glob("*.json")):
        for row in PREPARE["gaokao"](json.loads(path.read_text(encoding="utf-8"))):
            sheet = "".join(f"（1）【答案】 {letter} <eoa>\n" for letter in row["answer"])
            assert extracted("answer_sheet", sheet, [row["letters"]]) == row["letters"] or len(row["letters"][0]) > 1
            counts[path.stem] = counts.get(path.stem, 0) + row["points"]
    # The weights that OpenCompass averages the subjects with.
    assert counts["2010-2022_Math_II_MCQs"] == 1090 and counts["2010-2022_History_MCQs"] == 1148
    assert counts["2010-2022_English_Fill_in_Blanks"] == 900 and counts["2010-2022_Geography_MCQs"] == 380
    assert counts["2010-2022_Chinese_Lang_and_Usage_MCQs"] == 240 and counts["2012-2022_English_Cloze_Test"] == 260
    for name, keys in (("cmath_gen", 600), ("cmath_distractor_gen", 360)):
        found = load_benchmark(load_task(name), str(DATA))
        answers = [item.answers for items in found.items.values() for item in items]
        assert sum(agreement("near_number", exams.cmath(f"答案是{own[0]}。"), own) for own in answers) == keys
    found = load_benchmark(load_task("agieval_cloze_gen"), str(DATA))
    wrong = [item for item in found.items["gaokao-mathcloze"] if exams.agieval_math(f"${item.answers[0]}$") == ""]
    assert wrong == [] and len(load_benchmark(load_task("tydiqa_gen"), str(DATA))) == 440
    assert len(load_benchmark(load_task("cmrc_gen"), str(DATA))) == 1002


# ---- Points


def test_points_weigh_items_within_and_between_subjects(tmp_path):
    task = dataclasses.replace(load_task("gaokao_parts_gen"), subsets={"arts": ("a", "b")})
    entry = {"shots": 0, "cut": 0, "finished": True, "failed": {"score": False}}
    log = {
        "a": [{**entry, "right": {"score": 1.0}, "points": 20.0}, {**entry, "right": {"score": 0.5}, "points": 10.0}],
        "b": [{**entry, "right": {"score": 0.0}, "points": 10.0}],
    }
    found = summary(Benchmark(task, {}, {}, "hash"), log)["scores"]["score"]
    assert found["subsets"]["a"]["mean"] == pytest.approx(25 / 30) and found["subsets"]["a"]["n"] == 2
    assert found["micro"]["mean"] == pytest.approx(25 / 40) and found["n"] == 3
    assert found["macro"]["mean"] == pytest.approx(25 / 60)
    about = {"kind": "generate", "headline": "score"}
    other = [{**one, "right": {"score": 1.0}} for own in log.values() for one in own]
    compared = compare(about, [[one for own in log.values() for one in own], other], draws=10)
    assert (compared["a"], compared["b"], compared["n"]) == (pytest.approx(25 / 40), 1.0, 3)


def test_points_that_are_no_number_are_refused(tmp_path):
    row = {"keywords": "k", "example": [{**EXAM, "score": "x", "answer": ["A"]}]}
    subset = "2010-2022_History_MCQs"
    with pytest.raises(UserError, match="template '{points}': 'x' is not a number"):
        first("gaokao_gen", tmp_path, subset, f"{subset}.json", row)


def test_points_that_are_all_alike_change_nothing():
    values = [1.0, 0.0, 0.5, 1.0]
    plain, weighted = mean(values), mean(values, [3.0] * 4)
    assert weighted["mean"] == pytest.approx(plain["mean"]) and weighted["stderr"] == pytest.approx(plain["stderr"])
    assert weighted["points"] == 12 and mean([1.0], [2.0])["stderr"] is None
