"""Benchmarks end to end on small fixtures: over-long prompts, kills, batch sizes, the table."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_model, write_jsonl

from ctllm_jax.common.errors import UserError
from ctllm_jax.evaluate import benchmark, engine
from ctllm_jax.evaluate import run as eval_verb
from ctllm_jax.evaluate.benchmark import answer, ask, evaluate_block, summary
from ctllm_jax.evaluate.cache import Cache
from ctllm_jax.evaluate.declarations import load_benchmark, load_task
from ctllm_jax.evaluate.devices import on_each_device
from ctllm_jax.evaluate.encoding import encode_open, encode_options
from ctllm_jax.evaluate.engine import Request, score_groups
from ctllm_jax.evaluate.perplexity import PerplexityConfig
from ctllm_jax.evaluate.prompts import head, option_prompts
from ctllm_jax.evaluate.run import EvalConfig
from ctllm_jax.evaluate.table import table
from ctllm_jax.hf_export import export
from ctllm_jax.sampling import SamplingConfig

BATCH = 256

TASK = """
source = "this test"
kind = "{kind}"
split = "test"
prefix = "{{title}}："
question = "{{q}}"
delimiter = " "
options = ["{{a}}", "{{b}}", "山"]
gold = "{{gold}}"
strays = true
mutual = {mutual}

[files]
folder = "toy"
about = "toy files"
splits.dev = ["dev.jsonl"]
splits.test = ["{{subset}}.jsonl"]

[subsets]
first = ["one 一", "two 二"]
second = ["three"]

[shots]
count = 2
split = "dev"
between = "|"
close = "||"
bare = "."
"""
WRITTEN = """
source = "this test"
kind = "generate"
split = "test"
question = "{q}="
gold = "a"
max_tokens = 6
stop = ["和"]
extract.number = "gsm8k"
extract.whole = "whole"

[files]
folder = "toy"
about = "toy files"
splits.test = ["one.jsonl"]
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def toy(tmp_path, kind: str = "ppl", mutual: str = "false", text: str | None = None, rows: int = 3):
    """A task of three subsets; its declaration's path and the data folder."""
    random = np.random.default_rng(0)
    words = ["山里", "庙", "fox", "quick", "北京", "城市", "12", "小和尚"]
    pick = lambda n: "".join(random.choice(words, n))  # noqa: E731
    row = lambda: {"q": pick(3), "a": pick(2), "b": pick(1), "gold": str(random.integers(3))}  # noqa: E731
    (tmp_path / "toy").mkdir(exist_ok=True)
    for name in ("dev", "one", "two", "three"):
        write_jsonl(tmp_path / "toy" / f"{name}.jsonl", [row() for _ in range(rows)])
    path = tmp_path / f"toy_{kind if text is None else 'written'}.toml"
    path.write_text(text or TASK.format(kind=kind, mutual=mutual), encoding="utf-8")
    return str(path)


def loaded(tmp_path, *arguments, **named):
    return load_benchmark(load_task(toy(tmp_path, *arguments, **named)), str(tmp_path))


# ---- The engine


def test_shared_beginnings_change_no_score(model, monkeypatch):
    random = np.random.default_rng(1)
    ids = lambda n: random.integers(4, 370, n).tolist()  # noqa: E731
    common = ids(30)
    groups = []
    for _ in range(6):
        question = common + ids(4)
        groups.append([Request([*question, *ids(n)], len(question), 0) for n in (1, 1, 1, 1, 1, 1, 3)])
    prefill, shared = engine._prefill, []
    monkeypatch.setattr(engine, "_prefill", lambda *rest: shared.append(rest[2].shape) or prefill(*rest))
    together = score_groups(model, groups, 64, "shared")
    assert shared == [(1, 64)]  # what all six questions begin with, once
    for group, found in zip(groups, together, strict=True):
        for request, one in zip(group, found, strict=True):
            [[alone]] = score_groups(model, [[request]], 64, "alone")
            assert one.sum_logprob == pytest.approx(alone.sum_logprob, abs=1e-5)
            assert one.whole_logprob == pytest.approx(alone.whole_logprob, abs=1e-4)
            assert (one.tokens, one.is_greedy, one.length) == (alone.tokens, alone.is_greedy, len(request.ids))
    backwards = score_groups(model, [group[::-1] for group in groups[::-1]], 64, "backwards")
    assert [group[::-1] for group in backwards[::-1]] == together


# ---- Prompts that are too long


def test_examples_are_dropped_before_a_prompt_is_cut(model, tmp_path):
    found = loaded(tmp_path, "ppl")
    items = found.items["one"]
    whole = [own.requests for own in encode_options(model, found, "one", items, True)]
    longest = max(len(request.ids) for own in whole for request in own)

    def limited(length: int):
        return dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=length))

    [fits] = encode_options(limited(longest), found, "one", items[:1], True)
    assert fits.shots == 2 and fits.requests == whole[0]
    for length in range(longest, 8, -1):
        [own] = encode_options(limited(length), found, "one", items[:1], True)
        for prompt, request in zip(own.prompts, own.requests, strict=True):
            assert len(request.ids) <= length
            if own.shots == 0 and request.cut:
                assert prompt.text.startswith("一：.")
        texts = [p.text for p in option_prompts(found.task, items[0], head(found, "one", own.shots))]
        assert own.prompts[-1].text == texts[-1]
        if own.shots:
            assert not any(request.cut for request in own.requests)
    assert own.shots == 0 and all(request.cut for request in own.requests)


def test_a_written_answers_prompt_leaves_room_for_it(model, tmp_path):
    found = loaded(tmp_path, text=WRITTEN)
    long = dataclasses.replace(found.items[""][0], fields={"q": "山里有庙" * 40})
    [(_, ids, _, cut)] = encode_open(model, found, "", [long], True)
    assert len(ids) == model.config.max_length - 6 and cut > 0
    [entry] = evaluate_block(model, found, "", [long], True, BATCH)
    assert entry["cut"] == cut and "和" not in entry["text"]
    assert entry["extracted"]["whole"] == entry["text"]
    log = [entry, {**entry, "failed": {"number": True, "whole": False}, "cut": 0}]
    result = summary(found, {"": log})
    assert result["failed"]["number"] == 1 + entry["failed"]["number"] and result["cut"] == 1
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=6))
    with pytest.raises(UserError, match="6 new tokens do not fit"):
        encode_open(short, found, "", [long], True)


# ---- Choices


def test_every_norm_picks_by_its_own_measure(model, tmp_path):
    found = loaded(tmp_path, "lm_eval", "true")
    [own] = encode_options(model, found, "two", found.items["two"][:1], True)
    [entry] = evaluate_block(model, found, "two", found.items["two"][:1], True, BATCH)
    [alone] = score_groups(model, [own.alone], BATCH, "alone")
    sums = np.array(entry["logprobs"])
    expected = {
        "ppl": np.array(entry["whole_logprobs"]) / entry["lengths"],
        "sum": sums,
        "tokens": sums / entry["tokens"],
        "characters": sums / [len(text) for text in entry["options"]],
        "bytes": sums / [len(text.encode()) for text in entry["options"]],
        "mutual": sums - [score.sum_logprob for score in alone],
    }
    assert entry["picked"] == {name: int(np.argmax(values)) for name, values in expected.items()}
    for name, values in expected.items():
        first, second = sorted(values, reverse=True)[:2]
        assert entry["margins"][name] == pytest.approx(first - second, abs=1e-4)


def test_strays_count_as_wrong_and_chance_is_told(model, tmp_path):
    found = loaded(tmp_path, "ppl")
    log = {subset: evaluate_block(model, found, subset, items, True, BATCH) for subset, items in found.items.items()}
    for entry in log["one"]:
        entry["gold"] = None
    for entry in (*log["two"], *log["three"]):
        entry["gold"] = entry["picked"]["ppl"]
    result = summary(found, log)
    assert (result["strays"], result["questions"], result["headline"]) == (3, 9, "ppl")
    assert result["chance"] == pytest.approx(1 / 3)
    score = result["scores"]["ppl"]
    assert score["macro"]["mean"] == score["micro"]["mean"] == pytest.approx(2 / 3)
    assert score["groups"]["first"]["macro"]["mean"] == 0.5 and score["groups"]["second"]["macro"]["mean"] == 1
    assert sorted(score["subsets"]) == ["one", "three", "two"]


@pytest.mark.parametrize("kind", ["lm_eval", "rolling"])
def test_a_model_of_nan_is_told_by_its_first_item_and_nothing_is_kept(model, tmp_path, kind):
    text = (
        'source = "this test"\nkind = "rolling"\nsplit = "test"\nquestion = "{q}"\n'
        + WRITTEN[WRITTEN.index("[files]") :]
    )
    found = loaded(tmp_path, text=text) if kind == "rolling" else loaded(tmp_path, kind)
    broken = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * jnp.nan, model.params))
    subset, items = list(found.items.items())[-1]
    block = ask(broken, found, subset, items, True)
    cache = Cache(tmp_path / "cache", "m")
    first = 0 if kind == "rolling" else 1  # as if the answers to the item before were known
    claim = cache.claim(block.groups[first:])
    with pytest.raises(
        UserError, match=f"{found.task.name}.*, item {items[first].id}: .* NaN.*config.step.*config.dtype=float32"
    ):
        cache.answer(claim, lambda groups: answer(broken, block, groups, BATCH, "x"))
    assert list((tmp_path / "cache").rglob("*.tsv")) == []


def test_what_a_model_holds_for_impossible_is_a_score(model, tmp_path, monkeypatch):
    """Of an option whose log-probability is minus infinity another one is picked."""
    found = loaded(tmp_path, "lm_eval")
    items = found.items["two"][:1]
    score = benchmark.score_groups

    def impossible(*arguments):
        [[first, *others]] = score(*arguments)
        return [[dataclasses.replace(first, sum_logprob=-math.inf, whole_logprob=-math.inf), *others]]

    monkeypatch.setattr(benchmark, "score_groups", impossible)
    [entry] = evaluate_block(model, found, "two", items, True, BATCH)
    assert entry["logprobs"][0] == -math.inf and entry["picked"]["sum"] != 0


# ---- The verb


def config_of(tmp_path, model, **changes) -> EvalConfig:
    if not (tmp_path / "hf").exists():
        export(model.config, model.params, model.tokenizer, tmp_path / "hf", "float32")
    values = {
        "model": str(tmp_path / "hf"),
        "step": None,
        "dtype": None,
        "tensor": 1,
        "perplexity": PerplexityConfig(store="", split="validation", rows=1, baseline_rows=1),
        "benchmarks": (toy(tmp_path, "ppl"), toy(tmp_path, text=WRITTEN)),
        "data": str(tmp_path),
        "partly": False,
        "unsafe_programs": False,
        "limit": None,
        "bos": True,
        "prompts": (),
        "chat": False,
        "sampling": SamplingConfig(max_tokens=4, temperature=0.0, top_k=0, top_p=1.0, seed=0),
        "batch_tokens": BATCH,
        "cache": "",
    }
    return EvalConfig(**{**values, **changes})


def test_a_killed_evaluation_goes_on_with_the_blocks_that_are_missing(model, tmp_path, monkeypatch, capsys):
    """Whole on two devices; killed and taken up again on one, where blocks come in their order."""
    config = config_of(tmp_path, model)
    monkeypatch.setattr(eval_verb, "on_each_device", lambda model: on_each_device(model)[:2])
    whole = eval_verb.run(config, str(tmp_path / "undisturbed"))
    monkeypatch.setattr(eval_verb, "on_each_device", lambda model: on_each_device(model)[:1])
    assert sorted(whole["benchmarks"]) == ["toy_ppl", "toy_written"]
    work, calls = eval_verb.answer, []

    def counted(model, block, *rest):
        calls.append((block.benchmark.task.name, block.subset))
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return work(model, block, *rest)

    monkeypatch.setattr(eval_verb, "answer", counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            eval_verb.run(config, str(tmp_path / "cut"))
        assert not (tmp_path / "cut" / "manifest.json").exists()
    assert eval_verb.run(config, str(tmp_path / "cut")) == whole
    ppl = [("toy_ppl", subset) for subset in ("one", "two", "two", "three", "three")]
    assert calls == [*ppl, ("toy_written", "")]
    names = ["scores.json", *(f"parts/toy_ppl/{s}-0000.jsonl" for s in ("one", "two", "three"))]
    for name in (*names, "parts/toy_written/all-0000.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    printed = capsys.readouterr().out
    assert "toy_ppl" in printed and "33.33" in printed  # the chance level
    assert table(whole) in printed


def test_the_batch_size_changes_no_prediction_and_a_limit_takes_the_first_items(model, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_verb, "on_each_device", lambda model: [model])  # one compilation a batch size
    picks = {}
    for batch_tokens in (1, BATCH):
        config = config_of(tmp_path, model, benchmarks=(toy(tmp_path, "ppl"),), batch_tokens=batch_tokens, limit=2)
        result = eval_verb.run(config, str(tmp_path / str(batch_tokens)))
        assert result["benchmarks"]["toy_ppl"]["questions"] == 6
        lines = (tmp_path / str(batch_tokens) / "parts" / "toy_ppl" / "two-0000.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        assert [entry["id"] for entry in entries] == ["two/0", "two/1"]
        picks[batch_tokens] = [entry["picked"] for entry in entries if min(entry["margins"].values()) > 1e-4]
    assert picks[1] == picks[BATCH] and picks[1]


def test_missing_files_are_left_out_and_named_where_that_is_allowed(model, tmp_path, capsys):
    task = toy(tmp_path, "ppl")
    (tmp_path / "toy" / "two.jsonl").unlink()
    with pytest.raises(UserError, match="found none of two.jsonl"):
        load_benchmark(load_task(task), str(tmp_path))
    config = config_of(tmp_path, model, benchmarks=(task, "ceval_ppl"), partly=True)
    (tmp_path / "toy" / "two.jsonl").unlink()
    result = eval_verb.run(config, str(tmp_path / "w"))
    assert (result["missing"], list(result["benchmarks"])) == (["ceval_ppl"], ["toy_ppl"])
    found = result["benchmarks"]["toy_ppl"]
    assert (found["missing"], found["questions"]) == (["two"], 6)
    groups = found["scores"]["ppl"]["groups"]
    assert groups["first"]["n"] == groups["second"]["n"] == 3
    printed = capsys.readouterr()
    assert "toy_ppl: without two" in printed.out and "want of files: ceval_ppl" in printed.out
    assert "ceval_ppl: left out" in printed.err and "It should hold C-Eval" in printed.err


def test_what_cannot_be_evaluated_is_told(model, tmp_path):
    twice = config_of(tmp_path, model, benchmarks=(toy(tmp_path, "ppl"),) * 2)
    with pytest.raises(UserError, match="two benchmarks have the same name"):
        eval_verb.run(twice, str(tmp_path / "w"))
    with pytest.raises(UserError, match="nothing to do; give config.benchmarks"):
        eval_verb.run(config_of(tmp_path, model, benchmarks=()), str(tmp_path / "w"))
    with pytest.raises(UserError, match="It should hold C-Eval"):
        eval_verb.run(config_of(tmp_path, model, benchmarks=("ceval_ppl",)), str(tmp_path / "w"))
