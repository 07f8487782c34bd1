"""Stands before one process of a job that a scheduler starts (SLURM, Kubernetes), and hides secrets as it prints.

`python -m launch.task STATUSES NAMES COMMAND ...` runs the command, without what the variables NAMES (NAME,NAME, or
empty) have as values in its output, and ends with its status, 128 + N where signal N ended it. SIGTERM, SIGINT and
SIGQUIT are passed on, for Kubernetes' containers and SLURM with control groups signal this process alone; SLURM's other
ways to track processes signal both, so that the command may hear a signal twice. SIGURG, which harms nobody else that
hears it, becomes SIGUSR1: a profile.

STATUSES, unless it is empty, is a file to which the status is added; then one that has saved ends with 0 here, or SLURM
would ask those again that are still saving. Such a process learns its number in the job from SLURM.
"""

import contextlib
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from ctllm_jax.common.children import catches, die_with_parent
from ctllm_jax.common.status import EXIT_RESUME
from launch.hide import Hider
from launch.lines import Lines

_TICK = 0.5  # seconds between looks whether it has ended while others hold its output open
_REST = 5.0  # seconds that those have, once it has
_PASSED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def main() -> None:
    statuses, names, *command = sys.argv[1:]
    if statuses:
        os.environ["JAX_PROCESS_ID"] = os.environ["SLURM_PROCID"]
    status = run(command, Hider({name: os.environ[name] for name in names.split(",") if name}))
    if statuses:
        with pathlib.Path(statuses).open("a") as file:
            file.write(f"{status}\n")
    sys.exit(0 if statuses and status == EXIT_RESUME else status)


def run(command: Sequence[str], hide: Hider) -> int:
    """Runs a command and returns its status as a shell has it."""
    child, early = None, []

    def heard(number: int, _) -> None:
        if child is None:
            early.append(number)
        else:
            _pass_on(child, number)

    for number in (*_PASSED, signal.SIGURG):
        signal.signal(number, heard)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=die_with_parent(),
        )
    except OSError as error:
        print(f"launch: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    for number in early:
        _pass_on(child, number)
    _copy(child, hide)
    status = child.wait()
    return status if status >= 0 else 128 - status


def _pass_on(child: subprocess.Popen, number: int) -> None:
    if number != signal.SIGURG:
        child.send_signal(number)
    elif catches(child.pid, signal.SIGUSR1):
        child.send_signal(signal.SIGUSR1)


def _copy(child: subprocess.Popen, hide: Hider) -> None:
    """Passes on what the child prints, until it has ended and what it left behind has been silent for a while."""
    until = float("inf")
    with selectors.DefaultSelector() as selector:
        for pipe, sink in ((child.stdout, 1), (child.stderr, 2)):
            selector.register(pipe, selectors.EVENT_READ, (sink, Lines()))
        while selector.get_map() and time.monotonic() < until:
            for key, _ in selector.select(_TICK):
                sink, lines = key.data
                data = os.read(key.fd, 1 << 16)
                _write(sink, hide, lines.feed(data, time.monotonic()) if data else lines.end())
                if not data:
                    selector.unregister(key.fileobj)
            if until == float("inf") and child.poll() is not None:
                until = time.monotonic() + _REST
        for key in list(selector.get_map().values()):
            _write(key.data[0], hide, key.data[1].end())


def _write(sink: int, hide: Hider, lines: list[bytes]) -> None:
    data = b"".join(hide(line) + b"\n" for line in lines)
    with contextlib.suppress(OSError):  # nobody listens: it goes on, and can save
        while data:
            data = data[os.write(sink, data) :]


if __name__ == "__main__":
    main()
