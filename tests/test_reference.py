"""The reference's log-probabilities: computed once, kept with the run, checked when they are read again."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_models import tiny_model
from tiny_objectives import dpo
from tiny_stores import tiny_store, train_values

from ctllm_jax import reference
from ctllm_jax.common.config import build
from ctllm_jax.common.files import read_json, write_json
from ctllm_jax.common.status import EXIT_RESUME
from ctllm_jax.data.batches import rows_arrays
from ctllm_jax.hf_export import export
from ctllm_jax.metrics import read_metrics
from ctllm_jax.model import abstract_params, logical_axes
from ctllm_jax.objectives import answer_logprobs
from ctllm_jax.sharding import MeshConfig, make_mesh, shardings
from ctllm_jax.train_config import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
OBJECTIVE = dpo(reference="cached")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("stores") / "preference", "preference", rows=21)  # not whole batches


@pytest.fixture(scope="module")
def scored(store):
    """(run_dir, origin, tail_weight) -> the scored store, of one model over two devices."""
    values = train_values(store.folder) | {"objective": dataclasses.asdict(OBJECTIVE)}
    config, model = build(TrainConfig, values), tiny_model()
    mesh = make_mesh(MeshConfig(1, 2, 1, 1), jax.devices()[:2])
    layout = shardings(mesh, abstract_params(model.config), logical_axes(model.config))

    def call(run_dir, origin="weights", **options):
        with jax.set_mesh(mesh):
            params = jax.device_put(model.params, layout)
            return reference.scored_store(run_dir, store, config, model.config, params, origin, mesh, **options)

    return call


def everything(store) -> dict:
    """{(split, source): what the reference thinks of its rows}."""
    return {
        (split, source): np.array([row.reference for row in store.rows(split, source)], np.float32)
        for split in ("train", "validation")
        for source in store.sources(split)
    }


def test_every_row_has_what_the_model_says_of_it_alone(scored, store, tmp_path):
    found, model = everything(scored(tmp_path)), tiny_model()
    assert {name: len(rows) for name, rows in found.items()} == {
        ("train", "zh"): 21, ("train", "en"): 10, ("validation", "zh"): 11, ("validation", "en"): 5
    }  # fmt: skip
    for (split, source), expected in found.items():
        rows = list(store.rows(split, source))
        batch = rows_arrays(rows[-3:], 32, "preference", True)
        alone = jax.jit(lambda batch: answer_logprobs(OBJECTIVE, model.config, model.params, batch))(batch)
        np.testing.assert_allclose(alone, expected[-3:], rtol=1e-5)


def test_it_is_computed_once_and_read_again_while_it_is_whole(scored, tmp_path, monkeypatch, capsys):
    before = everything(scored(tmp_path))
    monkeypatch.setattr(reference, "held_out", None)  # no pair is read by the model any more
    after = everything(scored(tmp_path))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    for origin, damage in (("weights", True), ("others", False)):
        if damage:
            file = tmp_path / "reference" / "train-zh.npy"
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        with pytest.raises(TypeError):  # it would be computed anew
            scored(tmp_path, origin)
        assert ("train-zh.npy is not what was written" if damage else "another store or reference") in (
            capsys.readouterr().err
        )


def test_a_kill_before_the_last_file_leaves_nothing_that_is_taken_for_whole(scored, tmp_path):
    scored(tmp_path)
    note = tmp_path / "reference" / "reference.json"
    told = read_json(note)
    note.unlink()
    assert reference._read(note.parent, told["fingerprint"], {("train", "zh"): 21}) is None
    write_json(note, told)
    assert reference._read(note.parent, told["fingerprint"], {("train", "zh"): 21}) is not None
    (tmp_path / "reference" / "train-zh.npy").unlink()
    assert reference._read(note.parent, told["fingerprint"], {("train", "zh"): 21}) is None


def test_what_was_scored_before_a_stop_is_not_scored_again(scored, tmp_path, capsys):
    asked = []

    def result(name: str, at: int | None = None, origin: str = "weights"):
        """What is found where the run is stopped before a batch, if any."""

        def stop(batch: int) -> bool:
            asked.append(batch)
            return batch == at

        return everything(scored(tmp_path / name, origin, stop=stop))

    with pytest.raises(SystemExit) as end:
        result("stopped", at=2)
    assert end.value.code == EXIT_RESUME and "the same command goes on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        result("stopped", at=0, origin="others")  # which cannot go on from there
    whole, count = result("whole"), asked[-1] + 1
    found = result("stopped")
    assert asked == [0, 1, 2, 0, *range(count), *range(2, count)] and count > 5
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    assert not (tmp_path / "stopped" / "reference" / "begun.npz").exists()


@pytest.mark.slow
def test_two_processes_have_the_reference_of_one(store, tmp_path):
    model = tiny_model()
    export(model.config, model.params, model.tokenizer, tmp_path / "hf", "float32")
    options = [f"--config.data.store={store.folder}", f"--config.init_from={tmp_path / 'hf'}", "--config.batch_size=4"]
    options += ["--config.duration=4 steps", "--config.log.every=1", "--config.eval.every=2"]
    for processes, name in ((1, "one"), (2, "two")):
        dpo_job(processes, *options, f"--workdir={tmp_path / name}")
    (tmp_path / "two" / "manifest.json").unlink()  # the run is taken up again, and process 0 reads for both
    dpo_job(2, *options, f"--workdir={tmp_path / 'two'}")
    for file in sorted((tmp_path / "one" / "reference").glob("*.npy")):
        np.testing.assert_allclose(np.load(file), np.load(tmp_path / "two" / "reference" / file.name), rtol=1e-5)
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name, "train")] for name in ("one", "two"))
    assert len(one) == 4
    np.testing.assert_allclose(one, two, rtol=1e-4)


def dpo_job(processes: int, *options: str) -> None:
    """`ctllm train` with configs/dpo.py:tiny in processes of two devices in all; all must succeed."""
    running = []
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    for index in range(processes):
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(2 // processes)}
        command = [sys.executable, "-m", "ctllm_jax.cli", "train", "--config=configs/dpo.py:tiny", *options]
        if processes > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
            environment["JAX_PROCESS_ID"] = str(index)
            command.append("--config.distributed=True")
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    logs = [process.communicate(timeout=240)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(log[-2000:] for log in logs)
