"""metrics.jsonl, one object a line: {"kind": "train" | "eval" | "job", "step", "time", ...}; see docs/metrics.md.

Lines are written by one thread, trackers are told by another: neither a file system nor a tracker keeps the training
loop waiting, and no tracker a checkpoint.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import write_atomic
from ctllm_jax.common.manifest import Stage
from ctllm_jax.metrics.goodput import take_up
from ctllm_jax.metrics.trackers import TensorBoard, Tracker, WeightsAndBiases


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written down while a run goes on."""

    every: int  # [steps] between lines of metrics.jsonl
    tensorboard: bool  # the same as TensorBoard's event files, in RUN/tensorboard
    wandb: str | None  # and to Weights & Biases, as a run of this project
    profile: tuple[int, ...]  # [steps] (first, last) step of a profile, in RUN/profile; empty: none but on SIGUSR1

    def __post_init__(self):
        if self.every < 1:
            raise ValueError("every must be at least 1")
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            raise ValueError(f"profile {self.profile} is not (first step, last step); steps count from 1")


class MetricsLog:
    """A run's metrics.jsonl and its trackers.

    A run that goes on from the checkpoint of step `resume_step` first drops the lines of later steps; one that starts
    (resume_step 0) drops all: a run killed before its first checkpoint says everything again.

    Attributes:
      folder: the run directory.
      timesheet: where the job's time has gone.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        resume_step: int,
        started: float | None = None,
        trackers: Sequence[Tracker] = (),
        writes: bool = True,
    ):
        """`started`: when the folder was opened (now); `writes` is False in all processes but the first."""
        self.folder = pathlib.Path(run_dir)
        path = self.folder / "metrics.jsonl"
        old = list(_whole_lines(path)) if writes and path.exists() else []
        self.timesheet = take_up(old, resume_step, time.time() if started is None else started)
        self._trackers, self._writes, self._last = list(trackers), writes, None
        if not writes:
            return
        kept = [entry for entry in old if resume_step and entry["step"] <= resume_step]
        lines = [*kept, _entry("job", resume_step, self.timesheet.entry())]
        write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in lines))
        self._lines = _Lines(path)
        # When the program ends, however it does so by itself, these finish first what was handed to them.
        self._writer, self._tracking = (concurrent.futures.ThreadPoolExecutor(1, name) for name in ("log", "trackers"))

    def write(self, kind: str, step: int, values: dict) -> None:
        """Hands over one line and returns at once; lines are written in their order."""
        if self._writes:
            entry = _entry(kind, step, values)
            self._last = self._writer.submit(self._lines.add, json.dumps(entry) + "\n")
            if self._trackers:
                self._tracking.submit(self._track, entry)

    def flush(self) -> None:
        """Waits until everything handed over is in metrics.jsonl."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Writes what is left, and waits for the trackers.

        Raises:
          UserError: lines could not be written; metrics.jsonl lacks them.
        """
        if not self._writes:
            return
        self._writer.shutdown()
        self._tracking.shutdown()
        for tracker in self._trackers:
            with contextlib.suppress(Exception):  # what it had to say it has said when it was written to
                tracker.close()
        self._lines.close()

    def _track(self, entry: dict) -> None:
        for tracker in tuple(self._trackers):
            try:
                tracker.write(entry)
            except Exception as error:  # whatever befalls a tracker, the run is worth more
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                print(f"train: {name} failed and gets no more metrics: {error!r}", file=sys.stderr, flush=True)


def open_log(
    config: LogConfig, stage: Stage, resume_step: int, settings: Mapping[str, Any], writes: bool
) -> MetricsLog:
    """The log of a run with the trackers that the config asks for.

    Args:
      config: which.
      stage: the run.
      resume_step: step that the run goes on from, 0 at its start.
      settings: of the run, for trackers that show them.
      writes: False in all processes but the first.

    Raises:
      UserError: a tracker's library is not installed.
    """
    trackers: list[Tracker] = []
    if writes and config.tensorboard:
        trackers.append(TensorBoard(stage.folder, resume_step))
    if writes and config.wandb:
        trackers.append(WeightsAndBiases(config.wandb, stage.folder, stage.fingerprint, settings))
    return MetricsLog(stage.folder, resume_step, stage.started, trackers, writes)


class _Lines:
    """Appends lines to a file; what a full disk does not take is kept and tried again with the next line."""

    def __init__(self, path: pathlib.Path):
        self._path, self._file, self._waiting, self._failing = path, path.open("ab", buffering=0), b"", False

    def add(self, line: str) -> None:
        self._waiting += line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._failing:
                print(f"train: {self._path} cannot be written ({error}); trying again", file=sys.stderr, flush=True)
        self._failing = bool(self._waiting)

    def close(self) -> None:
        self.add("")
        self._file.close()
        if self._waiting:
            raise UserError(f"{self._path} lacks the last {len(self._waiting)} bytes: they could not be written")


def read_metrics(run_dir: str | os.PathLike, kind: str) -> list[dict]:
    """All entries of one kind, in order."""
    return [entry for entry in _whole_lines(pathlib.Path(run_dir) / "metrics.jsonl") if entry["kind"] == kind]


def _entry(kind: str, step: int, values: dict) -> dict:
    return {"kind": kind, "step": step, "time": round(time.time(), 3), **values}


def _whole_lines(path: pathlib.Path) -> Iterator[dict]:
    """The entries of a metrics file, without the line that a kill cut short."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)
