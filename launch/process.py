"""One process of a job: how it is started, heard, asked to end, and what became of it."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any, TextIO

from ctllm_jax.common.children import catches, die_with_parent
from launch import keeper
from launch.hide import Hider
from launch.lines import Lines

_BEAT = 5.0  # seconds between two signs of life to a keeper
_FAREWELL = 10.0  # seconds that a keeper has to end what it was told to kill
_GONE = (errno.EIO, errno.EPIPE)  # of a write: the terminal was closed; nobody reads the pipe any more


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of a job: what it is called, its command, what it has in its environment besides ours.

    Attributes:
      order: for a command that brings us to `launch.keeper` on a host: what its first line of input says. Such a
        process is spoken to through its input; without an order it gets signals.
      secrets: variables that are added to the order's environment, and never shown.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    order: Mapping[str, Any] | None = None
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """The command as it may be pasted into a shell; below it, what it reads."""
        variables = ["env", *(f"{key}={value}" for key, value in self.environment.items())] if self.environment else []
        line = shlex.join([*variables, *self.command])
        if self.order is None:
            return line
        return f"{line}\n  reads: {self._first_line(dict.fromkeys(self.secrets, '***'))}"

    @functools.cached_property
    def hide(self) -> Hider:
        """A line of its output without the secrets that it was given."""
        return Hider(self.secrets)

    def first_line(self) -> bytes:
        """What a keeper reads first: the order, with the secrets."""
        return f"{self._first_line(self.secrets)}\n".encode()

    def _first_line(self, secrets: Mapping[str, str]) -> str:
        return json.dumps({**self.order, "environment": {**self.order["environment"], **secrets}}, ensure_ascii=False)


def say(text: str) -> None:
    """A word of the launcher's own, on standard error."""
    with _heard(sys.stderr):
        print(f"launch: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _heard(stream: TextIO) -> Iterator[None]:
    """For a write to one of our own streams. What does not go into a file, as on a full disk, is lost; the job goes on.

    A terminal or reader that is gone asks us to stop, as its SIGHUP does: that comes neither for a pipe, nor in another
    session, nor under nohup. Handlers are asked as if it had come; the stream goes nowhere from then on.

    Raises:
      OSError: it is gone, and no handler here hears of a stop.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE or stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            return
        stop = signal.getsignal(signal.SIGTERM)
        if not callable(stop):
            raise
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
        stop(signal.SIGHUP, None)


class Output:
    """Where lines go: to our own streams, each behind the name of its process, and to the job's log."""

    def __init__(self, log: pathlib.Path | None = None):
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("ab", buffering=0) if log else None  # what it refuses is not kept, to be refused again
        self._lacks = False  # whether lines are missing in the log

    def put(self, stream: TextIO, process: Process, lines: list[bytes]) -> None:
        """Writes lines of a process to one of our streams and to the log."""
        if not lines:
            return
        self._write(stream, b"".join(f"[{process.name}] ".encode() + process.hide(line) + b"\n" for line in lines))

    def say(self, text: str) -> None:
        """A word of the launcher's own."""
        self._write(sys.stderr, f"launch: {text}\n".encode())

    def _write(self, stream: TextIO, data: bytes) -> None:
        if self._log:
            self._write_log(data)
        with _heard(stream):
            stream.flush()
            stream.buffer.write(data)
            stream.buffer.flush()

    def _write_log(self, data: bytes) -> None:
        try:
            self._log.write(data)
        except OSError as error:  # the job is worth more
            if not self._lacks:
                self._lacks = True
                say(f"lines are missing in {self._log.name}: {error.strerror}; the job goes on")

    def close(self) -> None:
        """Closes the log."""
        if self._log:
            self._log.close()


class Running:
    """A process that has been started, in a session of its own: Ctrl-C in the terminal reaches the launcher alone."""

    def __init__(self, process: Process, output: Output):
        self.name = process.name
        self.status: int | None = None  # as a shell has it: 128 + N for signal N
        self.asked_to_end = self.killed = False  # whether we have told it to end, or ended it
        self._process, self._output = process, output
        self._beaten, self._farewell = time.monotonic(), float("inf")
        self.popen = subprocess.Popen(
            process.command,
            env={**os.environ, **process.environment},
            stdin=subprocess.DEVNULL if process.order is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
            preexec_fn=die_with_parent(),
        )
        self.streams = {self.popen.stdout: (sys.stdout, Lines()), self.popen.stderr: (sys.stderr, Lines())}
        for pipe in self.streams:
            os.set_blocking(pipe.fileno(), False)
        if process.order is not None:
            self._send(process.first_line())
            os.set_blocking(self.popen.stdin.fileno(), False)

    def poll(self) -> bool:
        """Whether it has ended just now; then nothing that it started here is left either."""
        if self.status is not None:
            return False
        if os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            self._keep_in_touch()
            return False
        self._signal(signal.SIGKILL)  # its group's number is not given to another one before it has been waited for
        status = self.popen.wait()
        self.status = status if status >= 0 else 128 - status
        for pipe in self.streams:
            while self.pump(pipe):
                pass
            stream, lines = self.streams[pipe]
            self._output.put(stream, self._process, lines.end())
        return True

    def _keep_in_touch(self) -> None:
        now = time.monotonic()
        if self._process.order is not None and now - self._beaten > _BEAT:
            self._beaten = now
            self._send(keeper.BEAT)
        if now > self._farewell:
            self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Asks it, and not what it has started, to end."""
        self.asked_to_end = True
        self._send_or_signal(keeper.STOP, signal.SIGTERM)

    def show(self) -> None:
        """Asks it, and not what it has started, to show what it is doing."""
        self._send_or_signal(keeper.SHOW, signal.SIGQUIT)

    def profile(self) -> None:
        """Asks it for a profile, unless it does not know how: the signal would end it."""
        if self._process.order is not None or catches(self.popen.pid, signal.SIGUSR1):
            self._send_or_signal(keeper.PROFILE, signal.SIGUSR1)

    def kill(self) -> None:
        """Ends it with all that it has started; on a host that does not answer, what leads there."""
        if self._process.order is None:
            self._signal(signal.SIGKILL)
        elif not self.killed:
            self._send(keeper.KILL)
            self._farewell = time.monotonic() + _FAREWELL
        self.killed = True

    def drop(self) -> None:
        """Ends it at once, whatever state we are in; a keeper notices that we are gone."""
        if self.status is None:
            self._signal(signal.SIGKILL)
            self.popen.wait()
        for pipe in (*self.streams, self.popen.stdin):
            if pipe:
                pipe.close()

    def _send_or_signal(self, word: bytes, number: int) -> None:
        if self._process.order is None:
            os.kill(self.popen.pid, number)
        else:
            self._send(word)

    def _send(self, words: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, BlockingIOError):  # it has ended, or nothing gets through: see `poll`
            self.popen.stdin.write(words)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def pump(self, pipe: IO[bytes]) -> bytes | None:
        """Passes on what there is to read, and returns it: b"" at the end of the stream, None when nothing came."""
        data = pipe.read(1 << 16)
        stream, lines = self.streams[pipe]
        self._output.put(stream, self._process, lines.feed(data or b"", time.monotonic()))
        return data

    def fate(self) -> str:
        """How it ended, for the user."""
        if self.status > 128 and self.status - 128 in set(signal.Signals):
            how = f"was killed by {signal.Signals(self.status - 128).name}"
        else:
            how = f"ended with status {self.status}"
        last = self._process.hide(self.streams[self.popen.stderr][1].last).decode(errors="replace").strip()
        return f"process {self.name} {how}" + (f"; its last line: {last[-300:]}" if last else "")
