"""Open questions as they circulate, a model's answers to them, and that answers survive a kill."""

import collections

import pytest
from tiny_models import NO_REFERENCE, REFERENCE, tiny_model, write_jsonl

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_jsonl
from ctllm_jax.evaluate.judged import answers as verb
from ctllm_jax.evaluate.judged.answers import AnswerConfig, run
from ctllm_jax.evaluate.judged.question_sets import SHIPPED, read_questions
from ctllm_jax.evaluate.judged.run import read_answers
from ctllm_jax.sampling import SamplingConfig

JUDGED = REFERENCE.parent / "eval" / "judge"
needs_questions = pytest.mark.skipif(not JUDGED.exists(), reason=NO_REFERENCE)


@needs_questions
def test_mt_bench_align_bench_and_cvalues_as_published():
    for name in ("mt_bench_question", "mt_bench_zh_question"):
        questions = read_questions(str(JUDGED / f"{name}.jsonl"))
        assert len(questions) == 80 and all(len(question.turns) == 2 for question in questions)
        assert {question.temperature for question in questions} == {0.0, 0.1, 0.7}
    questions = read_questions(str(JUDGED / "alignbench_v1.1.jsonl.gz"))
    assert len(questions) == 683 and all(question.aspects and question.references for question in questions)
    questions = read_questions(str(JUDGED.parent / "cvalues" / "responsibility_prompts.jsonl"))
    assert len(questions) == 664 and all(len(question.turns) == 1 for question in questions)
    assert questions[0].category == "environmental_science"


def test_chc_bench_as_published(tmp_path):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").Table
    fields = {"source": "s", "type": "t", "multi_choice": "no"}
    for name in ("math", "coding"):
        rows = [{**fields, "category": name, "query": f"{name}{i}"} for i in range(2)]
        parquet.write_table(table.from_pylist(rows), tmp_path / f"{name}.parquet")
    questions = read_questions(str(tmp_path / "*.parquet"))
    assert [(question.id, question.category, question.turns) for question in questions] == [
        ("coding-1", "coding", ("coding0",)),
        ("coding-2", "coding", ("coding1",)),
        ("math-1", "math", ("math0",)),
        ("math-2", "math", ("math1",)),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there is no question"),
        ([{"prompt": "?"}], "question 1: of no known form; its fields are prompt"),
        ([{"id": "a", "category": "c", "turns": ["?"]}] * 2, "question 2: the id 'a' is there twice"),
        ([{"id": "a", "category": "c", "turns": [" "]}], "question a: a turn is empty"),
        ([{"id": "a", "category": "c", "turns": ["?"], "references": ["1", "2"]}], "2 references for 1 turns"),
        ([{"id": "a", "category": "c", "turns": []}], "needs an id, a category and a turn"),
        ([{"id": "a", "category": "c", "turns": 5}], "question 1: .*not iterable"),
        ([{"category": "c", "query": None}], "question 1: .*texts"),
    ],
)
def test_what_is_no_question_is_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_questions(str(write_jsonl(tmp_path / "set.jsonl", rows)))


def test_a_set_that_is_not_there():
    with pytest.raises(UserError, match="no file matches 'nosuchset'"):
        read_questions("nosuchset")


# ---- The set that ships

CATEGORIES = {"writing", "humanities", "science", "roleplay", "reading", "math", "hard_case", "coding"}


def test_our_own_set():
    questions = read_questions("bafang")
    count = collections.Counter(question.category for question in questions)
    assert count.keys() == CATEGORIES and min(count.values()) >= 15
    assert len({question.turns[0] for question in questions}) == len(questions)
    assert all(question.notes and len(question.turns) <= 2 for question in questions)
    free = {"writing", "roleplay"}  # many good answers: notes alone
    assert all(question.references or question.category in free for question in questions)
    assert all(all(text.strip() == text for text in (*q.turns, *q.references, q.notes)) for q in questions)
    assert any(len(question.turns) == 2 for question in questions)
    fields = {key for row in read_jsonl(SHIPPED / "bafang.jsonl") for key in row}
    assert fields == {"id", "category", "turns", "references", "notes"}


def test_reference_programs_do_what_is_asked(tmp_path):
    names: dict = {}
    for question in read_questions("bafang"):
        for reference in question.references:
            if question.category == "coding" and reference.startswith(("def ", "import ", "class ")):
                exec(reference.split("\n问题：")[0].split("\n循环 n 次")[0], names)
    assert names["is_palindrome"]("上海自来水来自海上。") and not names["is_palindrome"]("山东")
    numbers = {0: "零", 10: "十", 11: "十一", 105: "一百零五", 110: "一百一十", 1001: "一千零一", 1010: "一千零一十"}
    assert {n: names["chinese_number"](n) for n in numbers} == numbers and names["chinese_number"](2000) == "二千"
    assert names["phone_numbers"]("电话13912345678，编号139123456789") == ["13912345678"]
    (tmp_path / "text.txt").write_text("水，水\na火水", encoding="utf-8")
    assert names["top_characters"](tmp_path / "text.txt") == [("水", 3), ("火", 1)]
    stack = names["MinStack"]()
    for value in (2, 1, 1, 3):
        stack.push(value)
    assert [stack.pop(), stack.get_min(), stack.pop(), stack.pop(), stack.get_min(), stack.top()] == [3, 1, 1, 1, 2, 2]
    calls = []
    with pytest.raises(ZeroDivisionError):
        names["retry"](2, 0)(lambda: calls.append(1) or 1 / 0)()
    assert len(calls) == 3 and names["fib"](50) == 12586269025


# ---- Answers

QUESTIONS = [
    {"id": "one", "category": "甲", "turns": ["水？"], "notes": "要点"},
    {"id": "long", "category": "乙", "turns": ["长" * 300, "短"]},
    {"id": "two", "category": "甲", "turns": ["水？", "雪？"]},
]


def config(questions, seed: int = 0) -> AnswerConfig:
    return AnswerConfig("tiny", None, None, 1, str(questions), "", SamplingConfig(4, 0.7, 0, 1.0, seed))


def test_answers_turn_by_turn_and_the_same_after_a_kill(tmp_path, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(verb, "load_model", lambda *arguments: model)
    monkeypatch.setattr(verb, "BLOCK", 1)
    questions = write_jsonl(tmp_path / "set.jsonl", QUESTIONS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = run(config(questions), str(whole))
    rows = read_jsonl(whole / "answers.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in QUESTIONS]
    assert [len(row["answers"]) for row in rows] == [1, 2, 2]
    assert [row["overlong"] for row in rows] == [False, True, False]
    assert rows[1]["answers"] == ["", ""] and rows[0]["notes"] == "要点" and rows[0]["answers"][0]
    assert (result["questions"], result["turns"], result["overlong"]) == (3, 5, 1)

    blocks, real = [], verb.answer

    def cut_short(*arguments):
        blocks.append(arguments)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(verb, "answer", cut_short)
    with pytest.raises(KeyboardInterrupt):
        run(config(questions), str(killed))
    run(config(questions), str(killed))
    assert len(blocks) == 4  # the first two were not answered again
    assert (killed / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()

    own = read_answers(str(whole))
    assert own.model == result["model"] and list(own.rows) == [row["id"] for row in QUESTIONS]
    with pytest.raises(UserError, match="seed"):
        run(config(questions, seed=1), str(whole))
