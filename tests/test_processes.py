"""Jobs of several processes: the same run, and a checkpoint that any number of processes can take up."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
from tiny_stores import tiny_store

from ctllm_jax.common.errors import UserError
from ctllm_jax.metrics import read_metrics
from ctllm_jax.processes import join

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPTIONS = (
    "--config=configs/pretrain.py:tiny",
    "--config.model.num_layers=2",
    "--config.model.d_model=32",
    "--config.model.head_dim=8",
    "--config.model.d_ff=64",
    "--config.model.vocab_size=400",
    "--config.model.padded_vocab_size=400",
    "--config.model.max_length=32",
    "--config.optimizer.warmup_steps=2",
    "--config.batch_size=8",
    "--config.steps=6",
    "--config.log_every=1",
    "--config.eval_every=3",
    "--config.checkpoint_every=3",
)


def job(processes: int, devices: int, store: pathlib.Path, workdir: pathlib.Path, *options: str) -> None:
    """Runs `ctllm train` in so many processes of so many devices each; all must succeed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running = []
    for index in range(processes):
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
        several = []
        if processes > 1:
            several = ["--config.distributed=True"]
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        command = [sys.executable, "-m", "ctllm_jax.cli", "train", *OPTIONS, *several, *options]
        command += [f"--config.data.store={store}", f"--workdir={workdir}"]
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    logs = [process.communicate(timeout=240)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(log[-2000:] for log in logs)


def losses(workdir: pathlib.Path) -> list[float]:
    entries = [*read_metrics(workdir, "train"), *read_metrics(workdir, "eval")]
    return [entry["loss"] for entry in sorted(entries, key=lambda e: (e["step"], e["kind"]))]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    store = tiny_store(tmp_path / "store").folder
    job(1, 4, store, tmp_path / "one")
    job(2, 2, store, tmp_path / "two")
    assert len(losses(tmp_path / "one")) == 9
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    files = {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").glob("*.json*")}
    assert {str(path.relative_to(tmp_path / "two")) for path in (tmp_path / "two").glob("*.json*")} == files


@pytest.mark.slow
def test_one_process_takes_up_what_two_left(tmp_path):
    store = tiny_store(tmp_path / "store").folder
    job(1, 4, store, tmp_path / "one")
    job(2, 2, store, tmp_path / "moved")
    (tmp_path / "moved" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "6")
    job(1, 4, store, tmp_path / "moved")
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        join()
