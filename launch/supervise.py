"""Runs a job's processes together: all of them or none, output named, started again when that can help."""

import contextlib
import selectors
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.status import EXIT_LOST, EXIT_MISTAKE, EXIT_RESUME
from launch.process import Output, Process, Running
from launch.resumes import LONGEST_PAUSE, Resumes

_TICK = 0.1  # seconds between looks at the processes
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def supervise(
    start: Callable[[], Sequence[Process]],
    restarts: int,
    patience: float = 10.0,
    pause: float = 1.0,
    output: Output | None = None,
) -> int:
    """Runs a job to its end and returns the status for the shell.

    All processes end with 0: done. With EXIT_RESUME: all are started again, unless they have done so too often in a row
    after a moment (`launch.resumes`), which is status 1. A process that fails takes the others with it, and the job is
    started again while `restarts` last; never after EXIT_MISTAKE.

    SIGINT, SIGTERM and SIGHUP to this process ask all of them to save and end (EXIT_RESUME); a second one kills them,
    unless it is SIGHUP. When a line finds the terminal, or who read our output, gone, that counts as SIGHUP.
    SIGQUIT and SIGUSR1 are passed on to them: `ctllm train` shows its stacks, or takes a profile.

    Args:
      start: the processes of an attempt; called anew for each. A signal meanwhile raises KeyboardInterrupt in it.
      restarts: how often a failed job is started again.
      patience: seconds between asking a process to end and killing it, once the job cannot go on.
      pause: seconds before a restart; each failure after the first doubles it, and each short life, up to a minute.
      output: where lines go; without it, to our own streams alone.

    Raises:
      UserError: the first attempt could not be started, as `start` says. Later ones count as failures.
    """
    output, failures, resumes = output or Output(), 0, Resumes()
    with interruptible():
        processes = start()
    with _received(*STOPS) as stops, _received(signal.SIGQUIT, signal.SIGUSR1) as shows:
        while True:
            try:
                if processes is None:
                    with interruptible():
                        processes = start()
                began = time.monotonic()
                status, reason = _Attempt(processes, stops, shows, patience, output).run()
            except UserError as error:
                status, reason = EXIT_LOST, str(error)
            except KeyboardInterrupt:
                status = EXIT_RESUME
                break
            processes = None
            if reason:
                output.say(reason)
            if len(stops) > 1:
                return 128 + stops[1]
            if stops or status in (0, EXIT_MISTAKE):
                break
            if status != EXIT_RESUME:
                if failures == restarts:
                    output.say(f"{restarts} restarts are used up")
                    break
                failures += 1
            else:
                resumes.count(time.monotonic() - began)
                if resumes.why:
                    output.say(resumes.why)
                    return 1
            wait = min(pause * 2 ** max(failures - 1, resumes.row - 1, 0), LONGEST_PAUSE)
            count = "" if status == EXIT_RESUME else f" (restart {failures} of {restarts})"
            output.say(f"starting all processes again in {wait:g} s{count}")
            until = time.monotonic() + wait
            while time.monotonic() < until and not stops:
                time.sleep(_TICK)
            if stops:
                status = EXIT_RESUME
                break
        if status == EXIT_RESUME:
            why = ": the terminal, or who read the output, is gone" if signal.SIGHUP in stops else ""
            output.say(f"stopped; the same command goes on{why}")
        return status


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A stop inside the block is a KeyboardInterrupt there, for nothing runs yet that would have to save."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with handled(STOPS, interrupt):
        yield


@contextlib.contextmanager
def _received(*numbers: int) -> Iterator[list[int]]:
    """Which of these signals have come so far; SIGHUP only as the first: one terminal's end may bring several."""
    received: list[int] = []

    def receive(number: int, _) -> None:
        if number != signal.SIGHUP or not received:
            received.append(number)

    with handled(numbers, receive):
        yield received


@contextlib.contextmanager
def handled(numbers: Sequence[int], handler: Callable[..., None]) -> Iterator[None]:
    """Hands signals to the handler inside the block; those that are ignored on purpose (nohup) stay so."""
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class _Attempt:
    """One start of all processes."""

    def __init__(
        self, processes: Sequence[Process], stops: list[int], shows: list[int], patience: float, output: Output
    ):
        self._processes, self._stops, self._shows = processes, stops, shows
        self._patience, self._output = patience, output
        self._running: list[Running] = []
        self._failed: list[Running] = []  # those that failed on their own account
        self._deadline: float | None = None  # when what is left is killed

    def run(self) -> tuple[int, str]:
        """(status of the job as a shell has it, what to say of a failure); nothing is left running."""
        with selectors.DefaultSelector() as selector:
            try:
                for process in self._processes:
                    running = Running(process, self._output)
                    self._running.append(running)
                    for pipe in running.streams:
                        selector.register(pipe, selectors.EVENT_READ, running)
                while any(running.status is None for running in self._running):
                    self._turn(selector)
            finally:  # whatever happened here
                for running in self._running:
                    running.drop()
        return self._outcome()

    def _turn(self, selector: selectors.BaseSelector) -> None:
        for key, _ in selector.select(_TICK):
            if key.data.pump(key.fileobj) == b"":
                selector.unregister(key.fileobj)
        left = [running for running in self._running if not running.poll() and running.status is None]
        for running in self._running:
            if running.status in (None, 0, EXIT_RESUME) or running in self._failed:
                continue
            if not running.killed and not (running.asked_to_end and running.status == 128 + signal.SIGTERM):
                self._failed.append(running)
        while self._shows:
            number = self._shows.pop(0)
            for running in left:
                running.show() if number == signal.SIGQUIT else running.profile()
        if self._failed and self._deadline is None and left:
            self._deadline = time.monotonic() + self._patience
        if self._failed or self._stops:
            for running in left:
                if not running.asked_to_end:
                    running.terminate()
        if len(self._stops) > 1 or (self._deadline and time.monotonic() > self._deadline):
            for running in left:
                running.kill()

    def _outcome(self) -> tuple[int, str]:
        if self._failed:
            echoes = (EXIT_LOST, 128 + signal.SIGABRT)  # of the end of another one: see ctllm_jax.processes
            first = min(self._failed, key=lambda running: running.status in echoes)
            return first.status, first.fate()
        return (0 if all(running.status == 0 for running in self._running) else EXIT_RESUME), ""
