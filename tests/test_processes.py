"""Jobs of several processes: the same run, and a checkpoint that any number of processes can take up."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from tiny_models import tiny_model
from tiny_stores import tiny_store

from ctllm_jax import convert, hf_export
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.status import EXIT_LOST, EXIT_RESUME
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
    "--config.optimizer.warmup=2 steps",
    "--config.batch_size=8",
    "--config.duration=6 steps",
    "--config.log.every=1",
    "--config.eval.every=3",
    "--config.checkpoints.every=3",
)


def started(
    processes: int,
    devices: int,
    store: pathlib.Path,
    workdir: pathlib.Path,
    *options: str,
    programs: Mapping[int, str] = types.MappingProxyType({}),
) -> list[subprocess.Popen]:
    """`ctllm train` in so many processes of so many devices each; some may run Python of their own that calls it."""
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
        command = [
            sys.executable,
            *(["-c", programs[index]] if index in programs else ["-m", "ctllm_jax.cli"]),
            "train",
            *OPTIONS,
            *several,
            *options,
        ]
        command += [f"--config.data.store={store}", f"--workdir={workdir}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    return running


def job(processes: int, devices: int, store: pathlib.Path, workdir: pathlib.Path, *options: str) -> None:
    """Runs a job to its end; all must succeed."""
    running = started(processes, devices, store, workdir, *options)
    logs = [process.communicate(timeout=240)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(log[-2000:] for log in logs)


def wait_for_step(workdir: pathlib.Path, step: int) -> None:
    """Until a run has written down a step."""
    for _ in range(240 * 20):
        with contextlib.suppress(FileNotFoundError):
            if f'"step": {step},' in (workdir / "metrics.jsonl").read_text():
                return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came")


FROM_THE_FIRST = ("--config.checkpoints.every=1", "--config.checkpoints.kept=6")


def losses(workdir: pathlib.Path) -> list[float]:
    entries = [*read_metrics(workdir, "train"), *read_metrics(workdir, "eval")]
    return [entry["loss"] for entry in sorted(entries, key=lambda e: (e["step"], e["kind"]))]


def first_moments(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Adam's, after the first step: the clipped gradient, by parameter, times a constant."""
    folder = epath.Path(workdir).absolute() / "checkpoints" / "1" / "optimizer"
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree)
        saved = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=host))
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(saved)[0]}
    return {name: np.float64(leaf) for name, leaf in named.items() if "'mu'" in name}


def assert_same_gradient(workdir: pathlib.Path, other: pathlib.Path) -> None:
    found, expected = first_moments(workdir), first_moments(other)
    assert found.keys() == expected.keys() and len(expected) > 8
    for name, moment in expected.items():
        assert np.linalg.norm(found[name] - moment) <= 1e-5 * np.linalg.norm(moment) > 0, name


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """(store, folder of a run by one process, folder of the same run by two)."""
    folder = tmp_path_factory.mktemp("alike")
    store = tiny_store(folder / "store").folder
    job(1, 4, store, folder / "one", *FROM_THE_FIRST)
    job(2, 2, store, folder / "two", *FROM_THE_FIRST)
    return store, folder / "one", folder / "two"


@pytest.mark.slow
def test_two_processes_train_as_one_does(alike):
    _, one, two = alike
    assert len(losses(one)) == 9
    assert losses(two)[:2] == pytest.approx(losses(one)[:2], rel=1e-6)  # of the same parameters: held out, of step 1
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert_same_gradient(two, one)
    files = {str(path.relative_to(one)) for path in one.glob("*.json*")}
    assert {str(path.relative_to(two)) for path in two.glob("*.json*")} == files


@pytest.mark.slow
def test_one_process_takes_up_what_two_left(alike, tmp_path):
    store, one, two = alike
    shutil.copytree(two, tmp_path / "moved")
    (tmp_path / "moved" / "manifest.json").unlink()
    for step in ("4", "5", "6"):
        shutil.rmtree(tmp_path / "moved" / "checkpoints" / step)
    job(1, 4, store, tmp_path / "moved")
    assert losses(tmp_path / "moved") == pytest.approx(losses(one), rel=1e-5)


ALIGN = """
import dataclasses, os, sys
sys.path.insert(0, "tests")
from tiny_runs import config_of
from tiny_objectives import dpo
from ctllm_jax import train
from ctllm_jax.data.store import open_store

store, workdir = (argument.partition("=")[2] for argument in sys.argv[-2:])
changes = {{"lora__rank": 2}} if {adapters} else {{}}
if open_store(store).kind == "preference":
    changes["objective"] = dataclasses.asdict(dpo(reference="cached" if {adapters} else "live"))
changes |= {{"model": None, "init_from": {origin!r}, "optimizer__ema_half_life": "2 steps", "duration": "4 steps"}}
changes |= {{"eval__every": 2, "checkpoints__every": 2, "distributed": "JAX_PROCESS_ID" in os.environ}}
train.run(config_of(store, **changes), workdir)
"""


@pytest.mark.slow
def test_two_processes_start_from_a_model_as_one_does(tmp_path):
    """SFT of a Hugging Face folder; DPO of a run, with adapters; DPO of what that run of adapters gave."""
    stores = {kind: tiny_store(tmp_path / kind, kind).folder for kind in ("chat", "preference")}
    model = tiny_model(max_length=32)
    convert.write_run(model, tmp_path / "run", "float32")
    hf_export.export(model.config, model.params, model.tokenizer, tmp_path / "folder", "float32")

    def same(kind: str, origin: pathlib.Path, adapters: bool) -> pathlib.Path:
        program, folder = ALIGN.format(origin=str(origin), adapters=adapters), tmp_path / f"from-{origin.name}"
        for processes, name in ((1, "one"), (2, "two")):
            programs = dict.fromkeys(range(processes), program)
            running = started(processes, 8 // processes, stores[kind], folder / name, programs=programs)
            logs = [process.communicate(timeout=240)[1] for process in running]
            assert all(process.returncode == 0 for process in running), "\n".join(log[-2000:] for log in logs)
        assert len(losses(folder / "one")) == 7
        assert losses(folder / "two") == pytest.approx(losses(folder / "one"), rel=1e-5)
        return folder / "two"

    same("chat", tmp_path / "folder", adapters=False)
    same("preference", same("preference", tmp_path / "run", adapters=True), adapters=False)


LONG = ("--config.duration=100000 steps", "--config.eval.every=100000", "--config.checkpoints.every=100000")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_who_loses_another_process_ends_within_a_minute_and_says_whom(tmp_path, victim):
    running = started(2, 2, tiny_store(tmp_path / "store").folder, tmp_path / "run", *LONG)
    wait_for_step(tmp_path / "run", 5)
    running[victim].kill()
    since = time.monotonic()
    _, log = running[1 - victim].communicate(timeout=240)
    running[victim].communicate()
    assert time.monotonic() - since < 60
    # The coordinator is missed by JAX as well, which may be quicker to abort than we are to say so.
    if victim == 0 and running[1].returncode == -signal.SIGABRT:
        assert "Either the leader task was preempted/died" in log
    else:
        assert running[1 - victim].returncode == EXIT_LOST, log[-2000:]
        assert f"ctllm: error: process {victim} is gone (" in log and "start the job again" in log


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    running = started(2, 2, tiny_store(tmp_path / "store").folder, tmp_path / "run", *LONG)
    wait_for_step(tmp_path / "run", 5)
    running[1].send_signal(signal.SIGTERM)
    logs = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [EXIT_RESUME] * 2
    first, second = (re.findall(r"step (\d+) is saved; the same command goes on", log) for log in logs)
    assert first == second and len(first) == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == first


FAILS_IN_ONE = """
import sys
from ctllm_jax import cli, train
from ctllm_jax.common.errors import Unanswered, UserError

def batches(stream, start, stop, mesh, prefetched=train.prefetched):
    for step, batch in enumerate(prefetched(stream, start, stop, mesh)):
        if step == 3:
            raise {error}
        yield batch

train.prefetched = batches
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("ValueError('a bad row')", 1, "process 1 failed (ValueError: a bad row)"),
        ("UserError('mend it')", 2, "process 1 failed (UserError: mend it)"),
        ("Unanswered('later')", 69, "process 1 failed (Unanswered: later)"),
    ],
)
def test_an_error_in_one_process_ends_the_others_and_its_reason_reaches_them(tmp_path, error, status, said):
    program = FAILS_IN_ONE.format(error=error)
    running = started(2, 2, tiny_store(tmp_path / "store").folder, tmp_path / "run", *LONG, programs={1: program})
    logs = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [EXIT_LOST, status], "\n".join(logs)
    assert said in logs[0] and error.partition("'")[2].rstrip("')") in logs[1]
    assert ("Traceback" in logs[1]) == (status == 1)


ALONE = """
from ctllm_jax import processes
processes._MEETING = 2 / 60
processes.join()
"""


def test_a_process_that_never_meets_the_others_says_where_it_waited_and_what_to_look_at():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for index, said in (
        (0, ", where it waits for them: have all been started, and can they reach this address and port?"),
        (
            1,
            ", which cannot be reached from here ([Errno 111] Connection refused): does process 0 run, ",
        ),
    ):
        place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        ended = subprocess.run(
            [sys.executable, "-c", ALONE],
            env={**os.environ, **place},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == EXIT_LOST, ended.stderr
        text = f"ctllm: error: process {index} has not met the others within 0.0333333 minutes at {address}{said}"
        assert text in ended.stderr and "Traceback" not in ended.stderr


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        join()


def test_a_jax_whose_insides_have_changed_is_refused_by_name(monkeypatch):
    for changed in (types.SimpleNamespace(client=object()), types.SimpleNamespace()):
        monkeypatch.setattr("jax._src.distributed.global_state", changed)
        with pytest.raises(UserError, match=f"jax {jax.__version__} lacks .* use jax 0.10 to 0.12"):
            join()
