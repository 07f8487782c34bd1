"""Answers taken from what models write: every case of OpenCompass, and what its own gold answers give."""

import gzip
import json
import re
import time

import hypothesis
import hypothesis.strategies as st
import pytest
from tiny_models import NO_REFERENCE, REFERENCE

from ctllm_jax.common.files import write_jsonl
from ctllm_jax.evaluate import extract, math_answers
from ctllm_jax.evaluate.extract import EXTRACTORS, agreement, failed
from ctllm_jax.evaluate.rows import PREPARE

checked = hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)

OURS = {
    "first_capital_postprocess": extract.first_capital,
    "last_capital_postprocess": extract.last_capital,
    "first_option_postprocess": extract.first_option,
    "last_option_postprocess": extract.last_option,
    "first_capital_postprocess_multi": extract.first_capitals,
    "general_postprocess": extract.cleaned,
    "gsm8k_postprocess": extract.gsm8k,
    "gsm8k_dataset_postprocess": lambda text: PREPARE["gsm8k"]({"answer": text})[0]["gold"],
    "math_postprocess": math_answers.final_answer,
    "math_postprocess_v2": math_answers.final_answer_v2,
    "humaneval_postprocess_v2": extract.humaneval_block,
    "humaneval_postprocess_v3": extract.humaneval_last_block,
    "humaneval_internal_v1_postprocess": extract.humaneval,
    "humaneval_internal_v2_postprocess": extract.humaneval_indented,
    "MBPPEvaluator._process_answer": extract.mbpp_2026,
    "humaneval_postprocess@2024-03": extract.humaneval_first,
    "humaneval_postprocess_v2@2024-03": extract.humaneval,
    "MBPPEvaluator._process_answer@2024-03": extract.mbpp,
}
# OpenCompass's evaluators: (extractor, match) of the tasks that are scored with them.
EVALUATORS = {
    "Gsm8kEvaluator": ("whole", "number"),
    "TriviaQAEvaluator": ("triviaqa", "contains"),
    "NQEvaluator": ("nq", "contains"),
    "SQuAD20Evaluator": ("squad2", "cleaned_lower"),
    "LambadaEvaluator": ("lambada", "cleaned"),
}


@needs_reference
def test_every_case_of_opencompass_comes_out_the_same():
    folder = REFERENCE / "opencompass"
    cases = json.loads((folder / "postprocess.json").read_text())
    cases += json.loads((folder / "era_2024-03.json").read_text())["cases"]
    extracted = 0
    for case in cases:
        if "input" in case:
            assert OURS[case["fn"]](case["input"], **case.get("kwargs", {})) == case["output"], case
            extracted += 1
        elif "pairs" in case:
            same = {"v1": math_answers.equivalent_v1, "v2": math_answers.equivalent_v2}[case["version"]]
            assert [same(*pair) for pair in case["pairs"]] == case["output"], case["version"]
        elif case["fn"] in EVALUATORS:
            extractor, match = EVALUATORS[case["fn"]]
            refs = [refs if isinstance(refs, list) else [refs] for refs in case["refs"]]
            answers = [EXTRACTORS[extractor](text) for text in case["preds"]]
            scores = [agreement(match, answer, accepted) for answer, accepted in zip(answers, refs, strict=True)]
            output = case["output"]
            assert 100 * sum(scores) / len(scores) == pytest.approx(output.get("score", output.get("accuracy")))
            if "details" in output:
                assert scores == [detail["correct"] for detail in output["details"]]
        else:
            assert case["fn"] == "TydiQAEvaluator"
            for match, name in (("both_cleaned", "exact_match"), ("overlap", "f1")):
                scores = [
                    agreement(match, EXTRACTORS["tydiqa"](text), refs)
                    for text, refs in zip(case["preds"], case["refs"], strict=True)
                ]
                assert 100 * sum(scores) / len(scores) == pytest.approx(case["output"][name])
    assert (len(cases), extracted) == (263, 255)


@needs_reference
def test_gold_answers_pass_their_own_extractors():
    def rows(path):
        with gzip.open(REFERENCE.parent / "eval" / path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    for row in rows("gsm8k/test.jsonl.gz"):
        [row] = PREPARE["gsm8k"](row)
        assert agreement("number", extract.gsm8k(f"The answer is {row['gold']}"), [row["gold"]]) == 1
        # A comma ends a number in OpenCompass's rule; the solutions themselves write 1,000.
        plain = row["answer"].replace(",", "")
        assert agreement("number", extract.gsm8k(plain), [row["gold"]]) == 1
        for extractor in ("gsm8k_strict", "gsm8k_flexible"):
            assert agreement("lm_eval_number", EXTRACTORS[extractor](row["answer"]), [row["answer"]]) == 1
    problems = [PREPARE["math"](row)[0] for row in rows("math/test.jsonl.gz")]
    wrong = [
        row["idx"]
        for row in problems
        if not agreement("math_v2", math_answers.final_answer_v2(row["solution"]), [row["gold"]])
    ]
    assert len(problems) == 5000 and wrong == []


def test_what_is_not_found_is_a_failure():
    assert failed(extract.first_option("没有")) and failed(extract.gsm8k("no")) and failed(extract.gsm8k_strict("7"))
    assert not failed(extract.gsm8k_flexible("7"))
    assert extract.gsm8k_flexible("it costs $1,234.50") == "$1,234.50"


def test_a_text_that_is_code_is_read_and_never_run():
    assert extract.humaneval("__import__('os').abort()") == "    __import__('os').abort()"
    assert extract.humaneval("'    return 1'") == "    return 1"


@pytest.mark.parametrize("text", ["{[]}", "{{}: 1}", "1" * 400 + "+1j", "1" * 5000, "(" * 1000, "1", "["])
def test_a_text_that_is_no_literal_stays_as_it_is(text):
    assert extract.humaneval(text) == "    " + text and extract.mbpp(text) == text


def test_a_literal_that_cannot_be_written_down_stays_as_it_is(tmp_path):
    text = "'x = \\ud83d'"
    assert extract.humaneval(text) == "    " + text and extract.humaneval("'\\ud83d\\ude00'") == "    '\\ud83d\\ude00'"
    assert extract.humaneval("'\\U0001f600'") == "    \U0001f600"
    write_jsonl(tmp_path / "log.jsonl", [{"mbpp": extract.mbpp(text), "humaneval": extract.humaneval(text)}])


def test_numbers_too_long_for_python_are_no_error():
    for match in ("number", "lm_eval_number", "math", "math_strict", "math_v1", "math_v2"):
        for digits in (400, 5000):
            for answer in ("1" * digits, "1" * digits + ".5", f"{'1' * digits}/{'1' * digits}"):
                assert agreement(match, answer, ["3"]) == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("a/b", "a/b", True), ("a/b", "b/a", False), ("\\sqrt", "\\sqrt", True), (None, None, True), (None, "1", False)],
)
def test_answers_without_a_normal_form_are_compared_as_they_are(one, other, same):
    assert math_answers.equivalent_v1(one, other) is same
    assert math_answers.equivalent_v2(one, other) is same


# ---- Long texts

# As OpenCompass has them, whose time grows with the third power of a text's white space.
PROGRAMS = (
    *(r"\[BEGIN\]\s*'(.*)'\s*\[DONE\]", r"BEGIN\s*'(.*)'\s*\[DONE\]", r"\[BEGIN\]\s*'(.*)'\s*DONE"),
    *(r"BEGIN\s*'(.*)'\s*DONE", r"\[BEGIN\]\s*'(.*)\s*\[DONE\]", r"BEGIN\s*'(.*)\s*\[DONE\]"),
    *(r"\[BEGIN\]\s*'(.*)\s*DONE", r"BEGIN\s*'(.*)\s*DONE", r"\[BEGIN\]\s*(.*)\s*\[DONE\]"),
    *(r"BEGIN\s*(.*)\s*\[DONE\]", r"\[BEGIN\]\s*(.*)\s*DONE", r"BEGIN\s*(.*)\s*DONE", r"```python\s*(.*)\s*```"),
    *(r"```\s*(.*)\s*```", r"```python\s*(.*)\s*$", r"```\s*(.*)\s*$", r"(.*)\s*```.*", r"\[BEGIN\]\s*'(.*)"),
    *(r"\[BEGIN\](.*)", r"'(.*)'\s*\[DONE\]"),
)
MARKS = ["[BEGIN]", "BEGIN", "[DONE]", "DONE", "'", "```", "```python", "`", "[", "]", " ", "\n", "\u3000", "x", "\\_"]


@checked
@hypothesis.given(st.lists(st.sampled_from(MARKS), max_size=14).map("".join))
def test_programs_are_found_as_the_published_patterns_find_them(text):
    match = next((found for pattern in PROGRAMS if (found := re.search(pattern, text, re.DOTALL))), None)
    program = (match.group(1) if match else text).split("```")[0]
    assert extract.mbpp_2026(text) == re.split(r"'?\s*\[?DONE\]?", program)[0].replace("\\_", "_").strip()


@checked
@hypothesis.given(st.text(st.sampled_from("1023..٣x \n"), max_size=12))
def test_decimals_that_are_whole_numbers_lose_their_zeros_as_published(text):
    published = re.sub(r"(\d+)\.0+$", r"\1", re.sub(r"(\d+)\.0+([^\d])", r"\1\2", text))
    assert math_answers._whole(text) == published


@pytest.mark.parametrize(
    ("extractor", "text"),
    [
        *(("mbpp_2026", start + " " * 4000 + end) for start in ("", "BEGIN", "```", "'") for end in ("", "x DONE")),
        *(("agieval_math", "1" * 16_000 + "x"), ("cmath", "是" + "1" * 16_000 + "x")),
        *(("answer_sheet", "【答案】" + " " * 40_000), ("whole", "1" * 40_000)),
    ],
)
def test_a_long_text_is_read_at_once(extractor, text):
    start = time.process_time()
    extract.extracted(extractor, text, ["A"])
    agreement("math_v2", text, ["A"])
    assert time.process_time() - start < 1
