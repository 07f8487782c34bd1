"""`ctllm eval` of a code task from its files to its scores: what a model writes is cut out, run and counted."""

import pytest
from test_benchmark import config_of
from test_declarations import DATA, needs_reference
from test_jail import needs_isolation
from tiny_models import tiny_model

from ctllm_jax.common.files import read_json, read_jsonl
from ctllm_jax.evaluate import benchmark as benchmarks
from ctllm_jax.evaluate import run as eval_verb
from ctllm_jax.evaluate.declarations import load_benchmark, load_task

LOOP = "    while True:\n        pass\n"


@needs_reference
@needs_isolation
@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_solutions_pass_loops_do_not_and_a_random_model_solves_nothing(chat, tmp_path, monkeypatch):
    model = tiny_model(max_length=2048)
    monkeypatch.setattr(eval_verb, "on_each_device", lambda model: [model])
    config = config_of(tmp_path, model, benchmarks=("humaneval_gen",), data=str(DATA), limit=3, chat=chat)
    items = load_benchmark(load_task("humaneval_gen"), str(DATA)).items[""][:3]
    answers = [item.fields["canonical_solution"] for item in items[:2]] + [LOOP]
    if chat:  # models tuned on conversations repeat the head, in a fence
        answers = [
            f"```python\n{item.fields['prompt']}{answer}\n```" for item, answer in zip(items, answers, strict=True)
        ]
    name = "humaneval_gen_chat" if chat else "humaneval_gen"

    def given(model, prompts, *, max_tokens, stop_ids, **sampling):
        """The answers as a model would write them; the loop does not end by itself."""
        ends = [[max(stop_ids)], [max(stop_ids)], []]
        return [[*model.tokenizer.encode(text), *end] for text, end in zip(answers, ends, strict=True)]

    with monkeypatch.context() as patch:
        patch.setattr(benchmarks, "generate", given)
        eval_verb.run(config, str(tmp_path / "given"))
    found = read_json(tmp_path / "given" / "scores.json")["benchmarks"][name]
    assert found["scores"]["accuracy"]["macro"]["mean"] == pytest.approx(2 / 3)
    assert (found["questions"], found["unfinished"], found["failed"]["accuracy"]) == (3, 1, 0)
    log = read_jsonl(tmp_path / "given" / "parts" / name / "all-0000.jsonl")
    assert [entry["right"]["accuracy"] for entry in log] == [1.0, 1.0, 0.0]
    assert [entry["text"] for entry in log] == answers

    found = eval_verb.run(config, str(tmp_path / "written"))["benchmarks"][name]
    assert found["scores"]["accuracy"]["macro"]["mean"] == 0.0 and found["unfinished"] == 3
