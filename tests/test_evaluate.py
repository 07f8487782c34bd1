"""Scores: equal to lm-eval-harness, to sums by hand, and to themselves in any order."""

import dataclasses
import gzip
import json
import math

import jax
import numpy as np
import pytest
from tiny_models import NO_REFERENCE, REFERENCE, TEXT, tiny_model, write_jsonl
from tiny_stores import write_store

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.record import Row
from ctllm_jax.evaluate import run as eval_verb
from ctllm_jax.evaluate.choice import accuracies, evaluate_choice
from ctllm_jax.evaluate.devices import on_each_device
from ctllm_jax.evaluate.perplexity import PerplexityConfig, perplexity
from ctllm_jax.evaluate.questions import LETTERS, load_task, render
from ctllm_jax.evaluate.run import EvalConfig
from ctllm_jax.evaluate.scoring import encode_pair, rolling, score
from ctllm_jax.hf_export import export
from ctllm_jax.loading import load_model
from ctllm_jax.model import forward
from ctllm_jax.sampling import SamplingConfig

needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def samples(name: str) -> list[dict]:
    with gzip.open(REFERENCE / "lm_eval" / f"{name}.samples.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def random_requests(model, count: int) -> list[tuple[list[int], list[int]]]:
    random = np.random.default_rng(0)
    ids = lambda n: random.integers(4, model.config.vocab_size, n).tolist()  # noqa: E731
    return [(ids(random.integers(1, 45)), ids(random.integers(1, 15))) for _ in range(count)]


# ---- Log-likelihoods


def test_a_score_is_the_sum_of_the_models_log_probabilities(model):
    requests = random_requests(model, 12)
    run = jax.jit(forward, static_argnums=0)
    for (context, continuation), found in zip(requests, score(model, requests, 256), strict=True):
        ids = np.zeros((1, 64), np.int32)
        n = len(context) + len(continuation)
        ids[0, :n] = context + continuation
        real = (np.arange(64) < n).astype(np.int32)[None]
        logits = run(model.config, model.params, ids, np.arange(64, dtype=np.int32)[None], real)[0]
        logprob_LV = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
        steps = list(zip(range(len(context) - 1, n - 1), continuation, strict=True))
        assert found.sum_logprob == pytest.approx(sum(logprob_LV[t, i] for t, i in steps), abs=1e-4)
        assert found.is_greedy == all(np.argmax(logprob_LV[t]) == i for t, i in steps)
        assert (found.tokens, found.cut) == (len(continuation), 0)


def test_scores_are_the_same_bits_in_any_order_and_near_for_any_batch_size(model):
    requests = random_requests(model, 30)
    scores = score(model, requests, 256)
    backwards = score(model, requests[::-1], 256)[::-1]
    assert backwards == scores
    for batch_tokens in (1, 100, 4096):
        for one, other in zip(scores, score(model, requests, batch_tokens), strict=True):
            assert one.sum_logprob == pytest.approx(other.sum_logprob, abs=1e-4)


def test_a_context_that_does_not_fit_loses_its_beginning_and_is_counted(model):
    random = np.random.default_rng(0)
    context = random.integers(4, 300, 100).tolist()
    long, short = score(model, [(context, [50, 51]), (context[-63:], [50, 51])], 256)
    assert (long.cut, short.cut) == (37, 0)
    assert long.sum_logprob == short.sum_logprob


def test_rolling_windows_predict_every_token_once(model):
    document = np.random.default_rng(0).integers(4, 300, 150).tolist()
    [found] = rolling(model, [document], 1, 256)
    opened = [1, *document]
    parts = [(opened[:1], opened[1:65]), (opened[64:65], opened[65:129]), (opened[86:129], opened[129:151])]
    assert found.tokens == 150
    assert found.sum_logprob == pytest.approx(sum(s.sum_logprob for s in score(model, parts, 256)), abs=1e-4)


@pytest.mark.parametrize("request_", [([], [5]), ([5], []), ([5], [6] * 65), ([400], [5])])
def test_requests_that_cannot_be_scored_are_refused(model, request_):
    with pytest.raises(UserError):
        score(model, [request_], 256)


def test_white_space_before_a_continuation_belongs_to_it(model):
    for bos in (True, False):
        assert encode_pair(model.tokenizer, "The quick ", "brown", bos) == encode_pair(
            model.tokenizer, "The quick", " brown", bos
        )
    assert encode_pair(model.tokenizer, "", "山", False)[0] == [model.tokenizer.bos_id]


# ---- Multiple choice


def write_task(folder, rows, **changes):
    write_jsonl(folder / "questions.jsonl", rows)
    task = {
        "name": "toy",
        "file": "questions.jsonl",
        "description": "",
        "prompt": "{question}\n{options}\n答案：",
        "delimiter": " ",
        "choice": "{letter}",
        "shots": 0,
        "shots_file": None,
        **changes,
    }
    path = folder / f"{task['name']}.json"
    path.write_text(json.dumps(task, ensure_ascii=False), encoding="utf-8")
    return str(path)


QUESTIONS = [
    {"id": "a", "question": "山里有什么？", "choices": ["庙", "海里的鱼"], "answer": 0, "language": "zh"},
    {"id": "b", "question": "首都是？", "choices": ["北京", "上海", "dog"], "answer": "A", "language": "zh"},
    {"id": "c", "question": "A fox is", "choices": ["quick", "a city {x}"], "answer": 1, "language": "en"},
]


@needs_reference
def test_a_declared_task_gives_the_prompts_and_scores_of_lm_eval(tmp_path):
    data = REFERENCE / "lm_eval_tasks" / "data"
    model = load_model(str(REFERENCE / "tiny_mha"))

    def convert(name):
        rows = [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]
        return [
            {
                "question": row["question"].strip(),
                "choices": [row[x] for x in "ABCD"],
                "answer": row["answer"],
            }
            for row in rows
        ]

    write_jsonl(tmp_path / "dev.jsonl", convert("ceval_college_physics_dev.jsonl"))
    path = write_task(
        tmp_path,
        convert("ceval_college_physics_val.jsonl"),
        description="以下是中国关于大学物理的单项选择题，请选出其中的正确答案。",
        shots=5,
        shots_file="dev.jsonl",
    )
    loaded = load_task(path)
    result, log = evaluate_choice(model, loaded, bos=True, batch_tokens=2048)
    entries = [entry for entry in samples("mha_all") if entry["task"] == "g_ceval_college_physics"]
    assert len(entries) == len(log)
    for entry, ours in zip(entries, log, strict=True):
        assert [ours["prompt"]] * 4 == [context for context, _ in entry["arguments"]]
        assert ours["answer"] == entry["target"]
        np.testing.assert_allclose(ours["logprobs"], [r[0][0] for r in entry["resps"]], rtol=0, atol=2e-4)
    results = json.loads((REFERENCE / "lm_eval" / "mha_all.json").read_text())["results"]
    golden = results["g_ceval_college_physics"]
    for norm, name in (("sum", "acc"), ("characters", "acc_norm")):
        micro = result["accuracy"][norm]["micro"]
        assert micro["mean"] == pytest.approx(golden[f"{name},none"])
        assert micro["stderr"] == pytest.approx(golden[f"{name}_stderr,none"])


def test_each_norm_divides_by_its_own_length(model, tmp_path):
    loaded = load_task(write_task(tmp_path, QUESTIONS, choice="{choice}", prompt="{question}"))
    result, log = evaluate_choice(model, loaded, bos=True, batch_tokens=256)
    for entry in log:
        lengths = {
            "sum": [1] * len(entry["choices"]),
            "characters": [len(text) for text in entry["choices"]],
            "bytes": [len(text.encode()) for text in entry["choices"]],
            "tokens": entry["tokens"],
        }
        for norm, divisors in lengths.items():
            assert entry["picked"][norm] == int(np.argmax(np.array(entry["logprobs"]) / divisors))
    assert [entry["answer"] for entry in log] == [0, 0, 1]
    assert sorted(result["accuracy"]["sum"]["groups"]) == ["en", "zh"]


def test_macro_and_micro_averages_and_their_errors():
    found = accuracies([True, True, False, True, False], ["zh", "zh", "zh", "en", "en"])
    assert found["micro"]["mean"] == pytest.approx(3 / 5)
    assert found["micro"]["stderr"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert found["macro"]["mean"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    variances = (2 / 3 * 1 / 3 / 2, 1 / 2 * 1 / 2 / 1)
    assert found["macro"]["stderr"] == pytest.approx(math.sqrt(sum(variances)) / 2)


def test_options_and_shots_are_rendered_as_declared(tmp_path):
    write_jsonl(tmp_path / "dev.jsonl", QUESTIONS[:1])
    changes = {"description": "选一个。", "shots": 1, "shots_file": "dev.jsonl"}
    loaded = load_task(write_task(tmp_path, QUESTIONS, **changes))
    prompt, choices = render(loaded, loaded.questions[2])
    assert prompt == (
        "选一个。\n\n山里有什么？\nA. 庙\nB. 海里的鱼\n答案： A\n\nA fox is\nA. quick\nB. a city {x}\n答案："
    )
    assert choices == list(LETTERS[:2])


def test_the_protocol_hash_changes_with_anything_that_decides_the_requests(tmp_path):
    base = load_task(write_task(tmp_path, QUESTIONS)).protocol
    assert load_task(write_task(tmp_path, QUESTIONS)).protocol == base
    assert load_task(write_task(tmp_path, QUESTIONS, delimiter="")).protocol != base
    assert load_task(write_task(tmp_path, QUESTIONS[:2])).protocol != base


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"question": "x", "choices": ["a"], "answer": 0}], {}, "entry 1: choices"),
        ([{"question": "x", "choices": ["a", ""], "answer": 0}], {}, "entry 1: a choice"),
        ([{"question": "x", "choices": ["a", "b"], "answer": "C"}], {}, "answer 'C'"),
        ([{**QUESTIONS[0]}, {**QUESTIONS[0]}], {}, "same id"),
        ([], {}, "no questions"),
        (QUESTIONS, {"shots": 2}, "no shots_file"),
        (QUESTIONS, {"prompt": "{missing}"}, "missing"),
        (QUESTIONS, {"surplus": 1}, "surplus"),
    ],
)
def test_faulty_tasks_are_refused_with_the_place_of_the_fault(tmp_path, rows, changes, message):
    with pytest.raises(UserError, match=message):
        loaded = load_task(write_task(tmp_path, rows, **changes))
        render(loaded, loaded.questions[0])


# ---- Perplexity


def store_of_text(folder, tokenizer):
    """A token store of a few rows, some packed."""

    def row(texts):
        parts = [[tokenizer.bos_id, *tokenizer.encode(text)[:22], tokenizer.eos_id] for text in texts]
        size = sum(len(text.encode()) for text in texts)
        names = [str(n) for n in range(len(parts))]
        return Row(np.concatenate(parts).astype(np.int32), [len(ids) for ids in parts], names, None, size)

    single = [row([text]) for text in TEXT]
    rows = {
        "train": {"zh": single[:2] + single[3:], "en": single[2:3]},
        "validation": {"zh": [row(TEXT[:2]), row(TEXT[3:])], "en": single[2:3]},
    }
    return write_store(folder, rows, "pretrain", 48, shards=1)


def test_perplexity_and_its_baseline_equal_sums_over_single_documents(model, tmp_path):
    store = store_of_text(tmp_path, model.tokenizer)
    config = PerplexityConfig(store=str(tmp_path), split="validation", rows=100, baseline_rows=100)
    found = perplexity(on_each_device(model)[:2], store, config, batch_tokens=100)

    def documents(split, source):
        for index in range(store.size(split, source)):
            row = store.row(split, source, index)
            ends = np.cumsum(row.lengths)
            yield from ((row.tokens[end - n : end].tolist(), row) for end, n in zip(ends, row.lengths, strict=True))

    counts = np.ones(model.config.vocab_size)
    for source in store.sources("train"):
        for ids, _ in documents("train", source):
            for i in ids[1:]:
                counts[i] += 1
    bits = {}
    for source in ("zh", "en"):
        own = list(documents("validation", source))
        nats = -sum(s.sum_logprob for s in score(model, [(ids[:1], ids[1:]) for ids, _ in own], 256))
        unigram = -sum(np.log(counts[i] / counts.sum()) for ids, _ in own for i in ids[1:])
        predicted = sum(len(ids) - 1 for ids, _ in own)
        text_bytes = sum(row.bytes for row in store.rows("validation", source))
        figures = found[source]
        assert (figures["tokens"], figures["bytes"]) == (predicted, text_bytes)
        assert figures["nats_per_token"] == pytest.approx(nats / predicted, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(nats / predicted), rel=1e-4)
        assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
        assert figures["unigram_bits_per_byte"] == pytest.approx(unigram / math.log(2) / text_bytes, rel=1e-9)
        bits[source] = (nats, unigram, predicted, text_bytes)
    nats, unigram, predicted, text_bytes = map(sum, zip(*bits.values(), strict=True))
    assert found["total"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert found["total"]["unigram_nats_per_token"] == pytest.approx(unigram / predicted, rel=1e-9)
    assert found["en"]["stderr"] is None and found["zh"]["stderr"] > 0


def test_stores_that_do_not_fit_the_model_are_refused(model, tmp_path):
    store = store_of_text(tmp_path, model.tokenizer)
    config = PerplexityConfig(store=str(tmp_path), split="validation", rows=1, baseline_rows=1)
    with pytest.raises(UserError, match="no rows in split 'test'"):
        perplexity([model], store, dataclasses.replace(config, split="test"), 100)
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=32))
    with pytest.raises(UserError, match="rows of 48 tokens"):
        perplexity([short], store, config, 100)
    store.info["tokenizer"]["digest"] = "other"
    with pytest.raises(UserError, match="another tokenizer"):
        perplexity([model], store, config, 100)


# ---- The verb


def test_an_interrupted_evaluation_ends_in_the_bytes_of_an_undisturbed_one(model, tmp_path, monkeypatch):
    export(model.config, model.params, model.tokenizer, tmp_path / "hf", "float32")
    store_of_text(tmp_path / "s", model.tokenizer)
    first = write_task(tmp_path, QUESTIONS)
    second = write_task(tmp_path, QUESTIONS, name="text", choice="{choice}")
    config = EvalConfig(
        model=str(tmp_path / "hf"),
        step=None,
        dtype=None,
        perplexity=PerplexityConfig(store=str(tmp_path / "s"), split="validation", rows=9, baseline_rows=9),
        benchmarks=(),
        data="",
        partly=False,
        unsafe_programs=False,
        limit=None,
        tasks=(first, second),
        bos=True,
        prompts=("从前",),
        chat=False,
        sampling=SamplingConfig(max_tokens=4, temperature=0.0, top_k=0, top_p=1.0, seed=0),
        batch_tokens=256,
    )
    whole = eval_verb.run(config, str(tmp_path / "undisturbed"))
    assert sorted(whole["tasks"]) == ["text", "toy"]

    work = eval_verb.evaluate_choice

    def only(name: str, otherwise: type[BaseException]):
        """Lets one task through; any other raises."""

        def evaluate(model, loaded, *rest):
            if loaded.task.name != name:
                raise otherwise
            return work(model, loaded, *rest)

        monkeypatch.setattr(eval_verb, "evaluate_choice", evaluate)

    only("toy", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        eval_verb.run(config, str(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "manifest.json").exists()
    only("text", AssertionError)  # the finished task is not done again
    assert eval_verb.run(config, str(tmp_path / "cut")) == whole
    parts = [f"parts/task-{task}.{end}" for task in ("toy", "text") for end in ("json", "jsonl")]
    for name in ("scores.json", "samples.jsonl", "parts/perplexity.json", *parts):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert eval_verb.run(config, str(tmp_path / "cut")) == whole  # finished: returns at once
