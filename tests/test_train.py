"""The training loop: it learns, and kill, stop and resume leave no trace in the result."""

# ruff: noqa: F811 (fixtures)
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from test_checkpoint import cut
from test_watch import metadata_server, until
from tiny_objectives import dpo
from tiny_runs import (  # noqa: F401 (fixtures too)
    ROOT,
    STEPS,
    TIMINGS,
    assert_close_entries,
    assert_same_run,
    at_step,
    compiled_once,
    config_of,
    entries,
    finished,
    params_of,
    stopped,
    stores,
)
from tiny_stores import tiny_store

from ctllm_jax import restore, stopping, train
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json
from ctllm_jax.data.batches import row_arrays
from ctllm_jax.data.order import Mixture, Phase
from ctllm_jax.data.store import open_store
from ctllm_jax.loading import load_model
from ctllm_jax.metrics import MetricsLog
from ctllm_jax.step import UPDATE_METRICS
from ctllm_jax.train_config import TrainConfig

# ---- An undisturbed run


def test_the_loss_falls_on_both_sources(finished):
    workdir, result = finished
    curve = [entry["loss"] for entry in entries(workdir, "train")]
    assert curve[0] > 5.5 and curve[-1] < curve[0] - 1.0  # it begins near ln 370 = 5.9
    before, *_, after = entries(workdir, "eval")
    for name in ("loss", "loss/zh", "loss/en", "bits_per_byte"):
        assert after[name] < before[name] - 0.1, name
    assert result["validation"] == {name: value for name, value in after.items() if name not in ("kind", "step")}


def test_metrics_are_a_line_a_step_with_what_a_reader_needs(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines if entry["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [entry["step"] for entry in lines if entry["kind"] == "eval"] == [0, 4, 8, 12]
    assert [entry["time"] for entry in lines] == sorted(entry["time"] for entry in lines)
    for entry in lines:
        assert all(np.all(np.isfinite(value)) for name, value in entry.items() if name != "kind")
    trained = [entry for entry in lines if entry["kind"] == "train"]
    always = {"kind", "step", "time", "count", "loss", *UPDATE_METRICS}
    for entry in trained:
        assert entry.keys() - TIMINGS - {"loss/zh", "loss/en"} == always - TIMINGS
        sources = [entry[name] for name in ("loss/zh", "loss/en") if name in entry]
        assert min(sources) - 1e-5 <= entry["loss"] <= max(sources) + 1e-5
    assert any("tokens_per_second" in entry for entry in trained)
    rates = [entry["learning_rate"] for entry in trained]
    assert rates[0] == 0 and max(rates) == rates[2] == pytest.approx(2e-2) and rates[-1] < 3e-3


def test_the_ledger_counts_the_tokens_learned_of_each_source(finished, stores):
    workdir, result = finished
    trained = entries(workdir, "train")
    assert sum(result["ledger"].values()) == sum(entry["count"] for entry in trained)
    store = open_store(stores["pretrain"])
    mixture = Mixture({"en": 30, "zh": 60}, [Phase(0, {"zh": 0.75, "en": 0.25})], 11)
    expected = dict.fromkeys(("en", "zh"), 0)
    for example in range(8 * STEPS):
        place = mixture.place(example)
        row = store.row("train", place.source, place.index)
        expected[place.source] += len(row.tokens) - len(row.lengths)
    assert result["ledger"] == expected


def test_the_held_out_figures_are_means_over_documents_and_bytes(finished, stores):
    store = open_store(stores["pretrain"])
    _, result = finished
    rows = {source: [store.row("validation", source, i) for i in range(n)] for source, n in (("zh", 8), ("en", 5))}
    count = {source: sum(len(row.tokens) - len(row.lengths) for row in own) for source, own in rows.items()}
    size = {source: sum(row.bytes for row in own) for source, own in rows.items()}
    held = result["validation"]
    assert held["count"] == sum(count.values())
    nats = {source: held[f"loss/{source}"] * count[source] for source in rows}
    assert held["loss"] == pytest.approx(sum(nats.values()) / sum(count.values()), rel=1e-6)
    assert held["bits_per_byte"] == pytest.approx(sum(nats.values()) / np.log(2) / sum(size.values()), rel=1e-6)
    assert held["bits_per_byte/zh"] == pytest.approx(nats["zh"] / np.log(2) / size["zh"], rel=1e-6)


def test_the_run_directory_is_complete_in_itself(finished, stores):
    workdir, result = finished
    run = read_json(workdir / "run.json")
    assert run["parameters"] == result["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params_of(workdir)))
    assert run["mesh"] == {"slice": 1, "data": 2, "fsdp": 4, "tensor": 1, "context": 1} and run["versions"]["jax"]
    assert run["config"]["seed"] == 11 and run["flops_per_token"]["causal"] < run["flops_per_token"]["full"]
    loaded = load_model(str(workdir))
    assert loaded.tokenizer.digest == open_store(stores["pretrain"]).info["tokenizer"]["digest"]
    assert loaded.name == "finished@12"
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [5, 10, 12]


def test_a_finished_run_returns_at_once(finished, stores, monkeypatch):
    monkeypatch.setattr(train, "_train", lambda *_: pytest.fail("trained again"))
    workdir, result = finished
    assert train.run(config_of(stores["pretrain"]), str(workdir)) == result
    # What does not decide the result may differ.
    other = config_of(
        stores["pretrain"],
        mesh__data=8,
        log__every=7,
        microbatches=2,
        checkpoints__kept=1,
        checkpoints__keep_every=5,
        model__remat="full",
    )
    assert train.run(other, str(workdir)) == result


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 12}, r"settings\.seed: 11 there, 12 now"),
        ({"duration": "24 steps"}, r"settings\.duration: 12 there, 24 now"),
        ({"batch_size": 16}, r"settings\.batch_size: 8 there, 16 now"),
        ({"optimizer__learning_rate": 1e-3}, r"settings\.optimizer\.learning_rate: 0\.02 there, 0\.001 now"),
        ({"data__mask_documents": False}, r"settings\.data\.mask_documents: true there, false now"),
        ({"model__d_ff": 64}, r"settings\.model\.d_ff: 48 there, 64 now"),
        ({"data__store": "chat"}, r"inputs\.store: .* there, .* now"),
    ],
)
def test_another_run_is_refused_in_the_same_folder_and_the_difference_named(finished, stores, change, named):
    change = {name: str(stores[value]) if name == "data__store" else value for name, value in change.items()}
    with pytest.raises(UserError, match=f"holds a 'train' run made from other inputs or settings .*{named}"):
        train.run(config_of(stores["pretrain"], **change), str(finished[0]))


# ---- Cut short and taken up


def test_a_killed_run_ends_in_the_same_bits(finished, stores, tmp_path, capsys):
    workdir = tmp_path / "run"
    program = (
        "import sys; sys.path.insert(0, 'tests'); import conftest, tiny_runs; "
        f"tiny_runs.killed_run({str(stores['pretrain'])!r}, {str(workdir)!r})"
    )
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert max(entry["step"] for entry in entries(workdir, "train")) >= 6
    assert not (workdir / "manifest.json").exists()
    train.run(config_of(stores["pretrain"]), str(workdir))
    assert "train: resumed at step 5" in capsys.readouterr().err
    assert_same_run(workdir, finished[0])


def test_a_damaged_newest_checkpoint_costs_steps_and_not_bits(finished, stores, tmp_path, capsys):
    """metrics.jsonl and the ledger follow the step that was really restored."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    checkpoints = tmp_path / "run" / "checkpoints"
    for file in (checkpoints / "12" / "optimizer").glob("**/d/*"):
        cut(file)  # every one: half of a small file may hold nothing but index nodes that were written anew elsewhere
    (checkpoints / "10" / "commit_success.txt").unlink()
    train.run(config_of(stores["pretrain"]), str(tmp_path / "run"))
    said = capsys.readouterr().err
    assert said.count("IS DAMAGED") == 2 and "train: resumed at step 5" in said
    assert_same_run(tmp_path / "run", finished[0])
    assert sorted(path.name for path in checkpoints.iterdir()) == ["10", "10.damaged", "12", "12.damaged", "5"]


def test_checkpoints_by_the_clock_and_by_held_out_loss_leave_no_trace_in_the_result(finished, stores, tmp_path, capsys):
    change = {
        "checkpoints__every": 4,
        "checkpoints__minutes": 1e-5,
        "checkpoints__kept": 1,
        "checkpoints__keep_best": 1,
        "checkpoints__keep_every": 8,
    }
    train.run(config_of(stores["pretrain"], **change), str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", finished[0])
    losses = {entry["step"]: entry["loss"] for entry in entries(tmp_path / "run", "eval") if entry["step"]}
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted({8, 12, min(losses, key=losses.get)})
    best = min(losses, key=losses.get)
    assert f"the best so far by lowest loss is step {best}, {losses[best]:.6g}" in capsys.readouterr().err


def test_a_metric_of_the_best_that_does_not_exist_stops_a_run_before_its_first_step(stores, tmp_path):
    change = {"checkpoints__every": 4, "checkpoints__keep_best": 1, "checkpoints__best": "highest accuracy"}
    with pytest.raises(UserError, match="keep_best goes by 'accuracy'.*they have: bits_per_byte.*count, loss"):
        train.run(config_of(stores["pretrain"], **change), str(tmp_path / "run"))
    assert not entries(tmp_path / "run")


def test_a_stopped_run_saves_says_so_and_goes_on(finished, stores, tmp_path, monkeypatch, capsys):
    stopped(monkeypatch, 3, config_of(stores["pretrain"]), tmp_path / "run")
    assert "stopped by a signal, step 3 is saved; the same command goes on" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    train.run(config_of(stores["pretrain"]), str(tmp_path / "run"))
    assert "train: resumed at step 3" in capsys.readouterr().err
    assert_same_run(tmp_path / "run", finished[0])


def test_what_a_run_began_with_is_gone_when_a_checkpoint_is_read(stores, tmp_path, monkeypatch):
    """Two states may be more than the devices hold."""
    begun = []

    def start_state(*arguments, start_state=train._start_state):
        begun.append(start_state(*arguments))
        return begun[-1]

    stopped(monkeypatch, 3, config_of(stores["pretrain"]), tmp_path / "run")
    monkeypatch.setattr(train, "_start_state", start_state)
    read = restore._attempt

    def attempt(*arguments):
        assert all(array.is_deleted() for array in jax.tree.leaves(begun[0][0]))
        return read(*arguments)

    monkeypatch.setattr(restore, "_attempt", attempt)
    train.run(config_of(stores["pretrain"]), str(tmp_path / "run"))
    assert len(begun) == 1


def test_a_notice_stops_a_run_as_a_signal_does(finished, stores, tmp_path, monkeypatch, capsys):
    answers = {"maintenance-event": "NONE", "preempted": "FALSE", "asked": "0"}

    def notice():
        assert until(lambda: answers["asked"] != "0")
        answers["preempted"] = "TRUE"
        assert until(lambda: "notices" not in {thread.name for thread in threading.enumerate()})  # it has been heard

    monkeypatch.setattr(stopping, "_PAUSE", 0.01)
    with metadata_server(answers) as server:
        monkeypatch.setattr(train, "prefetched", at_step(3, notice))
        with pytest.raises(SystemExit) as stop:
            train.run(config_of(stores["pretrain"], watch__notices=server), str(tmp_path / "run"))
    assert stop.value.code == train.EXIT_RESUME
    assert "stopped by a notice (preempted: TRUE), step 3 is saved; the same command goes on" in capsys.readouterr().err
    assert entries(tmp_path / "run", "train") == entries(finished[0], "train")[:3]


def test_rates_may_change_ahead_of_a_run_and_not_behind_it(stores, tmp_path, monkeypatch):
    def changed(step: int) -> TrainConfig:
        change = {"step": step, "rates": {"en": 1.0}}
        return config_of(stores["pretrain"], data__rate_changes=[change])

    stopped(monkeypatch, 3, config_of(stores["pretrain"]), tmp_path / "run")
    with pytest.raises(UserError, match="differ for the steps up to 3, .* changes from step 4 on"):
        train.run(changed(3), str(tmp_path / "run"))
    with pytest.raises(UserError, match="differ for the steps up to 3"):
        train.run(config_of(stores["pretrain"], data__rates={"zh": 1.0}), str(tmp_path / "run"))
    result = train.run(changed(4), str(tmp_path / "run"))
    sources = {
        entry["step"]: {key for key in entry if key.startswith("loss/")} for entry in entries(tmp_path / "run", "train")
    }
    assert all(sources[step] == {"loss/en"} for step in range(4, STEPS + 1)) and "loss/zh" in sources[1]
    assert train.run(changed(4), str(tmp_path / "run")) == result  # finished: the same rates, nothing to do
    with pytest.raises(UserError, match="differ for the steps up to 12"):
        train.run(changed(5), str(tmp_path / "run"))


def test_the_ledger_of_an_epoch_is_what_the_manifest_says(tmp_path):
    store = tiny_store(tmp_path / "store", rows=64)
    result = train.run(config_of(store.folder, data__rates={"zh": 1.0}, duration="8 steps"), str(tmp_path / "run"))
    assert result["ledger"] == {"en": 0, "zh": store.info["splits"]["train"]["zh"]["learned"]}


def test_a_signal_in_the_last_step_lets_the_run_finish(finished, stores, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    monkeypatch.setattr(train, "prefetched", at_step(12, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert train.run(config_of(stores["pretrain"]), str(tmp_path / "run")) == finished[1]
    assert_same_run(tmp_path / "run", finished[0])


def test_a_run_killed_between_its_last_checkpoint_and_its_manifest_only_finishes(finished, stores, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    assert train.run(config_of(stores["pretrain"]), str(tmp_path / "run")) == finished[1]
    assert_same_run(tmp_path / "run", finished[0])


def test_another_mesh_goes_on_from_a_checkpoint(finished, stores, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    for step in ("10", "12"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
    config = config_of(stores["pretrain"], mesh__fsdp=2, mesh__tensor=2, microbatches=2)
    result = train.run(config, str(tmp_path / "run"))
    assert read_json(tmp_path / "run" / "run.json")["mesh"]["tensor"] == 2
    assert result["ledger"] == finished[1]["ledger"]
    assert_close_entries(tmp_path / "run", finished[0], rtol=1e-4)
    assert result["validation"] == pytest.approx(finished[1]["validation"], rel=1e-4)


@pytest.mark.slow
def test_a_run_that_only_skips_ends_and_says_why(stores, tmp_path):
    config = config_of(stores["pretrain"], optimizer__learning_rate=1e30, optimizer__clip_norm=1e30)
    with pytest.raises(UserError, match="the last 5 steps, .* changed nothing: the gradient is not finite"):
        train.run(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_a_run_that_ends_without_a_loss_says_so_each_time(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(train.InLoop, "evaluate", lambda *_: {"loss": float("nan"), "count": 4.0})
    for _ in range(2):
        with pytest.raises(UserError, match="has diverged: after the last step loss of held-out data is not finite"):
            train.run(config_of(stores["pretrain"]), str(tmp_path / "run"))


# ---- Alignment


def test_sft_starts_from_a_run_and_learns_the_masked_tokens_only(finished, stores, tmp_path):
    config = config_of(stores["chat"], model=None, init_from=str(finished[0]))
    result = train.run(config, str(tmp_path / "run"))
    first, *_, last = entries(tmp_path / "run", "eval")
    assert first["loss"] < 5.0  # not from scratch
    assert last["loss"] < first["loss"] and "bits_per_byte" not in last
    assert read_json(tmp_path / "run" / "run.json")["model"] == read_json(finished[0] / "run.json")["model"]
    store, expected = open_store(stores["chat"]), 0
    mixture = Mixture({"en": 30, "zh": 60}, [Phase(0, {"zh": 0.75, "en": 0.25})], 11)
    for example in range(8 * STEPS):
        place = mixture.place(example)
        arrays = row_arrays(store.row("train", place.source, place.index), 32, "chat", True)
        expected += int(arrays["weights"].sum())
    assert sum(result["ledger"].values()) == expected


def test_dpo_starts_level_with_its_reference_and_a_stop_does_not_move_the_reference(
    finished, stores, tmp_path, monkeypatch
):
    config = config_of(
        stores["preference"],
        model=None,
        init_from=str(finished[0]),
        objective=dataclasses.asdict(dpo(reference="cached")),
        optimizer__learning_rate=1e-3,
        duration="6 steps",
        checkpoints__every=3,
        checkpoints__kept=1,
        checkpoints__keep_best=1,
        checkpoints__best="highest accuracy",
        eval__every=3,
    )
    result = train.run(config, str(tmp_path / "whole"))
    first, *_, last = entries(tmp_path / "whole", "eval")
    best = max(entries(tmp_path / "whole", "eval")[1:], key=lambda entry: (entry["accuracy"], entry["step"]))
    assert {int(path.name) for path in (tmp_path / "whole" / "checkpoints").iterdir()} == {6, best["step"]}
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert (first["margin"], first["accuracy"], first["count"]) == (0, 0, 13)  # 8 of zh, 5 of en
    assert last["loss"] < first["loss"] and last["margin"] > 0
    assert result["skipped"] == 0
    stopped(monkeypatch, 3, config, tmp_path / "parts")
    train.run(config, str(tmp_path / "parts"))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_store_of_another_tokenizer_than_the_models_is_refused(finished, stores, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(stores["chat"], store)
    model = store / "tokenizer" / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\xc0\x3e\x00")  # a field that no one knows
    with pytest.raises(UserError, match="is not the tokenizer that made this store"):
        train.run(config_of(store, model=None, init_from=str(finished[0])), str(tmp_path / "run"))
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["result"]["tokenizer"]["digest"] = hashlib.sha256(model.read_bytes()).hexdigest()[:16]
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="made with another tokenizer than .*; build it with `ctllm tokenize"):
        train.run(config_of(store, model=None, init_from=str(finished[0])), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_metrics_of_a_kill_in_the_middle_of_a_line_are_read_on(finished, tmp_path):
    lines = (finished[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    log = MetricsLog(tmp_path, resume_step=5)
    log.write("train", 6, {"loss": 1.0})
    log.close()
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    found = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert found[: len(kept)] == kept
    added = [(entry["kind"], entry["step"]) for entry in map(json.loads, found[len(kept) :])]
    assert added == [("job", 5), ("train", 6)]
