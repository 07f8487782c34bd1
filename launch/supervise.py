"""Runs a job's processes together: all of them or none, output named, started again when that can help."""

import contextlib
import dataclasses
import os
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, TextIO

from ctllm_jax.common.children import die_with_parent
from ctllm_jax.common.status import EXIT_LOST, EXIT_MISTAKE, EXIT_RESUME
from launch.lines import Lines

_TICK = 0.1  # seconds between looks at the processes
_LONGEST_PAUSE = 60.0  # seconds before a restart, at most


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of a job: what it is called, its command, what it has in its environment besides ours."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """The command as it may be pasted into a shell."""
        return shlex.join(["env", *(f"{key}={value}" for key, value in self.environment.items()), *self.command])


def supervise(start: Callable[[], Sequence[Process]], restarts: int, patience: float = 10.0, pause: float = 1.0) -> int:
    """Runs a job to its end and returns the status for the shell.

    All processes end with 0: done. With EXIT_RESUME: all are started again. A process that fails takes the others with
    it, and the job is started again while `restarts` last; never after EXIT_MISTAKE.

    SIGINT, SIGTERM and SIGHUP to this process ask all of them to save and end (EXIT_RESUME); a second one kills them.
    SIGQUIT is passed on to them: `ctllm train` shows its stacks.

    Args:
      start: the processes of an attempt; called anew for each.
      restarts: how often a failed job is started again.
      patience: seconds between asking a process to end and killing it, once the job cannot go on.
      pause: seconds before a restart; each failure after the first doubles it, up to a minute.
    """
    failures = 0
    with _received(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as stops, _received(signal.SIGQUIT) as looks:
        while True:
            status, reason = _Attempt(start(), stops, looks, patience).run()
            if reason:
                _say(reason)
            if len(stops) > 1:
                return 128 + stops[1]
            if stops or status in (0, EXIT_MISTAKE):
                break
            if status != EXIT_RESUME:
                if failures == restarts:
                    _say(f"{restarts} restarts are used up")
                    break
                failures += 1
            wait = min(pause * 2 ** max(failures - 1, 0), _LONGEST_PAUSE)
            count = "" if status == EXIT_RESUME else f" (restart {failures} of {restarts})"
            _say(f"starting all processes again in {wait:g} s{count}")
            until = time.monotonic() + wait
            while time.monotonic() < until and not stops:
                time.sleep(_TICK)
            if stops:
                status = EXIT_RESUME
                break
    if status == EXIT_RESUME:
        _say("stopped; the same command goes on")
    return status


@contextlib.contextmanager
def _received(*numbers: int) -> Iterator[list[int]]:
    """Which of these signals have come so far; those that are ignored on purpose (nohup) stay so."""
    received: list[int] = []
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Running:
    """A process that has been started, in a session of its own: Ctrl-C in the terminal reaches the launcher alone."""

    def __init__(self, process: Process):
        self.name = process.name
        self.status: int | None = None  # as subprocess gives it: negative for a signal
        self.asked = self.killed = False  # whether we have told it to end, or ended it
        self.popen = subprocess.Popen(
            process.command,
            env={**os.environ, **process.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
            preexec_fn=die_with_parent(),
        )
        self.streams = {self.popen.stdout: (sys.stdout, Lines()), self.popen.stderr: (sys.stderr, Lines())}
        for pipe in self.streams:
            os.set_blocking(pipe.fileno(), False)

    def look(self) -> bool:
        """Whether it has ended just now; then nothing that it started is left either."""
        if self.status is not None:
            return False
        if os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self.signal(signal.SIGKILL)  # its group's number is not given to another one before it has been waited for
        self.status = self.popen.wait()
        for pipe in self.streams:
            while self.pump(pipe):
                pass
            stream, lines = self.streams[pipe]
            self._put(stream, lines.end())
        return True

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def ask(self) -> None:
        """Asks it, and not what it has started, to end."""
        self.asked = True
        os.kill(self.popen.pid, signal.SIGTERM)

    def show(self) -> None:
        """Asks it, and not what it has started, to show what it is doing."""
        os.kill(self.popen.pid, signal.SIGQUIT)

    def pump(self, pipe: IO[bytes]) -> bytes | None:
        """Passes on what there is to read, and returns it: b"" at the end of the stream, None when nothing came."""
        data = pipe.read(1 << 16)
        stream, lines = self.streams[pipe]
        self._put(stream, lines.feed(data or b"", time.monotonic()))
        return data

    def _put(self, stream: TextIO, lines: list[bytes]) -> None:
        if lines:
            name = f"[{self.name}] ".encode()
            stream.flush()
            stream.buffer.write(b"".join(name + line + b"\n" for line in lines))
            stream.buffer.flush()

    def fate(self) -> str:
        """How it ended, for the user."""
        if self.status < 0:
            how = f"was killed by {signal.Signals(-self.status).name}"
        else:
            how = f"ended with status {self.status}"
        last = self.streams[self.popen.stderr][1].last.decode(errors="replace").strip()
        return f"process {self.name} {how}" + (f"; its last line: {last[-300:]}" if last else "")


class _Attempt:
    """One start of all processes."""

    def __init__(self, processes: Sequence[Process], stops: list[int], looks: list[int], patience: float):
        self._processes, self._stops, self._looks, self._patience = processes, stops, looks, patience
        self._running: list[_Running] = []
        self._failed: list[_Running] = []  # those that failed on their own account
        self._deadline: float | None = None  # when what is left is killed

    def run(self) -> tuple[int, str]:
        """(status of the job as a shell has it, what to say of a failure); nothing is left running."""
        with selectors.DefaultSelector() as selector:
            try:
                for process in self._processes:
                    running = _Running(process)
                    self._running.append(running)
                    for pipe in running.streams:
                        selector.register(pipe, selectors.EVENT_READ, running)
                while any(running.status is None for running in self._running):
                    self._turn(selector)
            finally:  # whatever happened here
                for running in self._running:
                    if running.status is None:
                        running.signal(signal.SIGKILL)
                        running.popen.wait()
                    for pipe in running.streams:
                        pipe.close()
        return self._outcome()

    def _turn(self, selector: selectors.BaseSelector) -> None:
        for key, _ in selector.select(_TICK):
            if key.data.pump(key.fileobj) == b"":
                selector.unregister(key.fileobj)
        left = [running for running in self._running if not running.look() and running.status is None]
        for running in self._running:
            if running.status in (None, 0, EXIT_RESUME) or running in self._failed:
                continue
            if not running.killed and not (running.asked and running.status == -signal.SIGTERM):
                self._failed.append(running)
        if self._looks:
            self._looks.clear()
            for running in left:
                running.show()
        if self._failed and self._deadline is None and left:
            self._deadline = time.monotonic() + self._patience
        if self._failed or self._stops:
            for running in left:
                if not running.asked:
                    running.ask()
        if len(self._stops) > 1 or (self._deadline and time.monotonic() > self._deadline):
            for running in left:
                running.killed = True
                running.signal(signal.SIGKILL)

    def _outcome(self) -> tuple[int, str]:
        if self._failed:
            echoes = (EXIT_LOST, -signal.SIGABRT)  # of the end of another one: see ctllm_jax.processes
            first = min(self._failed, key=lambda running: running.status in echoes)
            return (first.status if first.status > 0 else 128 - first.status), first.fate()
        return (0 if all(running.status == 0 for running in self._running) else EXIT_RESUME), ""


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
