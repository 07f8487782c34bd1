"""`ctllm generate`: a line in, a line out, done once."""

import dataclasses
import json

import pytest
from tiny_models import tiny_model, write_jsonl

from ctllm_jax import samples as verb
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_jsonl
from ctllm_jax.generate import generate
from ctllm_jax.hf_export import export
from ctllm_jax.samples import GenerateConfig
from ctllm_jax.sampling import SamplingConfig

SAMPLED = SamplingConfig(max_tokens=8, temperature=1.0, top_k=0, top_p=1.0, seed=3)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def location(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    export(model.config, model.params, model.tokenizer, folder, "float32")
    return folder


def config(location, **changes) -> GenerateConfig:
    values = {
        "model": str(location),
        "step": None,
        "dtype": None,
        "tensor": 1,
        "prompts": ("从前有座山", "The quick"),
        "input": None,
        "chat": False,
        "slots": 2,
        "sampling": SamplingConfig(max_tokens=8, temperature=0.0, top_k=0, top_p=1.0, seed=0),
    }
    return GenerateConfig(**{**values, **changes})


def test_the_verb_writes_and_prints_samples_and_does_not_repeat_itself(model, location, tmp_path, capsys, monkeypatch):
    asked = write_jsonl(
        tmp_path / "asked.jsonl", [{"prompt": "水"}, {"messages": [{"role": "user", "content": "你好"}]}]
    )
    settings = config(location, input=str(asked))
    result = verb.run(settings, str(tmp_path / "out"))
    lines = read_jsonl(tmp_path / "out" / "samples.jsonl")
    assert result["samples"] == len(lines) == 4 and result["rejected"] == 0
    assert [line.get("line") for line in lines] == [None, None, 1, 2]
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("The quick")]
    expected = generate(model, [ids], max_tokens=8, stop_ids=[model.tokenizer.eos_id])[0]
    assert lines[1]["text"] == model.tokenizer.decode(expected)
    printed = capsys.readouterr().out
    assert "--- 从前有座山" in printed and lines[1]["text"] in printed
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jsonl")) == ["samples.jsonl"]

    monkeypatch.setattr(verb, "sample_each", lambda *_: pytest.fail("sampled again"))
    assert verb.run(dataclasses.replace(settings, slots=5), str(tmp_path / "out")) == result
    with pytest.raises(UserError, match="other inputs or settings"):
        verb.run(dataclasses.replace(settings, chat=True), str(tmp_path / "out"))


def test_a_run_cut_short_goes_on_with_the_lines_that_are_missing(location, tmp_path, monkeypatch):
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": text} for text in "从前有座山里庙"])
    settings = config(location, prompts=(), input=str(asked), sampling=SAMPLED)
    verb.run(settings, str(tmp_path / "whole"))
    whole = (tmp_path / "whole" / "samples.jsonl").read_bytes()
    sample_each, seen = verb.sample_each, []

    def cut(model, prompts, *rest):
        for count, found in enumerate(sample_each(model, prompts, *rest)):
            if count == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(verb, "sample_each", cut)
    with pytest.raises(KeyboardInterrupt):
        verb.run(settings, str(tmp_path / "cut"))
    partial = tmp_path / "cut" / "partial.jsonl"
    assert len(read_jsonl(partial)) == 3
    with partial.open("ab") as file:
        file.write('{"row": 5, "text": "山'.encode()[:-1])  # a kill in the middle of a line, and of a character
    monkeypatch.setattr(verb, "sample_each", lambda m, p, *rest: seen.extend(p) or sample_each(m, p, *rest))
    verb.run(settings, str(tmp_path / "cut"))
    assert len(seen) == 4 and (tmp_path / "cut" / "samples.jsonl").read_bytes() == whole
    texts = [json.loads(line)["text"] for line in whole.splitlines()]
    assert len(set(texts)) == 7


def test_lines_that_are_no_prompts_are_counted_with_their_place(location, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    bad = [b"{", b"[1]", b'{"messages": []}', b"\xff", b'{"prompt": 5}', b'{"prompt": "\\ud800"}']
    bad += [b"[" * 100_000, json.dumps({"prompt": "The quick " * 40}).encode()]
    asked.write_bytes(b'{"prompt": "a"}\n\n' + b"\n".join(bad) + b'\n{"prompt": "b"}')
    result = verb.run(config(location, prompts=(), input=str(asked)), str(tmp_path / "out"))
    assert (result["samples"], result["rejected"]) == (2, 8)
    assert [line["line"] for line in read_jsonl(tmp_path / "out" / "samples.jsonl")] == [1, 11]
    rejected = read_jsonl(tmp_path / "out" / "rejected.jsonl")
    assert [entry["line"] for entry in rejected] == list(range(3, 11))
    assert {entry["file"] for entry in rejected} == {str(asked)}
    reasons = " ".join(entry["reason"] for entry in rejected)
    for part in ("not valid JSON", "found list", "messages is not a list, or empty", "lone surrogate", "tokens"):
        assert part in reasons
    assert f"8 lines are not prompts, the first: {asked}:3: not valid JSON" in capsys.readouterr().err


def test_without_a_prompt_there_is_nothing_to_do(location, tmp_path):
    with pytest.raises(UserError, match=r"config\.prompts or config\.input"):
        verb.run(config(location, prompts=()), str(tmp_path / "out"))
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompts": "a"}])
    with pytest.raises(UserError, match="no line is a prompt"):
        verb.run(config(location, prompts=(), input=str(asked)), str(tmp_path / "out"))
    with pytest.raises(UserError, match="prompt 0: the prompt has"):
        verb.run(config(location, prompts=("The quick " * 40,)), str(tmp_path / "long"))
    with pytest.raises(UserError, match="cannot be read"):
        verb.run(config(location, input=str(tmp_path / "nowhere")), str(tmp_path / "out"))


def test_stop_strings_end_a_text_and_seeds_decide_it(model):
    free = verb.sample(model, ["水", "从前"], False, SAMPLED)
    assert free == verb.sample(model, ["水", "从前"], False, SAMPLED)
    assert free != verb.sample(model, ["水", "从前"], False, dataclasses.replace(SAMPLED, seed=4))
    stop = free[0]["text"][2]
    cut = verb.sample(model, ["水", "从前"], False, dataclasses.replace(SAMPLED, stop=(stop,)))
    assert cut[0]["text"] == free[0]["text"].partition(stop)[0] and cut[0]["finished"]
    assert not free[0]["finished"] and cut[0]["tokens"] < free[0]["tokens"]
