"""Scores: equal to lm-eval-harness, to sums by hand, and to themselves in any order."""

import dataclasses
import gzip
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from tiny_models import NO_REFERENCE, REFERENCE, TEXT, score, tiny_model, write_jsonl
from tiny_stores import write_store

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.record import Row
from ctllm_jax.evaluate import run as eval_verb
from ctllm_jax.evaluate.devices import on_each_device
from ctllm_jax.evaluate.engine import score_groups
from ctllm_jax.evaluate.perplexity import PerplexityConfig, perplexity
from ctllm_jax.evaluate.run import EvalConfig
from ctllm_jax.evaluate.scoring import encode_pairs, joined, windows
from ctllm_jax.hf_export import export
from ctllm_jax.model import forward
from ctllm_jax.sampling import SamplingConfig

SAMPLE_TASK = pathlib.Path(__file__).parent.parent / "sample" / "choice.toml"
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
    found = joined([one for [one] in score_groups(model, [[own] for own in windows(model, document, 1)], 256, "")])
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
        one, other = encode_pairs(model.tokenizer, [("The quick ", "brown"), ("The quick", " brown")], bos)
        assert one == other
    [(context, _)] = encode_pairs(model.tokenizer, [("", "山")], False)
    assert context == [model.tokenizer.bos_id]


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
    with pytest.raises(ValueError, match="rows must be at least 1"):
        dataclasses.replace(config, rows=0)
    with pytest.raises(UserError, match="no rows in split 'test'"):
        perplexity([model], store, dataclasses.replace(config, split="test"), 100)
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=32))
    with pytest.raises(UserError, match="rows of 48 tokens"):
        perplexity([short], store, config, 100)
    broken = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * float("nan"), model.params))
    with pytest.raises(UserError, match="row 0 of validation: .* gives a log-probability that is NaN"):
        perplexity([broken], store, config, 100)
    store.info["tokenizer"]["digest"] = "other"
    with pytest.raises(UserError, match="another tokenizer"):
        perplexity([model], store, config, 100)


# ---- The verb

QUESTIONS = [
    {"question": "山里有什么？", "choices": ["庙", "海里的鱼"], "answer": 0, "language": "zh"},
    {"question": "首都是？", "choices": ["北京", "上海", "dog"], "answer": "A", "language": "zh"},
    {"question": "A fox is", "choices": ["quick", "a city {x}"], "answer": 1, "language": "en"},
]


def own_task(folder) -> str:
    """A task of one's own, its questions beside it."""
    write_jsonl(folder / "choice.jsonl", QUESTIONS)
    text = SAMPLE_TASK.read_text(encoding="utf-8").replace('name = "sample_choice"', 'name = "toy"')
    (folder / "toy.toml").write_text(text, encoding="utf-8")
    return str(folder / "toy.toml")


def test_an_interrupted_evaluation_ends_in_the_bytes_of_an_undisturbed_one(model, tmp_path, monkeypatch):
    export(model.config, model.params, model.tokenizer, tmp_path / "hf", "float32")
    store_of_text(tmp_path / "s", model.tokenizer)
    toy = own_task(tmp_path)
    config = EvalConfig(
        model=str(tmp_path / "hf"),
        step=None,
        dtype=None,
        tensor=1,
        perplexity=PerplexityConfig(store=str(tmp_path / "s"), split="validation", rows=9, baseline_rows=9),
        benchmarks=(toy,),
        data="",
        partly=False,
        unsafe_programs=False,
        limit=None,
        bos=True,
        prompts=("从前",),
        chat=False,
        sampling=SamplingConfig(max_tokens=4, temperature=0.0, top_k=0, top_p=1.0, seed=0),
        batch_tokens=256,
        cache="",
    )
    whole = eval_verb.run(config, str(tmp_path / "undisturbed"))
    assert sorted(whole["benchmarks"]) == ["toy"]
    assert whole["benchmarks"]["toy"]["scores"]["sum"]["n"] == 3

    def killed(*_):
        raise KeyboardInterrupt

    def unwanted(*_):
        raise AssertionError("done again")

    monkeypatch.setattr(eval_verb, "answer", killed)
    with pytest.raises(KeyboardInterrupt):
        eval_verb.run(config, str(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "manifest.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(eval_verb, "perplexity", unwanted)  # the finished part is not done again
    assert eval_verb.run(config, str(tmp_path / "cut")) == whole
    parts = ["parts/toy/zh-0000.jsonl", "parts/toy/en-0000.jsonl"]
    for name in ("scores.json", "samples.jsonl", *parts):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert eval_verb.run(config, str(tmp_path / "cut")) == whole  # finished: returns at once
