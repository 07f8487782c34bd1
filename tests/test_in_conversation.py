"""Generate tasks asked in the model's chat template: turns, names, protocols, where answers end, what is counted."""

import dataclasses

import jax.numpy as jnp
import pytest
from test_benchmark import BATCH, TASK, config_of, loaded
from tiny_models import REFERENCE, tiny_model

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_jsonl
from ctllm_jax.data.chat import CtllmTemplate, own_template
from ctllm_jax.evaluate import run as eval_verb
from ctllm_jax.evaluate.benchmark import evaluate_block, summary
from ctllm_jax.evaluate.declarations import in_conversation, load_benchmark, load_task
from ctllm_jax.evaluate.encoding import encode_open, end_ids
from ctllm_jax.evaluate.prompts import turns
from ctllm_jax.evaluate.seen import scores_apart
from ctllm_jax.evaluate.table import table
from ctllm_jax.generate import generate
from ctllm_jax.loading import load_model

WRITTEN = """
source = "this test"
kind = "generate"
split = "test"
prefix = "{title}：\\n"
question = "{q}="
delimiter = "\\n"
gold = "a"
max_tokens = 6
extract.number = "gsm8k"

[files]
folder = "toy"
about = "toy files"
splits.dev = ["dev.jsonl"]
splits.test = ["{subset}.jsonl"]

[subsets]
only = ["one 一"]

[shots]
count = 2
split = "dev"
target = " {a} "
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_length=256)


def conversation(tmp_path):
    found = in_conversation(loaded(tmp_path, text=WRITTEN))
    return found, found.items["one"], found.examples["one"]


def test_examples_are_turns_and_the_question_the_last_one(model, tmp_path):
    found, items, (one, other) = conversation(tmp_path)
    [(prompt, ids, shots, cut)] = encode_open(model, found, "one", items[:1], True)
    assert prompt == [
        {"role": "user", "content": f"一：\n{one.fields['q']}="},
        {"role": "assistant", "content": f" {one.fields['a']} "},
        {"role": "user", "content": f"{other.fields['q']}="},
        {"role": "assistant", "content": f" {other.fields['a']} "},
        {"role": "user", "content": f"{items[0].fields['q']}="},
    ]
    assert ids == CtllmTemplate(model.tokenizer).render_prompt(prompt) and (shots, cut) == (2, 0)
    room = len(ids) - 1 + found.task.max_tokens
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=room))
    [(fewer, ids, shots, cut)] = encode_open(short, found, "one", items[:1], True)
    assert (fewer, shots, cut) == (turns(found, items[0], 1), 1, 0) and fewer[0]["content"].startswith("一：")


def test_an_answer_ends_with_its_turn_and_one_that_does_not_is_counted(model, tmp_path):
    found, items, _ = conversation(tmp_path)
    [end] = CtllmTemplate(model.tokenizer).end_ids
    [(_, ids, _, _)] = encode_open(model, found, "one", items[:1], True)
    [[first]] = generate(model, [ids], max_tokens=1, stop_ids=())
    # The model ends its turn where it said the first token of its first answer.
    swapped = jnp.arange(model.config.padded_vocab_size).at[jnp.array([first, end])].set(jnp.array([end, first]))
    ending = dataclasses.replace(model, params={**model.params, "head": model.params["head"][:, swapped]})
    log = evaluate_block(ending, found, "one", items, True, BATCH)
    assert log[0]["text"] == "" and log[0]["finished"] and not all(entry["finished"] for entry in log)
    result = summary(found, {"one": log})
    assert result["unfinished"] == [entry["finished"] for entry in log].count(False)
    assert end not in end_ids(model, loaded(tmp_path, text=WRITTEN))  # as plain text, only the document's end counts


def test_a_stop_text_ends_an_answer_too(model, tmp_path):
    found, items, _ = conversation(tmp_path)
    [entry] = evaluate_block(model, found, "one", items[:1], True, BATCH)
    assert not entry["finished"] and len(entry["text"]) > 1
    stopped = dataclasses.replace(found, task=dataclasses.replace(found.task, stop=(entry["text"][1:],)))
    [again] = evaluate_block(model, stopped, "one", items[:1], True, BATCH)
    assert again["finished"] and again["text"] == entry["text"][:1]


def test_scores_in_conversation_have_a_name_and_a_protocol_of_their_own(model, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_verb, "on_each_device", lambda model: [model])  # one compilation
    tasks = {"chosen": TASK.format(kind="ppl", mutual="false"), "asked": WRITTEN}
    for name, text in tasks.items():
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    paths = tuple(str(tmp_path / f"{name}.toml") for name in tasks)
    config = config_of(tmp_path, model, benchmarks=paths, chat=True)
    assert [benchmark.task.name for benchmark in eval_verb._benchmarks(config)[0]] == ["chosen", "asked_chat"]
    config = dataclasses.replace(config, benchmarks=paths[1:])
    own = load_benchmark(load_task(paths[1]), str(tmp_path))
    found = eval_verb.run(config, str(tmp_path / "w"))["benchmarks"]
    assert list(found) == ["asked_chat"]
    assert found["asked_chat"]["protocol"] != own.protocol
    entries = list(read_jsonl(tmp_path / "w" / "parts" / "asked_chat" / "one-0000.jsonl"))
    assert [entry["prompt"] for entry in entries] == [turns(own, item, 2) for item in own.items["one"]]
    seen = {"asked": {entries[0]["id"]}}  # training data is searched for items, however they are asked
    assert scores_apart(tmp_path / "w", seen)["asked_chat"]["seen"]["n"] == 1
    assert "unfinished" in table({"model": "m", "digest": "", "perplexity": None, "missing": [], "benchmarks": found})


def test_a_text_that_the_template_refuses_is_told_with_its_task(tmp_path):
    if not REFERENCE.exists():
        pytest.skip("needs a tokenizer with a Jinja template")
    model = load_model(str(REFERENCE / "tiny_mha"))
    found, items, _ = conversation(tmp_path)
    [(_, ids, _, _)] = encode_open(model, found, "one", items[:1], True)
    assert ids == own_template(model.tokenizer).render_prompt(turns(found, items[0], 2))
    broken = dataclasses.replace(items[0], fields={**items[0].fields, "q": "<|im_end|>"})
    with pytest.raises(UserError, match="toy_written_chat: the text holds the special token <|im_end|>"):
        encode_open(model, found, "one", [broken], True)
