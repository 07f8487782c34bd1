"""`ctllm report`: one page with the curves of runs, whatever state they are in."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import tiny_stages
from command import ctllm
from tiny_stores import train_values

from ctllm_jax import convert, train
from ctllm_jax.common.config import build
from ctllm_jax.common.files import write_json
from ctllm_jax.metrics import goodput, report_page
from ctllm_jax.metrics.card import BY_HAND, cards
from ctllm_jax.metrics.run_record import read_run
from ctllm_jax.train_config import TrainConfig

STEPS = 40


def told(step: int, time: float, starts: int = 1, kind: str = "job", **seconds: float) -> dict:
    """A line of metrics.jsonl; where its kind is "job", with the accounts of a timesheet."""
    accounts = {f"seconds/{name}": seconds.get(name, 0.0) for name in goodput.ACCOUNTS}
    return {"kind": kind, "step": step, "time": time, **(accounts | {"starts": starts} if kind == "job" else {})}


def write_run(folder, name: str, rate: float = 1e-3, steps: int = STEPS, finished: bool = True, end: float = 2000.0):
    """A run directory as `ctllm train` leaves it, as far as a report reads it."""
    run = folder / name
    config = {"optimizer": {"learning_rate": rate}, "batch_size": 8, "seed": 1}
    write_json(run / "stage.json", {"stage": "train", "settings": config})
    versions = {"ctllm-jax": "0", "jax": "0"}
    about = {"config": config, "model": {"num_layers": 2}, "parameters": 40096, "devices": "8 x cpu"}
    write_json(run / "run.json", {**about, "versions": versions})
    lines = [told(0, end - steps, start=9)]
    for step in range(1, steps + 1):
        values = {"loss": 5 / step, "loss/en": 4 / step, "loss/zh": 6 / step, "grad_norm": 1.0, "learning_rate": rate}
        values |= {"tokens_per_second": 1000.0 + step, "mfu_causal": 0.41, "host_memory_gib": 1.5, "skipped": 0}
        values |= {"layers/grad_norm": [0.5, 0.25 / step]}
        lines.append({"kind": "train", "step": step, "time": end - steps + step, **values})
        if step % 10 == 0:
            held = {"count": 9, "loss": 6 / step, "loss/en": 5 / step, "bits_per_byte": 2 / step, "accuracy/quiz": 0.3}
            lines.append({"kind": "eval", "step": step, "time": end - steps + step, **held})
    lines.append(told(steps, end, start=9, steps=30, evaluation=1))
    lines[-1]["goodput"] = 0.75
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        write_json(run / "manifest.json", {})
    return run


def page_of(capsys, *arguments) -> str:
    status, out, err = ctllm(capsys, "report", *map(str, arguments))
    assert (status, err) == (0, "") and out.startswith("report: ")
    with open(out.removeprefix("report: ").strip(), encoding="utf-8") as file:
        return file.read()


def titles(page: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", page)


def test_the_page_of_a_run_has_all_its_curves_and_needs_nothing_else(tmp_path, capsys):
    page = page_of(capsys, write_run(tmp_path, "one"))
    assert (tmp_path / "one" / "report.html").read_text() == page
    assert "<script" not in page and "src=" not in page and "http" not in page
    assert titles(page) == [
        "loss (nats per token, or pair)",
        "grad_norm (nats per token, or pair, per unit of parameter)",
        "learning_rate",
        "loss, by source (nats per token)",
        "layers/grad_norm (as `grad_norm`)",
        "loss (nats per token, or pair)",
        "bits_per_byte (bits per byte)",
        "loss, by source (nats per token)",
        "accuracy, by task (share)",
        "tokens_per_second (tokens/s)",
        "mfu_causal (share)",
        "host_memory_gib (GiB)",
        "Seconds since the first start",
    ]
    assert "<b>finished</b>" in page and "<b>41.0%</b>" in page and "<b>75.0%</b>" in page
    assert "optimizer.learning_rate" in page and "40,096 parameters on 8 x cpu" in page
    assert f"<title>one, step {STEPS}: 0.15</title>" in page  # the held-out loss at the end, under the pointer


def test_runs_lie_over_one_another_and_the_settings_that_differ_are_named(tmp_path, capsys):
    one, two = write_run(tmp_path, "one"), write_run(tmp_path, "two", rate=3e-3, steps=20)
    page = page_of(capsys, one, two, f"--workdir={tmp_path / 'out'}")
    assert not (one / "report.html").exists()
    assert "<tr><td>optimizer.learning_rate</td><td>0.001</td><td>0.003</td></tr>" in page
    assert "batch_size" not in page and "num_layers" not in page
    assert "loss/zh (nats per token)" in titles(page) and "accuracy/quiz (share)" in titles(page)
    first = re.search(r"<figure>.*?</figure>", page).group()
    assert [name for name in ("one", "two") if f"</i>{name}</span>" in first] == ["one", "two"]
    assert first.count("<polyline") == 4  # a mean and single values of each
    same = page_of(capsys, one, write_run(tmp_path / "again", "one"), f"--workdir={tmp_path / 'out'}")
    assert "Their settings are the same." in same and str(tmp_path / "again" / "one") in same


def test_a_run_is_shown_in_any_state(tmp_path, capsys, monkeypatch):
    killed = write_run(tmp_path, "killed", finished=False)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    for now, state in ((2030.0, "at work, last line 30 s ago"), (2000.0 + 7200, "not finished, last line 2 h ago")):
        monkeypatch.setattr("ctllm_jax.metrics.run_record.time.time", lambda now=now: now)
        assert f"<b>{state}</b>" in page_of(capsys, killed)
    (killed / "metrics.jsonl").unlink()
    assert "No step has been logged yet." in page_of(capsys, killed)
    (killed / "run.json").unlink()  # it is still restoring
    page = page_of(capsys, killed)
    assert "has logged nothing yet" in page and "optimizer.learning_rate" in page
    assert "has logged nothing yet" in page_of(capsys, killed, write_run(tmp_path, "other"))


def test_what_is_not_finite_or_not_known_is_no_obstacle(tmp_path, capsys):
    run = write_run(tmp_path, "run")
    odd = {"kind": "train", "step": 41, "time": 2001.0, "loss": math.nan, "grad_norm": math.inf, "of_tomorrow": 1.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(odd) + "\n")
    assert "of_tomorrow" in titles(page_of(capsys, run))


def test_samples_are_the_last_ones_of_each_run(tmp_path, capsys):
    for name, steps in (("one", (10, 20)), ("two", (10,))):
        run = write_run(tmp_path, name)
        samples = [{"step": step, "prompt": "山", "text": f"<{name} {step}>"} for step in steps]
        (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page = page_of(capsys, tmp_path / "one", tmp_path / "two", f"--workdir={tmp_path / 'out'}")
    assert "<th>one, step 20</th><th>two, step 10</th>" in page
    assert "<tr><td>山</td><td>&lt;one 20&gt;</td><td>&lt;two 10&gt;</td></tr>" in page and "one 10" not in page
    assert "&lt;one 10&gt;" in page_of(capsys, tmp_path / "one")


@pytest.mark.parametrize(
    ("stage", "message"),
    [(None, "no run directory (stage.json is missing)"), ("eval", "a folder of `ctllm eval`, not of `ctllm train`")],
)
def test_a_folder_that_is_no_run_is_named(tmp_path, capsys, stage, message):
    if stage:
        write_json(tmp_path / "stage.json", {"stage": stage})
    status, _, err = ctllm(capsys, "report", str(write_run(tmp_path, "run")), str(tmp_path))
    assert (status, err) == (2, f"ctllm: error: {tmp_path}: {message}\n")
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("share", ["1.5", "-0.1"])
def test_a_share_beyond_one_is_refused(tmp_path, capsys, share):
    status, _, err = ctllm(capsys, "report", str(tmp_path), f"--smooth={share}")
    assert status == 2 and "is not a share of a curve" in err


def test_a_mean_follows_its_curve_without_lag_and_leaves_out_what_is_not_finite():
    line = [(float(x), 3.0 * x) for x in range(100)]
    mean = dict(report_page.smoothed(line, 0.02))
    assert mean[50.0] == pytest.approx(150) and mean[0.0] > 0
    assert report_page.smoothed([(0, 1.0), (1, math.nan), (2, 1.0)], 0.5) == [(0, 1.0), (2, 1.0)]
    assert report_page.smoothed(line, 0.0) == line
    noise = np.random.default_rng(0).normal(size=2000)
    means = [y for _, y in report_page.smoothed(list(enumerate(noise)), 0.02)]
    assert np.std(means) < 0.2 * np.std(noise)


def test_a_thinned_curve_keeps_its_ends_and_spikes():
    line = [(x, 0.0) for x in range(10_000)]
    line[1234] = (1234, 9.0)
    line[5678] = (5678, -9.0)
    thin = report_page.thinned(line, 100)
    assert len(thin) <= 100 and {line[1234], line[5678]} <= set(thin)
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)
    assert report_page.thinned(line[:100], 100) == line[:100]


def test_a_run_record_is_what_the_files_say(tmp_path):
    record = read_run(write_run(tmp_path, "run"), "name")
    assert (record.name, record.state, len(record.entries["train"])) == ("name", "finished", STEPS)
    assert record.settings == {
        "optimizer.learning_rate": 1e-3, "batch_size": 8, "seed": 1, "model.num_layers": 2
    }  # fmt: skip


# ---- Cards


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run directory, folder of the stages it was made from): two steps on the sample's corpus."""
    stages = tiny_stages.stages()
    values = train_values(stages / "pretrain")
    model = values["model"] | {"vocab_size": 1500, "padded_vocab_size": 1536, "max_length": tiny_stages.LENGTH}
    values |= {"model": model, "duration": "2 steps"}
    values["data"] |= {"rates": {}}
    values["checkpoints"] |= {"every": 1, "kept": 2}
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.run(build(TrainConfig, values), str(folder))
    return folder, stages


def test_cards_say_what_the_stages_have_left_and_what_nobody_told(tmp_path, trained, capsys):
    run, stages = trained
    assert ctllm(capsys, "report", str(run), "--card", f"--workdir={tmp_path}")[0] == 0
    model, data = ((tmp_path / f"{name}_CARD.md").read_text() for name in ("MODEL", "DATA"))
    about = json.loads((run / "run.json").read_text())
    last = read_run(run, "run").entries["eval"][-1]
    assert f"| parameters | {about['parameters']:,} |" in model and "| steps | 2 |" in model
    assert f"| tokens gone through, padding included | {2 * about['tokens_per_step']:,} |" in model
    assert f"| bits_per_byte | {last['bits_per_byte']:.6g} | bits per byte |" in model
    assert "unknown: no evaluation was named" in model
    store, corpus = (json.loads((stages / name / "manifest.json").read_text()) for name in ("pretrain", "corpus"))
    entry = store["result"]["splits"]["train"]["zh_cc"]
    assert f"| train | zh_cc | {entry['documents']:,} | {entry['rows']:,} | {entry['tokens']:,} |" in data
    left = [count for _, count in corpus["result"]["totals"]["funnel"]]
    assert "| all | " + " | ".join(f"{count:,}" for count in left) in data
    assert "| chinese | characters | min 50.0, max 10,000,000.0 |" in data
    assert data.count(BY_HAND) == 3 + len(tiny_stages.SUBSETS) and model.count(BY_HAND) == 3


def test_a_card_that_was_filled_in_is_not_overwritten(tmp_path, trained, capsys):
    arguments = ("report", str(trained[0]), "--card", f"--workdir={tmp_path}")
    assert ctllm(capsys, *arguments)[0] == ctllm(capsys, *arguments)[0] == 0
    file = tmp_path / "DATA_CARD.md"
    file.write_text(file.read_text().replace(BY_HAND, "CC BY 4.0", 1))
    status, _, err = ctllm(capsys, *arguments)
    assert status == 2 and "DATA_CARD.md has been filled in by hand" in err and "CC BY 4.0" in file.read_text()


def test_a_card_takes_scores_of_finished_evaluations_and_no_other_store(tmp_path, trained, capsys):
    run, stages = trained
    scores = f"--config.scores=('{tmp_path}',)"
    assert "not a finished folder" in ctllm(capsys, "report", str(run), "--card", scores)[2]
    found = {"model": "run@2", "digest": "d", "perplexity": None, "benchmarks": {}, "missing": []}
    write_json(tmp_path / "manifest.json", {"stage": "eval", "fingerprint": "f", "result": found})
    assert "model run@2 (d)" in cards(run, [str(tmp_path)])["MODEL_CARD.md"]
    shutil.copytree(run, tmp_path / "copy")
    stage = json.loads((run / "stage.json").read_text())
    write_json(tmp_path / "copy" / "stage.json", stage | {"inputs": {"store": "another"}})
    assert "unknown: " in (card := cards(tmp_path / "copy", [])["DATA_CARD.md"]) and "made anew" in card
    for refused in ((str(run), str(run), "--card"), (str(run), scores)):
        assert ctllm(capsys, "report", *refused)[0] == 2


def test_all_checkpoints_become_a_series_named_by_tokens(tmp_path, trained):
    run, _ = trained
    config = convert.ConvertConfig(str(run), None, "huggingface", "float32", all_steps=True)
    models = convert.run(config, str(tmp_path))["models"]
    tokens = json.loads((run / "run.json").read_text())["tokens_per_step"]
    assert list(models) == [str(tokens), f"{2 * tokens / 1000:.2f}K"]
    for step, name in enumerate(models, 1):
        assert models[name]["source"] == f"run@{step}" and (tmp_path / name / "model" / "config.json").is_file()
    assert models == convert.run(config, str(tmp_path))["models"]


def test_series_names_are_those_of_the_released_checkpoints():
    step = 512 * 4096
    assert convert.series_names([6_356 * step, 381_422 * step, 0]) == ["13.33B", "799.90B", "0"]
    assert convert.series_names([1_000_000, 1_000_001]) == ["1000000", "1000001"]
