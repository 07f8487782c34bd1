"""`ctllm trace`: what it says a step saw is what the trainer was given, and both directions agree."""

import collections
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_models import TEXT, tiny_tokenizer
from tiny_stores import tiny_store, train_values, write_store

from configs import corpus as corpus_config
from configs import tokenize as tokenize_config
from configs import trace as trace_config
from ctllm_jax import cli, trace, train
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json
from ctllm_jax.data.batches import DataConfig, make_stream
from ctllm_jax.data.record import Row
from ctllm_jax.data.store import open_store
from ctllm_jax.train_config import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "sample"
LENGTH, STEPS, BATCH = 32, 12, 8
CHANGE = {"step": 8, "rates": {"zh": 0.2, "en": 0.8}}


# ---- Made once: a run, and what the trainer was given


def documents(split: str, source: str, count: int) -> dict[str, np.ndarray]:
    """{id: tokens} of texts of very different lengths."""
    tokenizer, found = tiny_tokenizer(), {}
    for number in range(count):
        text = "".join(f"{number}：{TEXT[(number + i) % len(TEXT)]}\n" for i in range(1 + number % 4))
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        found[f"{split}-{source}-{number}"] = np.array(ids, np.int32)
    return found


def packed(texts: dict[str, np.ndarray]) -> list[Row]:
    """Rows filled one after the other; what does not fit goes on in the next row, which repeats a token."""
    rows, pieces, room = [], [], LENGTH

    def close() -> None:
        nonlocal pieces, room
        names, starts, parts = zip(*pieces, strict=True)
        rows.append(Row(np.concatenate(parts), [len(part) for part in parts], names, None, 3 * LENGTH, starts))
        pieces, room = [], LENGTH

    for name, tokens in texts.items():
        start = 0
        while start + 1 < len(tokens):
            part = tokens[start : start + room]
            pieces.append((name, start, part))
            start, room = start + len(part) - 1, room - len(part)
            if room < 2:
                close()
    if pieces:
        close()
    return rows


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """{split: {source: {id: tokens}}}."""
    sizes = {"train": {"zh": 14, "en": 6}, "validation": {"zh": 3}}
    return {split: {name: documents(split, name, n) for name, n in own.items()} for split, own in sizes.items()}


@pytest.fixture(scope="module")
def ran(texts, tmp_path_factory) -> tuple[pathlib.Path, dict[int, np.ndarray]]:
    """(run directory, {step: tokens of the batch that the trainer took}); the rates change on the way."""
    folder, taken = tmp_path_factory.mktemp("trace"), {}
    rows = {split: {source: packed(own) for source, own in sources.items()} for split, sources in texts.items()}
    store = write_store(folder / "store", rows, "pretrain", LENGTH)
    values = train_values(store.folder)
    values["eval"]["every"], values["checkpoints"]["every"] = STEPS, 10
    values["data"]["rate_changes"] = [CHANGE]

    def recording(stream, start, stop, mesh, prefetched=train.prefetched):
        for step, batch in enumerate(prefetched(stream, start, stop, mesh), start + 1):
            taken[step] = jax.device_get(batch["tokens"])
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "prefetched", recording)
        train.run(build(TrainConfig, values), str(folder / "run"))
    assert taken.keys() == set(range(1, STEPS + 1))
    return folder / "run", taken


def ask(**changes) -> trace.TraceConfig:
    return build(trace.TraceConfig, trace_config.get_config().to_dict() | changes)


def answer(capsys, workdir, **changes) -> tuple[list[dict], list[dict], str]:
    """(headings, segments, standard error) of a question asked with --json."""
    capsys.readouterr()
    result = trace.run(ask(json=True, **changes), str(workdir))
    out, err = capsys.readouterr()
    entries = [json.loads(line) for line in out.splitlines()]
    found = [entry for entry in entries if entry["kind"] == "segment"]
    headings = [entry for entry in entries if entry["kind"] != "segment"]
    assert result["segments"] == len(found) and [one for own in result["answers"] for one in own["segments"]] == found
    assert [{key: own[key] for key in own if key != "segments"} for own in result["answers"]] == headings
    return headings, found, err


@pytest.fixture
def listed(ran, capsys) -> list[dict]:
    """The segments of all steps, as `--step` lists them one by one."""
    return [segment for step in range(1, STEPS + 1) for segment in answer(capsys, ran[0], step=step)[1]]


# ---- What a step saw


def test_a_step_lists_every_token_that_the_trainer_was_given_and_no_other(ran, texts, listed):
    _, taken = ran
    whole = {name: tokens for own in texts["train"].values() for name, tokens in own.items()}
    told = {step: np.zeros_like(tokens) for step, tokens in taken.items()}
    for segment in listed:
        place = np.s_[segment["row"], segment["begin"] : segment["end"]]
        assert not told[segment["step"]][place].any()  # no place is told twice
        start = segment["start"]
        told[segment["step"]][place] = whole[segment["document"]][start : start + segment["tokens"]]
    for step, tokens in taken.items():
        np.testing.assert_array_equal(told[step], tokens)
    assert any(segment["start"] for segment in listed)


def test_the_text_is_that_of_the_tokens_and_as_long_as_asked(ran, texts, capsys):
    workdir, _ = ran
    for limit in (0, 3, 200):
        for segment in answer(capsys, workdir, step=5, text_chars=limit)[1]:
            start, tokens = segment["start"], texts["train"][segment["source"]][segment["document"]]
            text = tiny_tokenizer().decode(tokens[start : start + segment["tokens"]])
            assert segment["text"] == text[:limit]


def test_a_step_that_is_not_reached_is_listed_and_said_to_be(ran, texts, capsys):
    workdir, _ = ran
    assert answer(capsys, workdir, step=STEPS)[0] == [{"kind": "step", "step": STEPS, "reached": True}]
    [heading], segments, _ = answer(capsys, workdir, step=STEPS + 3)
    assert heading == {"kind": "step", "step": STEPS + 3, "reached": False}
    store = open_store(workdir.parent / "store")
    data = build(DataConfig, read_json(workdir / "run.json")["config"]["data"])
    places = make_stream(data, store, BATCH, 11).places(STEPS + 2)
    for row, place in enumerate(places):
        own = [segment for segment in segments if segment["row"] == row]
        assert [s["document"] for s in own] == list(store.row("train", place.source, place.index).ids)
        assert {(s["source"], s["epoch"], s["store_row"]) for s in own} == {(place.source, place.epoch, place.index)}


def test_the_table_has_a_line_a_segment_with_the_same_values(ran, capsys):
    workdir, _ = ran
    _, segments, _ = answer(capsys, workdir, step=4, text_chars=10)
    [told] = trace.run(ask(step=4, text_chars=10), str(workdir))["answers"]
    heading, columns, *lines = capsys.readouterr().out.splitlines()
    assert heading == "step 4" and len(lines) == len(segments)
    assert columns.split() == "step row begin end tokens epoch source document start text".split()
    for line, segment in zip(lines, segments, strict=True):
        *values, text = line.split(maxsplit=9)
        assert values == [str(segment[name]) for name in columns.split()[:-1]]
        assert text == " ".join(segment["text"].split())
    page = trace.drawn(told)
    assert page.count("<tr>") == 1 + len(segments) and all(f"<td>{s['document']}</td>" in page for s in segments)
    assert all(f">{name}</th>" in page for name in ("step", "row", "tokens", "source", "document", "url", "text"))


def test_what_the_web_wrote_cannot_steer_a_terminal():
    assert trace._one_line("\x1b[31m红\r\n\u202e\u2028字\x00") == "[31m红 字"


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_conversations_and_pairs_are_traced_by_their_ids(kind, tmp_path, capfd):
    store = tiny_store(tmp_path / kind, kind, rows=20)
    stream = make_stream(DataConfig(str(store.folder), {}, (), True), store, BATCH, 3)
    segments = list(trace.segments(stream, trace.examples_of_step(stream, 2), 20))
    tokens, seen = stream.arrays(1, range(BATCH))["tokens"], collections.Counter()
    for segment in segments:
        row = tokens[segment.row]
        own = row if kind == "chat" else row[("chosen", "rejected").index(segment.side)]
        assert segment.text == store.tokenizer.decode(own[segment.begin : segment.end])[:20]
        seen[segment.row] += segment.tokens
    assert [seen[row] for row in range(BATCH)] == np.count_nonzero(tokens.reshape(BATCH, -1), axis=1).tolist()
    assert trace.open_corpus(None, store)("zh", segments[0].document) == {}
    assert capfd.readouterr().err == ""  # there is no corpus to miss
    with pytest.raises(UserError, match="nowhere"):
        trace.open_corpus("nowhere", store)


# ---- Which steps saw a document


def test_steps_and_documents_are_inverse_of_each_other(ran, texts, listed, capsys):
    workdir, _ = ran
    for document in (name for own in texts["train"].values() for name in own):
        [heading], segments, _ = answer(capsys, workdir, document=document)
        assert segments == [segment for segment in listed if segment["document"] == document]
        assert heading["steps"] == sorted({segment["step"] for segment in segments})
        assert heading["last_step"] == STEPS
    assert max(segment["epoch"] for segment in listed) >= 3


def test_a_document_is_said_to_be_where_it_is_in_the_store(ran, capsys):
    workdir, _ = ran
    store = open_store(workdir.parent / "store")
    longest = "train-zh-3"
    expected = [number for number, row in enumerate(store.rows("train", "zh")) if longest in row.ids]
    assert len(expected) > 1
    [heading], _, _ = answer(capsys, workdir, document=longest)
    assert heading["split"] == "train" and heading["store_rows"] == {"zh": expected}
    trace.run(ask(document=longest), str(workdir))
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"{longest}: train split, zh, store row {', '.join(map(str, expected))}; seen by ")


def test_a_document_that_no_step_can_have_seen_is_an_error_that_says_which(ran):
    workdir, _ = ran
    with pytest.raises(UserError, match="validation-zh-1 is held out: no step sees .* split .zh, store row"):
        trace.run(ask(document="validation-zh-1"), str(workdir))
    with pytest.raises(UserError, match="train-zh-99 is not in the token store .*store"):
        trace.run(ask(document="train-zh-99"), str(workdir))


def test_a_run_is_searched_up_to_its_last_checkpoint_where_metrics_end_earlier(ran, listed, tmp_path, capsys):
    workdir = shutil.copytree(ran[0], tmp_path / "run")
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 3))
    shutil.rmtree(workdir / "checkpoints" / "12")
    [heading], segments, _ = answer(capsys, workdir, document="train-en-1")
    assert heading["last_step"] == 10
    assert segments == [s for s in listed if s["document"] == "train-en-1" and s["step"] <= 10]


# ---- Spikes


def test_a_planted_jump_is_found_and_listed_like_its_step(ran, tmp_path, capsys):
    workdir = shutil.copytree(ran[0], tmp_path / "run")
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for entry in entries:
        if entry["kind"] == "train" and entry["step"] in (7, 10):
            entry["loss"] *= 10 if entry["step"] == 10 else 5
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    headings, segments, _ = answer(capsys, workdir, spike=2)
    assert [heading["step"] for heading in headings] == [10, 7]
    planted = {entry["step"]: entry["loss"] for entry in entries if entry["kind"] == "train"}
    assert [heading["loss"] for heading in headings] == [planted[10], planted[7]]
    assert headings[0]["jump"] > headings[1]["jump"] > 3
    assert segments == [*answer(capsys, workdir, step=10)[1], *answer(capsys, workdir, step=7)[1]]
    trace.run(ask(spike=1), str(workdir))
    assert capsys.readouterr().out.startswith(f"step 10: loss {headings[0]['loss']:.4f}, median before ")


def test_a_jump_is_measured_in_deviations_from_the_median_before():
    losses = [(step, loss) for step, loss in enumerate([5.0, 4.0, 6.0, 5.0, 5.5, 9.0, float("nan"), 5.0], 1)]
    found = trace.spikes(losses, 9)
    # Step 6: median 5 of 5, 4, 6, 5, 5.5; distances 0, 1, 1, 0, 0.5, whose median is 0.5.
    assert [spike.step for spike in found] == [7, 6, 5]
    assert (found[1].median, found[1].jump) == (5.0, pytest.approx(4.0 / (1.4826 * 0.5)))
    assert found[0].jump == float("inf")
    assert found[2].jump == pytest.approx(0.5 / (1.4826 * 0.5))  # 5, 4, 6, 5: median 5, MAD 0.5
    assert [spike.step for spike in trace.spikes(losses, 1)] == [7]
    # A flat curve: its deviation is at least a hundredth of the median. A falling one has no jump.
    assert [s.jump for s in trace.spikes([(i, 2.0) for i in range(9)] + [(9, 2.1)], 9)] == [pytest.approx(5.0)]
    assert trace.spikes([(i, 9.0 - i / 10) for i in range(80)], 9) == []


def test_a_loss_that_is_not_finite_is_null_and_a_curve_without_jumps_says_so(ran, tmp_path, capsys):
    workdir = shutil.copytree(ran[0], tmp_path / "run")
    losses = [9.0 - step / 10 for step in range(1, STEPS + 1)]

    def write() -> None:
        lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write()
    headings, segments, err = answer(capsys, workdir, spike=5)
    assert headings == segments == []
    assert err.splitlines()[-1] == "trace: none of 12 logged losses lies above those before it"
    losses[10] = float("inf")
    write()
    [heading], _, _ = answer(capsys, workdir, spike=5)
    assert (heading["step"], heading["loss"], heading["jump"]) == (11, None, None) and heading["median"]


# ---- What the user gets wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give exactly one of step, spike and document"),
        ({"step": 1, "document": "x"}, "give exactly one of step, spike and document"),
        ({"step": 0}, "step 0 is below 1"),
        ({"spike": 0}, "spike 0 is below 1"),
        ({"step": 1, "text_chars": -1}, "text_chars -1 is below 0"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ask(**changes)


def test_only_training_runs_are_traced(ran, tmp_path):
    for folder in (tmp_path, ran[0].parent / "store", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{folder}: not a folder of `ctllm train`"):
            trace.run(ask(step=1), str(folder))


def test_a_store_that_has_moved_is_given_and_another_one_refused(ran, tmp_path, capsys):
    workdir, _ = ran
    expected = answer(capsys, workdir, step=2)
    copy = shutil.copytree(workdir, tmp_path / "run")
    run = read_json(copy / "run.json")
    run["config"]["data"]["store"] = str(tmp_path / "gone")
    (copy / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="gone: the run's token store is not there; if it has moved, give --store=DIR"):
        trace.run(ask(step=2), str(copy))
    moved = shutil.copytree(workdir.parent / "store", tmp_path / "moved")
    assert answer(capsys, copy, step=2, store=str(moved)) == expected
    other = tiny_store(tmp_path / "other", length=16).folder
    with pytest.raises(UserError, match=f"other is not the store that {copy} was trained on"):
        trace.run(ask(step=2, store=str(other)), str(copy))


def test_a_missing_corpus_costs_the_urls_and_nothing_else(ran, tmp_path, capsys):
    _, segments, err = answer(capsys, ran[0], step=1)
    assert segments and not any("url" in segment for segment in segments)
    assert err.startswith("trace: no URLs: ") and err.endswith("give --corpus=DIR\n") and err.count("\n") == 1
    with pytest.raises(UserError, match="nowhere"):  # asked for by name it is the user's to mend
        trace.run(ask(step=1, corpus=str(tmp_path / "nowhere")), str(ran[0]))


# ---- Through the command line, with a corpus


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> pathlib.Path:
    """A folder with a corpus, a token store made from it, and a run that has yet to make its first step."""
    from data_pipeline import corpus, token_store

    folder = tmp_path_factory.mktemp("stages")
    lines = (SAMPLE / "documents" / "zh_cc.jsonl").read_bytes().split(b"\n")[:12]
    (folder / "zh_cc.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    values = corpus_config.get_config().to_dict() | {"input": [str(folder / "zh_cc.jsonl")]}
    corpus.run(build(corpus.CorpusConfig, values), str(folder / "corpus"))
    values = tokenize_config.get_config().to_dict() | {
        "corpus": str(folder / "corpus"),
        "tokenizer": str(tiny_tokenizer().file),
        "sequence_length": LENGTH,
        "validation_share": 0.25,
    }
    token_store.run(build(token_store.TokenizeConfig, values), str(folder / "store"))
    values = train_values(folder / "store")
    values["data"]["rates"] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_train", lambda job, *_: train._write_run(job) or {})
        train.run(build(TrainConfig, values), str(folder / "run"))
    return folder


def ctllm(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "ctllm_jax.cli", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    return process.returncode, process.stdout, process.stderr


def test_the_command_shows_urls_from_the_corpus_that_the_store_was_made_from(stages):
    status, out, err = ctllm("trace", f"--workdir={stages / 'run'}", "--step", "2", "--json", "--text_chars=9")
    assert (status, err) == (0, "")
    heading, *segments = map(json.loads, out.splitlines())
    assert heading == {"kind": "step", "step": 2, "reached": False} and segments
    published = [json.loads(line) for line in (stages / "zh_cc.jsonl").read_text().splitlines()]
    published = {record["id"]: record for record in published}
    for segment in segments:
        record = published[segment["document"]]
        assert segment["url"] == record["url"] and segment["signals"]["characters"] == len(record["text"])
        if segment["start"] == 0:
            assert record["text"].startswith(segment["text"]) and len(segment["text"]) == 9


def test_a_corpus_that_has_moved_is_given_and_another_one_refused(stages, tmp_path, capsys):
    moved = shutil.copytree(stages / "corpus", tmp_path / "moved")
    expected = answer(capsys, stages / "run", step=1)
    assert answer(capsys, stages / "run", step=1, corpus=str(moved)) == expected and expected[1][0]["url"]
    manifest = read_json(moved / "manifest.json")
    (moved / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "0123456789abcdef"}))
    with pytest.raises(UserError, match=r"moved \(fingerprint 0123456789abcdef\) is not what .*store was made from"):
        trace.run(ask(step=1, corpus=str(moved)), str(stages / "run"))


def test_without_tensorflow_there_are_no_urls_and_it_says_what_to_install(stages, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, trace.MAP_CC, raising=False)
    _, segments, err = answer(capsys, stages / "run", step=1)
    assert segments and not any("url" in segment for segment in segments)
    assert err == "trace: no URLs: tensorflow is not installed: pip install 'ctllm-jax[data]'\n"


def test_the_command_line_and_its_config_keys_ask_the_same(ran, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(trace, "run", lambda config, workdir: asked.append((config, workdir)))
    monkeypatch.setattr(sys, "argv", ["ctllm"])
    for arguments, expected in (
        (["--step=3"], {"step": 3}),
        (["--config.step=3"], {"step": 3}),
        (["--spike"], {"spike": 5}),
        (["--spike=2", "--json"], {"spike": 2, "json": True}),
        (["--document", "zh-1", "--store=S", "--corpus=C"], {"document": "zh-1", "store": "S", "corpus": "C"}),
    ):
        cli.main(["trace", "--workdir=RUN", *arguments])
        assert asked.pop() == (ask(**expected), "RUN")
