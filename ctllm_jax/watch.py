"""Watches over the loop: writes the stacks of a run that stands still, ends one that hangs, names a slow process.

A collective that waits for a process which is alive but stuck never comes back, and no runtime ends it on its own: on a
GPU, a TPU or a CPU what a run can rely on is this watch. Every process keeps its own; in a job the processes tell each
other where they are over the coordination service, so no device is waited for.
"""

import dataclasses
import faulthandler
import json
import math
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import numpy as np

from ctllm_jax import processes
from ctllm_jax.common.files import atomic_file
from ctllm_jax.common.stderr import write_past_stderr
from ctllm_jax.stopping import Stopping

_TICK = 1.0  # seconds between two looks
_POST = 10.0  # seconds between two words to the others
_WRITE = 10.0  # seconds that writing stacks may take; the disk, or process 0, may be what hangs
_COMPARE = 60.0  # seconds that the processes' waits are compared over
_IN_A_ROW = 3  # comparisons after which a process counts as slow
_SHARE, _FACTOR = 0.1, 2.0  # it waits for its input this share of the time, and so much longer than the median
_BOARD = "loop"  # where the processes post what they are at


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What is done about a run that does not move, and who is asked for notices."""

    stall_minutes: float  # [minutes] no step for so long: stacks are written; twice as long: the run ends (0: never)
    slow_minutes: float  # [minutes] the same for the start with its first steps, an evaluation, a save (0: never)
    stop_minutes: float  # [minutes] a run that was asked to stop ends after so long, saved or not (0: no bound)
    notices: str  # metadata server asked for maintenance and preemption, http://metadata.google.internal; "": none

    def __post_init__(self):
        if min(self.stall_minutes, self.slow_minutes, self.stop_minutes) < 0:
            raise ValueError("minutes cannot be negative")
        if self.notices and not self.notices.startswith(("http://", "https://")):
            raise ValueError(f"notices {self.notices!r} is not an address such as http://metadata.google.internal")


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the loop is: a thing that it is busy with, at which step, since when, and how long it may stay there."""

    name: str
    step: int
    since: float
    bound: float  # seconds; infinite for no bound


class LoopWatch:
    """A thread that looks where the loop is. Use as a context manager around the loop; the loop calls `at`.

    Process 0 names a process whose input is slow: one that waits for batches at least a tenth of the time, and twice as
    long as the median of the others, three minutes in a row. No more can be seen from here: all processes run at the
    pace of the slowest, so a slow device or network shows in no process's own times (a profile shows it).

    SIGQUIT (Ctrl-\\) writes the stacks of all threads of this process to standard error, whatever it is doing.
    """

    def __init__(self, run_dir: str | os.PathLike, config: WatchConfig, stopping: Stopping):
        self._folder, self._stopping = pathlib.Path(run_dir) / "stacks", stopping
        self._bounds = [60 * m or math.inf for m in (config.stall_minutes, config.slow_minutes, config.stop_minutes)]
        now = time.monotonic()
        self._place = _Place("start", 0, now, self._bounds[1])
        self._steps = 0  # begun here
        self._waited = 0.0  # seconds spent waiting for input
        self._reported: _Place | None = None  # the place whose stacks have been written
        self._posted = self._compared = now
        self._last: dict[int, dict] = {}  # what each process had posted at the last comparison
        self._slow: dict[int, int] = {}  # comparisons in a row that a process was slow at
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loop watch", daemon=True)

    def __enter__(self) -> "LoopWatch":
        faulthandler.register(signal.SIGQUIT, sys.__stderr__.fileno(), all_threads=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._leaving.set()
        self._thread.join(_WRITE)  # a thread that is inside JAX when Python ends aborts the process
        faulthandler.unregister(signal.SIGQUIT)

    def at(self, name: str, step: int) -> None:
        """Says what the loop does from now on.

        Args:
          name: "input" (waiting for a step's batch), "step", or another thing, which may take long.
          step: the number of the step.
        """
        now, before = time.monotonic(), self._place
        if before.name == "input":
            self._waited += now - before.since
        if name == "step":
            self._steps += 1
        # The first step is waited for in the second, and other processes may still be compiling it.
        steady = name in ("input", "step") and self._steps > 2
        self._place = _Place(name, step, now, self._bounds[0 if steady else 1])

    # ---- The thread

    def _run(self) -> None:
        while not self._leaving.wait(_TICK):
            self.check(time.monotonic())

    def check(self, now: float) -> None:
        """Does what is due at a time (`time.monotonic`)."""
        self._check_stop(now)
        self._check_stall(now)
        if now - self._posted >= _POST:
            self._posted = now
            self._post(now)
        if jax.process_index() == 0 and now - self._compared >= _COMPARE:
            self._compared = now
            self._compare(_words())

    def _post(self, now: float) -> None:
        place = self._place
        waiting = now - place.since if place.name == "input" else 0.0
        word = {"place": place.name, "step": place.step, "clock": now, "waited": self._waited + waiting}
        processes.post(_BOARD, json.dumps(word))

    def _check_stop(self, now: float) -> None:
        since, bound = self._stopping.since, self._bounds[2]
        if since is not None and now - since > bound:
            reason = f"the run was to stop ({self._stopping.reason}) but has not in {_minutes(bound)}"
            self._write(self._place, reason)
            processes.exit_lost(reason)

    def _check_stall(self, now: float) -> None:
        place = self._place
        over = (now - place.since) / place.bound
        if over >= 1 and self._reported is not place:
            self._reported = place
            self._write(place, f"nothing has moved for {_minutes(place.bound)}")
        elif over >= 2:
            reason = f"nothing has moved for {_minutes(2 * place.bound)}"
            self._write(place, reason)
            processes.exit_lost(reason)

    def _write(self, place: _Place, reason: str) -> None:
        """Writes the stacks of all threads to a file and says so; neither the disk nor process 0 is waited for."""
        index = jax.process_index()
        summary = f"process {index}: {reason}, at {place.name} of step {place.step}"
        path = self._folder / f"process-{index}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.txt"
        written = threading.Event()
        threading.Thread(target=self._write_file, args=(path, summary, written), daemon=True).start()
        if written.wait(_WRITE):
            write_past_stderr(f"train: {summary}; stacks of all its threads in {path}")
        elif write_past_stderr(f"train: {summary}; {path} could not be written, so they are here:"):
            faulthandler.dump_traceback(sys.__stderr__.fileno(), all_threads=True)

    def _write_file(self, path: pathlib.Path, summary: str, written: threading.Event) -> None:
        self._post(time.monotonic())
        with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(f"{summary}\n")
            for index, word in _words().items():
                file.write(f"process {index} said last: at {word['place']} of step {word['step']}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        written.set()

    def _compare(self, words: dict[int, dict]) -> None:
        """Names a process that keeps the others waiting."""
        shares = {
            index: (word["waited"] - before["waited"]) / (word["clock"] - before["clock"])
            for index, word in words.items()
            if (before := self._last.get(index)) and word["clock"] > before["clock"]
        }
        self._last = words
        for index, share in shares.items():
            others = float(np.median([other for key, other in shares.items() if key != index] or [share]))
            self._slow[index] = self._slow.get(index, 0) + 1 if share >= max(_SHARE, _FACTOR * others) else 0
            if self._slow[index] == _IN_A_ROW:
                print(
                    f"train: process {index} waits for its input {share:.0%} of the time, the others {others:.0%} "
                    "(median); all go at its pace",
                    file=sys.stderr,
                )


def _words() -> dict[int, dict]:
    return {index: json.loads(text) for index, text in sorted(processes.posted(_BOARD).items())}


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:g} min"
