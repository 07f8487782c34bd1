"""Declared tasks scored: OpenCompass's and lm-eval-harness's numbers on the same items and the same tiny models."""

import collections
import dataclasses
import json
import math
import random

import numpy as np
import pytest
from test_declarations import DATA, needs_reference, opencompass, reference
from tiny_models import REFERENCE

from ctllm_jax.evaluate import benchmark as benchmarks
from ctllm_jax.evaluate.declarations import load_benchmark, load_task
from ctllm_jax.evaluate.encoding import encode_open, encode_options
from ctllm_jax.evaluate.scoring import windows
from ctllm_jax.evaluate.summary import average, mean, perplexity
from ctllm_jax.loading import load_model

BATCH = 4096
LM_EVAL = {
    "hellaswag": "hellaswag_lm_eval",
    "cn_hellaswag": "cn_hellaswag_lm_eval",
    "piqa": "piqa_lm_eval",
    "winogrande": "winogrande_lm_eval",
    "xcopa_zh": "xcopa_zh_lm_eval",
    "gsm8k": "gsm8k_lm_eval",
    "lambada_like": "lambada_lm_eval",
    "docs_ppl": "documents_zh",
    "docs_en_ppl": "documents_zh",
}
# What the reference runs have otherwise than the shipped tasks.
CHANGES = {
    "xcopa_zh": {"question": "{premise}{connector}", "delimiter": "", "split": "validation"},
    "gsm8k": {"max_tokens": 48},
    "cmmlu_ancient_chinese": {"subsets": {"": ("ancient_chinese 文言文",)}},
}
FILES = {"lambada_like": "lambada_like.jsonl", "docs_ppl": "docs_zh.jsonl", "docs_en_ppl": "docs_en.jsonl"}


def model_of(name: str, max_length: int = 2048):
    model = load_model(str(REFERENCE / name))
    return dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=max_length))


def lm_eval_benchmark(name: str):
    """(our benchmark, subset) of a reference task `g_...`."""
    name, subset = name.removeprefix("g_"), ""
    task = load_task(LM_EVAL[name]) if name in LM_EVAL else None
    for family in ("ceval", "cmmlu", "mmlu"):
        if task is None and name.startswith(f"{family}_"):
            task, subset = load_task(f"{family}_lm_eval"), name.removeprefix(f"{family}_")
            one = {"subsets": {"": (f"{subset} {task.titles[subset]}",)}, "averages": {}}
            task = dataclasses.replace(task, **one)
    data = DATA
    if name in FILES:
        data = REFERENCE / "lm_eval_tasks"
        files = dataclasses.replace(task.files, folder="data", splits={task.split: (FILES[name],)})
        task = dataclasses.replace(task, files=files)
    return load_benchmark(dataclasses.replace(task, **CHANGES.get(name, {})), str(data)), subset


def by_task(run: str) -> dict[str, list[dict]]:
    found = collections.defaultdict(list)
    for entry in reference(f"lm_eval/{run}.samples.jsonl.gz"):
        found[entry["task"]].append(entry)
    return found


# ---- OpenCompass


@needs_reference
def test_a_few_tasks_score_as_in_opencompass():
    check_opencompass(["cmmlu-agronomy@041cbf", "winogrande", "csl"])


@needs_reference
@pytest.mark.slow
def test_every_option_scores_as_in_opencompass():
    assert check_opencompass(None) == 19 * 12


def check_opencompass(names: list[str] | None) -> int:
    """How many items agree, of the named tasks or of all."""
    model, checked = model_of("tiny_mha"), 0
    tasks = collections.defaultdict(list)
    for entry in reference("opencompass/ppl.jsonl.gz"):
        tasks[entry["task"]].append(entry)
    accuracies = json.loads((REFERENCE / "opencompass" / "summary.json").read_text())["tasks"]
    for name, entries in tasks.items():
        if names is not None and name not in names:
            continue
        checked += len(entries)
        found, subset = opencompass(name)
        items = [found.items[subset][entry["idx"]] for entry in entries]
        log = benchmarks.evaluate_block(model, found, subset, items, True, BATCH)
        headline = benchmarks.HEADLINE[found.task.kind]
        for ours, entry in zip(log, entries, strict=True):
            assert ours["lengths"] == entry["n_tokens"]
            if headline == "ppl":
                scores = [-total / n for total, n in zip(ours["whole_logprobs"], ours["lengths"], strict=True)]
                np.testing.assert_allclose(scores, entry["scores"], rtol=0, atol=1e-5)
            else:
                np.testing.assert_allclose(ours["logprobs"], entry["scores"], rtol=0, atol=2e-4)
            if ours["margins"][headline] > 1e-5:
                assert found.task.names[ours["picked"][headline]] == entry["pred"], name
        result = benchmarks.summary(found, {subset: log})
        if not result["close"]:
            assert 100 * result["scores"][headline]["macro"]["mean"] == pytest.approx(accuracies[name]["accuracy"])
    return checked


# ---- lm-eval-harness


RUNS = [  # the last number: how many items and documents the run holds
    ("tiny_mha", "mha_all", True, 2048, 573 + 16),
    ("tiny_gqa", "gqa_all", True, 2048, 573 + 16),
    ("tiny_mha", "mha_nobos", False, 2048, 79 + 8),
    ("tiny_mha", "mha_maxlen256", True, 256, 59 + 8),
]
each_run = pytest.mark.parametrize(("checkpoint", "run", "bos", "max_length", "items"), RUNS)


@needs_reference
@each_run
def test_prompts_and_ids_are_those_of_lm_eval(checkpoint, run, bos, max_length, items):
    model = model_of(checkpoint, max_length)
    for name, entries in by_task(run).items():
        found, subset = lm_eval_benchmark(name)
        if found.task.kind not in ("rolling", "generate"):
            check_ids(model, found, subset, found.items[subset][: len(entries)], entries, bos)


@needs_reference
def test_a_few_samples_of_lm_eval_agree():
    check_lm_eval(*RUNS[0][:4], ["g_cmmlu_agronomy", "g_lambada_like"])
    check_lm_eval(*RUNS[3][:4], ["g_mmlu_abstract_algebra", "g_docs_ppl"])


@needs_reference
@pytest.mark.slow
@each_run
def test_every_sample_of_lm_eval_agrees(checkpoint, run, bos, max_length, items):
    assert check_lm_eval(checkpoint, run, bos, max_length, None) == items


def check_lm_eval(checkpoint, run, bos, max_length, names) -> int:
    """How many items agree, of the named tasks or of all."""
    model, checked = model_of(checkpoint, max_length), 0
    golden = json.loads((REFERENCE / "lm_eval" / f"{run}.json").read_text())["results"]
    for name, entries in by_task(run).items():
        if names is not None and name not in names:
            continue
        found, subset = lm_eval_benchmark(name)
        if found.task.kind == "rolling":
            check_documents(model, found, entries, golden[name], twice=bos)
            checked += len(entries)
            continue
        items = found.items[subset][: len({entry["doc_id"] for entry in entries})]
        checked += len(items)
        if found.task.kind == "generate":
            check_written(model, found, items, entries, golden[name])
            continue
        log = benchmarks.evaluate_block(model, found, subset, items, bos, BATCH)
        for ours, entry in zip(log, entries, strict=True):
            expected = [reply[0] for reply in entry["resps"]]
            np.testing.assert_allclose(ours["logprobs"], [e[0] for e in expected], rtol=0, atol=2e-4)
            assert ours["is_greedy"] == [e[1] for e in expected]
        check_metrics(benchmarks.summary(found, {subset: log}), log, entries, golden[name])
    return checked


def check_ids(model, found, subset, items, entries, bos):
    encoded = encode_options(model, found, subset, items, bos)
    for own, entry, item in zip(encoded, entries, items, strict=True):
        texts = [[prompt.context, prompt.delimiter + prompt.continuation] for prompt in own.prompts]
        assert texts == entry["arguments"]
        if found.task.options[0] == "{option1}":  # winogrande: the target is a text
            assert item.fields["tail"] == entry["target"]
        elif item.gold is not None:
            assert item.gold == entry["target"]
        for request, (length, ids), context in zip(
            own.requests, entry["ctxlen_and_cont_ids"], entry["ctx_ids"], strict=True
        ):
            start = request.start
            assert list(request.ids[start:]) == ids and start + request.cut == length
            if context is not None:
                assert list(request.ids[:start]) == context[request.cut :]


def check_metrics(result, log, entries, golden):
    for norm, name in (("sum", "acc"), ("characters", "acc_norm"), ("bytes", "acc_bytes"), ("greedy", "acc")):
        if norm not in result["scores"] or f"{name},none" not in golden:
            continue
        if norm in log[0]["picked"] and any(ours["margins"][norm] < 1e-4 for ours in log):
            continue
        found = result["scores"][norm]
        assert found["micro"]["mean"] == pytest.approx(golden[f"{name},none"])
        assert found["micro"]["stderr"] == pytest.approx(golden[f"{name}_stderr,none"])
        if norm in log[0]["picked"]:
            right = [float(ours["picked"][norm] == ours["gold"]) for ours in log]
            assert right == [entry[name] for entry in entries]
    if "perplexity" in result:
        assert result["perplexity"]["mean"] == pytest.approx(golden["perplexity,none"], rel=1e-4)
        thousand = perplexity([ours["logprobs"][0] for ours in log], 1000)  # draws of the reference run
        assert thousand["stderr"] == pytest.approx(golden["perplexity_stderr,none"], rel=1e-4)


def check_documents(model, found, entries, golden, twice):
    """`twice`: lm-eval-harness gives the opening id twice and predicts the second, which our tasks do not."""
    with pytest.MonkeyPatch.context() as patch:
        if twice:
            patch.setattr(benchmarks, "windows", opened_twice)
        log = benchmarks.evaluate_block(model, found, "", found.items[""], False, BATCH)
    for ours, entry in zip(log, entries, strict=True):
        assert ours["logprob"] == pytest.approx(entry["resps"][0][0], rel=1e-6)
        assert [ours["bytes"]] == entry["bits_per_byte"][1:]
        if "word_perplexity" in entry:
            assert [ours["words"]] == entry["word_perplexity"][1:]
    result, figures = benchmarks.summary(found, {"": log}), ["bits_per_byte", "byte_perplexity"]
    for name in figures + ["word_perplexity"] * ("word_perplexity,none" in golden):
        assert result[name] == pytest.approx(golden[f"{name},none"], rel=1e-4 if name == "word_perplexity" else 1e-6)


def opened_twice(model, ids, opening):
    return windows(model, [opening, *ids], opening)


def check_written(model, found, items, entries, golden):
    prompts = encode_open(model, found, "", items, True)
    log = benchmarks.evaluate_block(model, found, "", items, True, BATCH)
    for ours, (prompt, _, _, _), item in zip(log, prompts, items, strict=True):
        for metric, name in (("strict", "strict-match"), ("flexible", "flexible-extract")):
            [entry] = [e for e in entries if e["filter"] == name and f"/{e['doc_id']}" == f"/{item.id}"]
            assert prompt == entry["arguments"][0][0] == ours["prompt"]
            assert ours["text"] == entry["resps"][0][0]
            assert ours["extracted"][metric] == entry["filtered_resps"][0]
            assert ours["right"][metric] == entry["exact_match"]
    result = benchmarks.summary(found, {"": log})
    for metric, name in (("strict", "strict-match"), ("flexible", "flexible-extract")):
        micro = result["scores"][metric]["micro"]
        assert micro["mean"] == golden[f"exact_match,{name}"]
        assert micro["stderr"] == golden[f"exact_match_stderr,{name}"]
    invalid = [e["filter"] for e in entries if e["filtered_resps"][0] == "[invalid]"]
    assert result["failed"] == {"strict": invalid.count("strict-match"), "flexible": invalid.count("flexible-extract")}


# ---- Averages


def test_averages_of_groups_and_their_errors():
    first, second = mean([1, 1, 0]), mean([1, 0])
    found = average([first, second])
    assert found["macro"]["mean"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["micro"]["mean"] == pytest.approx(3 / 5)
    variances = (2 / 3 * 1 / 3 / 2, 1 / 2 * 1 / 2 / 1)
    assert found["macro"]["stderr"] == pytest.approx(math.sqrt(sum(variances)) / 2)
    pooled = (2 * variances[0] * 3 + 1 * variances[1] * 2) / (5 - 2)
    assert found["micro"]["stderr"] == pytest.approx(math.sqrt(pooled / 5))
    assert average([mean([1])])["micro"]["stderr"] is None


def test_the_bootstrap_draws_as_pythons_generator_does():
    values = [-1.0, -2.5, -0.25, -3.0, -0.5, -7.0, -2.0]
    draws = []
    for seed in range(100):
        own = random.Random(seed)
        draws += [math.exp(-np.mean(own.choices(values, k=len(values)))) for _ in range(1000)]
    assert perplexity(values)["stderr"] == pytest.approx(float(np.std(draws, ddof=1)), rel=1e-9)
