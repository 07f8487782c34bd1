"""What becomes of metrics when a disk, a tracker or a profiler fails: the run goes on, and no line is lost silently."""

import dataclasses
import sys
import threading
import types

import jax
import pytest
from test_metrics import PLAIN, lines_of
from tiny_runs import config_of

from ctllm_jax.common.errors import UserError
from ctllm_jax.metrics import MetricsLog, profile
from ctllm_jax.metrics.log import open_log
from ctllm_jax.metrics.trackers import TensorBoard


class Slow:
    """A tracker that waits to be allowed to write."""

    def __init__(self):
        self.allowed, self.got = threading.Event(), []

    def write(self, entry):
        assert self.allowed.wait(30)
        self.got.append(entry["step"])

    def close(self):
        self.got.append("closed")


def test_no_tracker_keeps_the_loop_or_a_checkpoint_waiting(tmp_path):
    slow = Slow()
    log = MetricsLog(tmp_path, 0, trackers=[slow])
    for step in range(1, 4):
        log.write("train", step, {"loss": 1.0})
    log.flush()
    assert slow.got == [] and [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3]
    slow.allowed.set()
    log.close()
    assert slow.got == [1, 2, 3, "closed"]


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file in the way")
    log = MetricsLog(tmp_path, 0, trackers=[TensorBoard(tmp_path, 0)])
    log.write("train", 1, {"loss": 1.0})
    log.write("train", 2, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2]
    assert capsys.readouterr().err.count("train: TensorBoard failed and gets no more metrics: FileExistsError") == 1


class FullDisk:
    """A file that takes so many more bytes, until there is room again."""

    def __init__(self, file, room: float):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(data[: int(min(self.room, len(data)))])
        self.room -= written
        return written

    def close(self):
        self.file.close()


def test_lines_that_a_full_disk_does_not_take_are_written_later(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0)
    disk = log._lines._file = FullDisk(log._lines._file, 20)
    for step in range(1, 4):
        log.write("train", step, {"loss": 1.0})
    log.flush()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()[1]) == 20
    disk.room = float("inf")
    log.write("train", 4, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written ([Errno 28]") == 1


def test_lines_that_a_full_disk_never_took_are_an_error_at_the_end(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log._lines._file = FullDisk(log._lines._file, 0)
    log.write("train", 1, {"loss": 1.0})
    with pytest.raises(UserError, match=r"metrics.jsonl lacks the last \d+ bytes"):
        log.close()


def test_other_processes_than_the_first_write_nothing(tmp_path):
    stage = types.SimpleNamespace(folder=tmp_path, started=0.0, fingerprint="")
    log = open_log(dataclasses.replace(PLAIN, tensorboard=True, wandb="x"), stage, 0, {}, writes=False)
    log.write("train", 1, {"loss": 1.0})
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases_must_be_installed_to_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    stage = types.SimpleNamespace(folder=tmp_path, started=0.0, fingerprint="")
    with pytest.raises(UserError, match=r"log.wandb needs the library: pip install 'ctllm-jax\[wandb\]'"):
        open_log(dataclasses.replace(PLAIN, wandb="x"), stage, 0, {}, writes=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log__every": 0}, "every must be at least 1"),
        ({"log__profile": [5]}, r"profile \(5,\) is not \(first step, last step\)"),
        ({"log__profile": [5, 4]}, r"profile \(5, 4\) is not"),
        ({"log__profile": [0, 4]}, r"profile \(0, 4\) is not"),
    ],
)
def test_what_cannot_be_logged_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        config_of("store", **change)


def test_a_profile_that_fails_lets_the_run_go_on(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("Only one profile may be run at a time.")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    with profile.Profiler(tmp_path, (2, 3)) as profiler:
        assert [profiler.due(step) for step in (1, 2, 3, 4)] == [False, True, True, False]
        profiler.start(2)
        assert not profiler.due(3) and not profiler.over(3)
    assert "no profile of step 2: Only one profile" in capsys.readouterr().err


def test_a_profile_is_written_when_the_run_ends_within_it(tmp_path, monkeypatch):
    stopped = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: stopped.append(True))
    with pytest.raises(SystemExit), profile.Profiler(tmp_path, (2, 9)) as profiler:
        profiler.start(2)
        raise SystemExit(75)
    assert stopped == [True]
