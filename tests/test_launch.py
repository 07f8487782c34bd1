"""`ctllm launch`: its command line, and training that loses processes or is stopped."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys

import pytest
from command import ctllm
from test_processes import OPTIONS
from tiny_runs import assert_same_run
from tiny_stores import tiny_store
from waiting import ROOT, WAIT, once_saved, once_there, pids_of

from ctllm_jax.common.errors import UserError
from ctllm_jax.verbs import Option
from launch import run as launch_run
from launch import view
from launch.jobs import Job, State
from launch.local import processes
from launch.target import Payload, Target

TRAIN = ("train", "--config=configs/pretrain.py:tiny", "--config.data.store=a b", "--workdir=RUN")


# ---- The command line


@pytest.fixture(autouse=True)
def own_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ctllm"])


def test_help_names_targets_and_flags(capsys):
    assert "\n  launch      " in ctllm(capsys, "--help")[1]
    for asked in (["launch"], ["launch", "--help"]):
        status, out, _ = ctllm(capsys, *asked)
        assert status == 0 and "\n  local       processes on this machine" in out
    status, out, _ = ctllm(capsys, "launch", "local", "--help")
    assert status == 0
    assert all(f"\n  {flag}" in out for flag in ("--processes=N", "--devices=M", "--restarts=K", "--dry_run"))
    assert "token store -> checkpoints" in ctllm(capsys, "launch", "local", "--", "train", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moon", "--", *TRAIN], "unknown target 'moon'; there are: local"),
        (["local", "--process=2", "--", *TRAIN], "launch local: Unknown command line flag 'process'"),
        (["local", "--processes=two", "--", *TRAIN], "launch local: flag --processes=two"),
        (["local", "--processes=0", "--", *TRAIN], "--processes=0: must be at least 1"),
        (["local", "--restarts=-1", "--", *TRAIN], "--restarts=-1: must be at least 0"),
        (["local", "train"], "unexpected argument 'train' (the verb comes after `--`)"),
        (["local", "--processes=2"], "give the verb to run after `--`"),
        (["local", "--"], "give the verb to run after `--`"),
        (["local", "--", "training"], "unknown verb 'training'; there are: corpus, "),
        (["local", "--", "launch", "local"], "unknown verb 'launch'"),
        (["local", "--", *TRAIN, "--config.stepz=1"], "train: "),
        (["local", "--processes=2", "--", "eval"], "eval runs in one process, not in 2: give --processes=1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_starts_nothing(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("launch.local.hold", lambda *_: pytest.fail("started"))
    status, out, err = ctllm(capsys, "launch", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("ctllm: error: ") and message in err and err.count("\n") == 1


def test_a_dry_run_prints_what_would_be_started(capsys, monkeypatch):
    monkeypatch.setattr("launch.local.hold", lambda *_: pytest.fail("started"))
    status, out, err = ctllm(capsys, "launch", "local", "--processes=2", "--devices=3", "--dry_run", "--", *TRAIN)
    assert (status, err) == (0, "")
    first, second = (shlex.split(line) for line in out.splitlines())
    address = first[1].removeprefix("JAX_COORDINATOR_ADDRESS=")
    assert address.startswith("127.0.0.1:")
    for index, words in enumerate((first, second)):
        assert words == [
            "env",
            f"JAX_COORDINATOR_ADDRESS={address}",
            f"JAX_COORDINATOR_BIND_ADDRESS={address}",
            "JAX_NUM_PROCESSES=2",
            "PYTHONUNBUFFERED=1",
            "JAX_PLATFORMS=cpu",
            "JAX_NUM_CPU_DEVICES=3",
            f"JAX_PROCESS_ID={index}",
            *(sys.executable, "-m", "ctllm_jax.cli", *TRAIN, "--config.distributed=True"),
        ]
    assert "'--config.data.store=a b'" in out


def test_one_process_is_the_plain_command_and_each_attempt_has_a_port_of_its_own():
    payload = Payload("eval", ("--workdir=x",), distributed=False)
    attempts = [processes(payload, 1, 0) for _ in range(2)]
    assert attempts[0][0].command == (sys.executable, "-m", "ctllm_jax.cli", "eval", "--workdir=x")
    assert "JAX_PLATFORMS" not in attempts[0][0].environment
    ports = [attempt[0].environment["JAX_COORDINATOR_ADDRESS"] for attempt in attempts]
    assert ports[0] != ports[1]


def test_a_target_is_a_table_entry(capsys, monkeypatch):
    calls = []
    target = Target("the moon", {"craters": Option("--craters=N", "how many", 1)}, lambda *call: calls.append(call))
    monkeypatch.setitem(launch_run.TARGETS, "moon", "moon")
    monkeypatch.setitem(sys.modules, "moon", type(sys)("moon"))
    sys.modules["moon"].TARGET = target
    assert ctllm(capsys, "launch", "moon", "--craters=4", "--dry_run", "--", *TRAIN)[0] is None
    assert calls == [(Payload("train", TRAIN[1:], True, "RUN"), {"craters": 4}, True)]


def test_the_launcher_needs_no_jax():
    program = "import sys, launch.local, launch.run; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


# ---- Real training


def launch(store: pathlib.Path, workdir: pathlib.Path, *options: str, log: pathlib.Path) -> subprocess.Popen:
    """`ctllm launch local` with a small training run of two processes; standard error goes to `log`."""
    command = [sys.executable, "-m", "ctllm_jax.cli", "launch", "local", "--processes=2", "--devices=2"]
    command += ["--", "train", *OPTIONS, f"--config.data.store={store}", f"--workdir={workdir}", *options]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, stderr=file)


@pytest.mark.slow
def test_a_job_that_lost_a_process_and_one_that_was_stopped_end_in_the_undisturbed_bits(tmp_path):
    store = tiny_store(tmp_path / "store").folder
    long = ("--config.duration=32 steps", "--config.checkpoints.every=8", "--config.eval.every=16")
    log = tmp_path / "log"

    whole = launch(store, tmp_path / "whole", *long, log=log)
    assert whole.wait(timeout=5 * WAIT) == 0, log.read_text()
    assert "[0] train lm: 32/32 steps" in log.read_text()

    # Process 1, then, of what was started again, the coordinator.
    killed = launch(store, tmp_path / "killed", *long, log=log)
    for victim, step in ((1, 8), (0, 16)):
        once_saved(tmp_path / "killed", step)
        os.kill(pids_of(tmp_path / "killed")[victim], signal.SIGKILL)
        once_there(log, f"launch: process {victim} was killed by SIGKILL")
    assert killed.wait(timeout=5 * WAIT) == 0, log.read_text()
    assert "[0] train: resumed at step" in log.read_text() and "(restart 2 of 3)" in log.read_text()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")

    stopped = launch(store, tmp_path / "stopped", *long, log=log)
    once_there(tmp_path / "stopped" / "metrics.jsonl", '"step": 7,')
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(timeout=WAIT) == 75, log.read_text()
    assert "is saved; the same command goes on" in log.read_text() and not pids_of(tmp_path / "stopped")
    assert launch(store, tmp_path / "stopped", *long, log=log).wait(timeout=5 * WAIT) == 0, log.read_text()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_a_mistake_that_only_the_processes_see_ends_the_job_at_once(tmp_path):
    store = tiny_store(tmp_path / "store").folder
    log = tmp_path / "log"
    job = launch(store, tmp_path / "run", "--config.model.vocab_size=100", log=log)
    assert job.wait(timeout=2 * WAIT) == 2
    assert "the model only 100" in log.read_text() and "starting all processes again" not in log.read_text()


# ---- Following a job


def test_a_scheduler_that_does_not_answer_for_a_moment_ends_no_following(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CTLLM_JOBS", str(tmp_path))
    monkeypatch.setattr(view, "_ASK", 0.0)
    monkeypatch.setattr(view, "_TICK", 0.01)
    job = Job("train-1", "slurm", ("train",), "", 0.0, {})
    job.save()
    answers = [
        State("running"),
        UserError("squeue did not answer"),
        UserError("squeue did not answer"),
        State("done", 0),
    ]

    def state(_) -> State:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert view.follow(job, Target("", {}, None, state)) == 0
    said = [f"launch: train-1: {text}" for text in ("running", "squeue did not answer", "done")]
    assert capsys.readouterr().err.splitlines() == said
    answers.append(UserError("no squeue here"))
    with pytest.raises(UserError, match="no squeue here"):  # it has never answered
        view.follow(job, Target("", {}, None, state))
