"""`ctllm select`: values against plain passes of the model, limits, sweeps without a model, resuming."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
from tiny_models import tiny_model, widened, write_jsonl
from tiny_records import say

from ctllm_jax import convert, selection
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json, read_jsonl
from ctllm_jax.data.chat import own_template
from ctllm_jax.evaluate.scoring import next_token_logprobs
from ctllm_jax.loading import load_model
from ctllm_jax.selection import Limits, SelectConfig
from data_pipeline.records import check_chat, read_records

FREE = Limits(None, None)
CONTEXT = 48
RECORDS = [
    {"id": "one", "source": "coig", "messages": say("北京是什么？", "北京是中国的首都。")},
    {"id": "two", "messages": say("山里有什么？", "庙。", "庙里有什么？", "老和尚。")},
    {"instruction": "Say it", "input": "now", "output": "The quick brown fox"},
    {"id": "cut", "messages": say("水", "水在标准大气压下的沸点是一百摄氏度。" * 4)},
    {"id": "late", "messages": say("水在标准大气压下的沸点是一百摄氏度。" * 4, "是")},
    {"id": "no answer", "messages": say("水")},
    {"id": "system", "messages": [{"role": "system", "content": "简短"}, *say("老和尚说什么？", "从前有座山。")]},
]
UNUSABLE = 1


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    convert.write_run(tiny_model(max_length=CONTEXT), folder, "float32")
    return folder


@pytest.fixture(scope="module")
def config(run_dir, tmp_path_factory):
    file = widened(write_jsonl(tmp_path_factory.mktemp("input") / "chats.jsonl", RECORDS))
    return SelectConfig(
        input=(str(file),),
        model=str(run_dir),
        step=None,
        dtype=None,
        tensor=1,
        template=None,
        batch_tokens=2048,  # more than there are: one shape, one compilation
        scores=None,
        perplexity=FREE,
        ifd=FREE,
        hardest=1.0,
    )


@pytest.fixture(scope="module")
def scored(config, tmp_path_factory):
    """(folder, result) of a selection without limits."""
    folder = tmp_path_factory.mktemp("selected") / "all"
    return folder, selection.run(config, str(folder))


def of_others(config, scored, **changes) -> SelectConfig:
    """Limits on the values of a folder that is there."""
    return dataclasses.replace(config, input=(), model="", scores=str(scored[0]), **changes)


def values_of(folder) -> dict[str, dict | None]:
    return {row["id"]: row["values"] for row in read_jsonl(folder / "scored.jsonl")}


def plain_nll(model, ids: list[int], start: int) -> float:
    """Negative log-likelihood of the ids from a place on, one pass for it alone."""
    tokens_1L, labels_1L = np.zeros((2, 1, CONTEXT), np.int32)
    tokens_1L[0, : len(ids) - 1], labels_1L[0, : len(ids) - 1] = ids[:-1], ids[1:]
    segments_1L = (np.arange(CONTEXT) < len(ids) - 1).astype(np.int32)[None]
    logprob_1L = next_token_logprobs(
        model.config, model.params, tokens_1L, np.arange(CONTEXT, dtype=np.int32)[None], segments_1L, labels_1L
    )
    return -float(np.asarray(logprob_1L, np.float64)[0, start - 1 : len(ids) - 1].sum())


def test_values_are_those_of_plain_passes(scored, run_dir):
    model, found = load_model(str(run_dir)), values_of(scored[0])
    template, tokenizer = own_template(model.tokenizer), model.tokenizer
    talks = {"one": RECORDS[0]["messages"], "two": RECORDS[1]["messages"], "cut": RECORDS[3]["messages"]}
    talks["chats:3"] = say("Say it\nnow", "The quick brown fox")
    for name, messages in talks.items():
        given = alone = tokens = 0
        for number in range(2, len(messages) + 1, 2):
            start = len(template.render_prompt(messages[: number - 1]))
            ids = template.render(messages[:number])[0][: CONTEXT + 1]
            assert ids[:start] == template.render_prompt(messages[: number - 1])
            given += plain_nll(model, ids, start)
            alone += plain_nll(model, [tokenizer.bos_id, *ids[start:]], 1)
            tokens += len(ids) - start
        assert found[name]["tokens"] == tokens
        assert found[name]["perplexity"] == pytest.approx(math.exp(given / tokens), rel=1e-4)
        assert found[name]["ifd"] == pytest.approx(given / alone, rel=1e-4)
    assert found["late"] is None


def test_everything_is_counted_and_what_is_kept_can_be_tokenized(scored):
    folder, result = scored
    assert (result["conversations"], result["kept"], result["unusable"], result["cut"]) == (6, 5, UNUSABLE, 2)
    assert result["reasons"] == {"no token of an answer fits the model's context": 1}
    assert result["quantiles"]["ifd"]["0%"] == min(own["ifd"] for own in values_of(folder).values() if own)
    assert set(result["quantiles"]) == {"perplexity", "ifd"} and result["tokens"] > 20
    rejected = read_jsonl(folder / "rejected.jsonl")
    assert [(row.get("id"), row.get("line")) for row in rejected] == [("late", None), (None, 6)]
    assert rejected[1]["reason"] == "the last message is not the assistant's"
    again = read_records([str(folder / "kept.jsonl")], check_chat)
    assert not again.rejected and [row["id"] for row in again.kept] == ["one", "two", "chats:3", "cut", "system"]
    assert again.kept[0]["source"] == "coig" and again.kept[0]["messages"] == RECORDS[0]["messages"]


def test_limits_are_swept_without_a_model(scored, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selection, "load_model", lambda *_: pytest.fail("a model was loaded"))
    values = {name: own for name, own in values_of(scored[0]).items() if own}
    by_ifd = sorted(values, key=lambda name: values[name]["ifd"])
    by_perplexity = sorted(values, key=lambda name: values[name]["perplexity"])
    ifd = Limits(values[by_ifd[0]]["ifd"] + 1e-9, values[by_ifd[3]]["ifd"])
    perplexity = Limits(None, values[by_perplexity[3]]["perplexity"])
    within = [name for name in by_ifd[1:4] if name != by_perplexity[4]]
    chosen = of_others(config, scored, ifd=ifd, perplexity=perplexity, hardest=0.5)
    result = selection.run(chosen, str(tmp_path / "some"))
    kept = {row["id"] for row in read_jsonl(tmp_path / "some" / "kept.jsonl")}
    assert kept == set(within[-math.ceil(len(within) / 2) :])
    why = {row["id"]: row["reasons"] for row in read_jsonl(tmp_path / "some" / "rejected.jsonl")}
    assert f"ifd below {ifd.least:g}" in why[by_ifd[0]] and f"ifd above {ifd.most:g}" in why[by_ifd[4]]
    assert f"perplexity above {perplexity.most:g}" in why[by_perplexity[4]]
    assert any("not among the highest 0.5" in reason for own in why.values() for reason in own)
    assert (result["unusable"], result["cut"]) == (UNUSABLE, 2)
    assert "1 records are not conversations" in capsys.readouterr().out
    with pytest.raises(UserError, match="took its values from another folder"):
        selection.run(dataclasses.replace(chosen, scores=str(tmp_path / "some")), str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"settings\.hardest: 0\.5 there, 1\.0 now"):
        selection.run(dataclasses.replace(chosen, hardest=1.0), str(tmp_path / "some"))


def test_a_run_that_was_cut_short_scores_only_what_is_missing(scored, config, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "BLOCK", 2)
    monkeypatch.setattr(selection, "on_each_device", lambda model: [model])  # where blocks come in their order
    blocks, right = [], selection.score_block

    def score_block(model, template, records, *rest):
        blocks.append([record["id"] for record in records])
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return right(model, template, records, *rest)

    monkeypatch.setattr(selection, "score_block", score_block)
    with pytest.raises(KeyboardInterrupt):
        selection.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "manifest.json").exists()
    selection.run(config, str(tmp_path / "run"))
    assert blocks == [["one", "two"], ["chats:3", "cut"], ["chats:3", "cut"], ["late", "system"]]
    for name, own in values_of(tmp_path / "run").items():
        expected = values_of(scored[0])[name]
        assert (own is None) == (expected is None) and (own is None or own == pytest.approx(expected, rel=1e-5))
    assert selection.run(config, str(tmp_path / "run")) == read_json(tmp_path / "run" / "manifest.json")["result"]


def test_answers_that_changed_within_a_file_are_another_input(scored, config, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text(pathlib.Path(config.input[0]).read_text().replace("老和尚。", "小和尚。"))
    with pytest.raises(UserError, match=r"inputs\.input"):
        selection.run(dataclasses.replace(config, input=(str(file),)), str(scored[0]))


def test_a_model_without_a_template_reads_a_line_a_message(run_dir):
    model = load_model(str(run_dir))
    template = selection.PlainTemplate(model.tokenizer)
    ids, mask = template.render(say("山", "水", "山", "庙"))
    assert model.tokenizer.decode(ids) == "山\n水\n山\n庙" and ids[-1] == model.tokenizer.eos_id
    assert ids[0] == model.tokenizer.bos_id and sum(mask) == 2 and mask[-2:] == [1, 1]
    [found] = selection.score_block(model, template, [{"messages": say("山", "水")}], 2048, "test")
    assert found["values"]["tokens"] == 2 and not found["cut"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": "DIR"}, "give input and model, or scores"),
        ({"input": (), "model": ""}, "give input and model, or scores"),
        ({"model": ""}, "input and model go together"),
        ({"hardest": 0.0}, "hardest 0.0 is not a share"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_input_without_a_conversation_says_why(config, tmp_path):
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    with pytest.raises(UserError, match="no conversation in .*; the first record: a preference record"):
        selection.run(dataclasses.replace(config, input=(str(file),)), str(tmp_path / "run"))
