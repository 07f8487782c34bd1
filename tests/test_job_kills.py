"""A job of two processes that loses one in a save, or meets damage or a full disk, ends in the undisturbed bits."""

import pathlib
import shutil
import signal
import subprocess
import time

import pytest
from test_checkpoint import cut, largest
from test_kills import assert_same_bits, saved
from test_processes import started
from tiny_runs import assert_close_entries
from tiny_stores import tiny_store

from ctllm_jax.common.status import EXIT_LOST

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("stores") / "store").folder


def start(workdir: pathlib.Path, store: pathlib.Path, traps: dict[int, str], processes: int = 2) -> list:
    """Processes that train twenty steps on four devices in all; `traps` is Python that one of them runs before."""
    settings = ("--config.duration=20 steps", "--config.checkpoints.every=5", "--config.checkpoints.kept=2")
    program = "import sys; sys.path.insert(0, 'tests'); import kill_points; {}; from ctllm_jax import cli; cli.main()"
    programs = {index: program.format(trap) for index, trap in traps.items()}
    return started(processes, 4 // processes, store, workdir, *settings, programs=programs)


def finish(running: list[subprocess.Popen]) -> list[str]:
    logs = [process.communicate(timeout=600)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(log[-3000:] for log in logs)
    return logs


@pytest.fixture(scope="module")
def undisturbed_pair(store, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "pair"
    finish(start(workdir, store, {}))
    return workdir


@pytest.mark.parametrize(
    ("index", "point"),
    [(1, "before its arrays' sizes"), (0, "before the step's renaming"), (0, "before the last item's renaming")],
)
def test_a_job_of_two_killed_in_a_save_ends_in_the_same_bits(undisturbed_pair, store, tmp_path, index, point):
    workdir = tmp_path / "run"
    running = start(workdir, store, {index: f"kill_points.arm({point!r})"})
    assert running[index].wait(timeout=600) == -signal.SIGKILL
    since = time.monotonic()
    _, log = running[1 - index].communicate(timeout=240)  # it waits for the other at a barrier of the save
    assert time.monotonic() - since < 60
    assert running[1 - index].returncode in (EXIT_LOST, -signal.SIGABRT), log[-2000:]  # ours, or the coordinator's end
    running[index].communicate()
    logs = finish(start(workdir, store, {}))
    assert all("train: resumed at step 5" in log for log in logs)
    assert_same_bits(workdir, undisturbed_pair)


def test_a_job_of_two_takes_the_same_step_though_only_one_of_them_meets_the_damage(undisturbed_pair, store, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed_pair, workdir)
    (workdir / "manifest.json").unlink()
    cut(largest(workdir / "checkpoints" / "20" / "params" / "ocdbt.process_1"))
    logs = finish(start(workdir, store, {}))
    assert all("train: resumed at step 15" in log for log in logs)
    assert sum(log.count("THE CHECKPOINT OF STEP 20 IS DAMAGED") for log in logs) == 1
    assert_same_bits(workdir, undisturbed_pair)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["15", "20", "20.damaged"]


@pytest.mark.parametrize("step", [10, 20])
def test_a_disk_that_is_full_for_one_of_two_is_waited_for_by_both(undisturbed_pair, store, tmp_path, step):
    """Opening a file of process 1 raises ENOSPC once; steps 10 and 20: made up for later, and at the end of the run."""
    ending = f"/{step}.orbax-checkpoint-tmp/params.orbax-checkpoint-tmp/array_metadatas/process_1"
    impatient = "from ctllm_jax import checkpoint; checkpoint.PAUSES = (1, 1)"
    full = f"kill_points.fill_disk_once({ending!r}); {impatient}"
    logs = finish(start(tmp_path / "run", store, {0: impatient, 1: full}))
    assert all(log.count(f"the checkpoint of step {step} could not be written (") == 1 for log in logs)
    assert "(another process could not write its part, and says why)" in logs[0]
    assert "No space left on device" in logs[1]
    assert_same_bits(tmp_path / "run", undisturbed_pair)
    before, last = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert last == 20 and (10 < before < 20 if step == 10 else before == 15)  # when the pause is over, or on schedule


@pytest.mark.parametrize("processes", [1, 4])
def test_other_numbers_of_processes_take_up_what_two_left(undisturbed_pair, store, tmp_path, processes):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed_pair, workdir)
    (workdir / "manifest.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "20")
    logs = finish(start(workdir, store, {}, processes))
    assert all("train: resumed at step 15" in log for log in logs)
    assert_close_entries(workdir, undisturbed_pair, rtol=1e-5)
    assert saved(workdir)["record"]["ledger"] == saved(undisturbed_pair)["record"]["ledger"]
