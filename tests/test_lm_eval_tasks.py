"""lm-eval-harness's tasks that no recorded run covers, on rows of ours in the published forms (`lm_eval_rows.json`).

What they are compared with, lm-eval-harness 0.4.13 made of the same rows itself: `render_lm_eval.py` ran its
declarations, templates, filters and metrics, and wrote `lm_eval_rendered.json`.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from test_declarations import DATA, needs_reference
from test_jail import needs_isolation
from tiny_models import tiny_model, write_jsonl

from ctllm_jax.evaluate import benchmark as benchmarks
from ctllm_jax.evaluate.declarations import Benchmark, load_benchmark, load_task
from ctllm_jax.evaluate.engine import Score
from ctllm_jax.evaluate.extract import EXTRACTORS, MATCHES, extracted
from ctllm_jax.evaluate.prompts import head, open_prompt, option_prompts
from ctllm_jax.evaluate.summary import item_score, mean_f1

HERE = pathlib.Path(__file__).parent
ROWS = json.loads((HERE / "lm_eval_rows.json").read_text(encoding="utf-8"))
RENDERED = json.loads((HERE / "lm_eval_rendered.json").read_text(encoding="utf-8"))
PROGRAMS = ("humaneval_lm_eval", "mbpp_lm_eval")
WRITTEN = ("math_lm_eval", "nq_lm_eval", "squad2_lm_eval", "triviaqa_lm_eval", "tydiqa_lm_eval")
CHOSEN = sorted(set(RENDERED["tasks"]) - {*PROGRAMS, *WRITTEN})
CHANGES = {  # the rows are all of one file
    "mbpp_lm_eval": {"rows": ()},
    "triviaqa_lm_eval": {"subsets": {"evidence": ("web",)}},
}
SPLITS = {"validation": "validation", "dev": "validation", "test": "test"}  # our names of splits, and the harness's
DEFAULT_TOKENS = 256  # the harness's, where a task names none
METRICS = {"exact_match": "exact", "exact": "exact", "f1": "f1", "pass@1": "accuracy", "pass_at_1": "accuracy"}


def loaded(name: str, folder: pathlib.Path):
    """(our benchmark, its items with what the harness made of each)."""
    task = dataclasses.replace(load_task(name), **CHANGES.get(name, {}))
    path = folder / ROWS[name]["file"]
    path.parent.mkdir(parents=True)
    write_jsonl(path, ROWS[name]["rows"])
    if name == "piqa_lm_eval":
        (path.parent / "valid-labels.lst").write_text("".join(f"{row['label']}\n" for row in ROWS[name]["rows"]))
    found = load_benchmark(task, str(folder))
    items = [item for own in found.items.values() for item in own]
    return found, list(zip(items, RENDERED["tasks"][name]["items"], strict=True))


def test_the_harness_is_the_one_of_the_recorded_runs():
    assert RENDERED["version"] == "0.4.13" and set(RENDERED["tasks"]) == set(ROWS)


@pytest.mark.parametrize("name", CHOSEN)
def test_options_are_lm_evals_to_the_newline(name, tmp_path):
    found, pairs = loaded(name, tmp_path)
    assert found.task.shots is None and RENDERED["tasks"][name]["shots"] == 0
    assert SPLITS[found.task.split] == RENDERED["tasks"][name]["split"]
    for item, entry in pairs:
        prompts = option_prompts(found.task, item, head(found, item.subset, 0))
        texts = [[prompt.context, prompt.delimiter + prompt.continuation] for prompt in prompts]
        assert texts == entry["arguments"]


@pytest.mark.parametrize("name", CHOSEN)
def test_the_right_options_are_lm_evals(name, tmp_path):
    found, pairs = loaded(name, tmp_path)
    for item, entry in pairs:
        texts = [prompt.continuation for prompt in option_prompts(found.task, item, "")]
        for logprobs, marks in entry["marked"]:
            scores = [Score(logprob, 1, False, 0, logprob, 2) for logprob in logprobs]
            for norm, name_there in (("sum", "acc"), ("characters", "acc_norm")):
                values = [benchmarks.NORMS[norm](*one, None) for one in zip(scores, texts, strict=True)]
                picked = {"gold": item.gold, "picked": {norm: int(np.argmax(values))}}
                assert item_score("lm_eval", norm, picked) == marks.get(name_there, item_score("lm_eval", norm, picked))


@pytest.mark.parametrize("name", (*WRITTEN, *PROGRAMS))
def test_questions_and_stops_are_lm_evals_to_the_newline(name, tmp_path):
    found, pairs = loaded(name, tmp_path)
    task, count = found.task, RENDERED["tasks"][name]["shots"]
    assert (task.shots.count if task.shots else 0) == count
    assert SPLITS[task.split] == RENDERED["tasks"][name]["split"]
    for item, entry in pairs:
        assert open_prompt(task, item, head(found, item.subset, count)) == entry["prompt"]
        assert list(task.stop) == entry["settings"]["until"]
        assert task.max_tokens == entry["settings"].get("max_gen_toks", DEFAULT_TOKENS)


@pytest.mark.parametrize("name", [*WRITTEN, *(pytest.param(name, marks=needs_isolation) for name in PROGRAMS)])
def test_answers_are_marked_as_lm_eval_marks_them(name, tmp_path):
    found, pairs = loaded(name, tmp_path)
    for item, entry in pairs:
        for text, marks in entry["marked"]:
            for name_there, value in marks.items():
                metric = METRICS[name_there]
                answer = extracted(found.task.extract[metric], text, item.answers)
                assert benchmarks.judged(found.task, metric, [item], [answer], True) == [pytest.approx(value)], text


def test_the_mean_f1_of_the_options_is_lm_evals():
    task = load_task("cb_lm_eval")
    for pairs, value in RENDERED["tasks"]["cb_lm_eval"]["f1"]:
        entries = [{"picked": {"sum": picked}, "gold": gold} for picked, gold in pairs]
        assert mean_f1(entries, "sum", 3) == pytest.approx(value)
        more = {"options": list(task.options), "margins": {"sum": 1.0}, "shots": 0, "cut": 0}
        result = benchmarks.summary(Benchmark(task, {}, {}, "hash"), {"": [entry | more for entry in entries]})
        assert result["f1"] == pytest.approx(value)
    assert "f1" not in benchmarks.summary(
        Benchmark(load_task("rte_lm_eval"), {}, {}, "hash"), {"": [entries[0] | more]}
    )


def test_an_empty_answer_is_right_where_nothing_can_be_answered(tmp_path, monkeypatch):
    found, _ = loaded("squad2_lm_eval", tmp_path)
    model, log = tiny_model(max_length=1024), {}
    said = iter([" Vale\nQuestion", "", "\n", "\nof the coast"])

    def given(model, asked, **settings):
        """These answers, as a model would write them."""
        return [model.tokenizer.encode(next(said)) for _ in asked]

    monkeypatch.setattr(benchmarks, "generate", given)
    for subset, items in found.items.items():
        log[subset] = benchmarks.evaluate_block(model, found, subset, items, True, 1024)
    result = benchmarks.summary(found, log)
    exact = result["scores"]["exact"]
    assert [entry["text"] for own in log.values() for entry in own] == [" Vale", "", "", ""]
    assert {name: own["mean"] for name, own in exact["subsets"].items()} == {
        "answerable": pytest.approx(2 / 3),  # of one, all that is accepted is an article
        "unanswerable": 1.0,
    }
    assert exact["micro"]["mean"] == pytest.approx(3 / 4) and result["failed"] == {"exact": 1, "f1": 1}


def test_boolq_as_first_published_has_the_passages_of_superglue(tmp_path):
    (tmp_path / "boolq").mkdir()
    row = {"question": "is the moon a star", "title": "Moon", "answer": False, "passage": "It turns {slowly}."}
    write_jsonl(tmp_path / "boolq" / "dev.jsonl", [row])
    found = load_benchmark(load_task("boolq_lm_eval"), str(tmp_path))
    [item] = found.items[""]
    assert option_prompts(found.task, item, "")[0].context.startswith("Moon -- It turns {slowly}.\nQuestion: ")
    assert item.gold == 0


@needs_reference
def test_own_answers_of_the_published_files_are_right():
    for name, rows in {"arc_c_lm_eval": 1150, "obqa_lm_eval": 500, "csqa_lm_eval": 1221, "siqa_lm_eval": 1954}.items():
        assert len(load_benchmark(load_task(name), str(DATA))) == rows
    for name, rows in {"squad2_lm_eval": 6078, "tydiqa_lm_eval": 440, "math_lm_eval": 5000}.items():
        found = load_benchmark(load_task(name), str(DATA))
        task, items = found.task, [item for own in found.items.values() for item in own]
        assert len(items) == rows
        for metric, extractor in task.extract.items():
            match = MATCHES[task.matches.get(metric, task.match)]
            wrong = [item.id for item in items if not match(EXTRACTORS[extractor](item.answers[0]), item.answers[0])]
            assert wrong == [], (name, metric)
