"""Stands on a host before one process of a job: starts it, tells it what the launcher says, ends it without a launcher.

The launcher speaks through standard input, over whatever connects the two. The first line is a JSON object: `lock` (a
file that one process at a time may hold), `python`, `verb`, `config` (a file of the code), `arguments`, `folder` (where
it runs) and `environment`; paths are relative to the home folder. After it come single bytes: BEAT every few seconds,
STOP, SHOW, PROFILE, KILL. When the input ends, or nothing has come for SILENCE seconds, the connection is lost: the
process is asked to save, and killed after PATIENCE seconds. So nothing stays behind, and a launcher that starts the job
again waits for the lock and finds the devices free.

It is `python -m launch.keeper` in the folder of the shipped code.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time

from ctllm_jax.common.children import catches, die_with_parent

BEAT, STOP, SHOW, PROFILE, KILL = b".", b"t", b"q", b"p", b"k"
SILENCE = 40.0  # seconds without a beat after which the launcher counts as gone
PATIENCE = 30.0  # seconds that a process without a launcher has to save
EXIT_TAKEN = 70  # an earlier process of the same command would not go

_TICK = 0.2  # seconds between looks at the process


def main() -> None:
    """Runs what the first line of standard input says; exits with its status, 128 + N where signal N ended it."""
    order = json.loads(_first_line())
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))  # the host is shut down
    with _alone(pathlib.Path.home() / order["lock"]):
        sys.exit(_keep(order, stopped))


def _first_line() -> bytes:
    """The input up to its first line end, and not a byte more: what follows is waited for with select."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("keeper: the launcher went before it had said what to start")
        line += byte
    return line


@contextlib.contextmanager
def _alone(path: pathlib.Path):
    """Holds a lock; what held it before has lost its launcher and is on its way out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        until = time.monotonic() + SILENCE + PATIENCE + 10
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    print(f"keeper: an earlier process of the same command still runs here ({path})", file=sys.stderr)
                    sys.exit(EXIT_TAKEN)
                time.sleep(_TICK)
        yield


def _keep(order: dict, stopped: list[int]) -> int:
    code, home = os.getcwd(), pathlib.Path.home()
    config = [f"--config={code}/{order['config']}"] if order["config"] else []
    (home / order["folder"]).mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen(
        [str(home / order["python"]), "-m", "ctllm_jax.cli", order["verb"], *config, *order["arguments"]],
        cwd=home / order["folder"],
        env={**os.environ, **order["environment"], "PYTHONPATH": code, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=die_with_parent(),
    )
    gone = threading.Event()
    pumps = [
        threading.Thread(target=_pump, args=(pipe.fileno(), fd, gone), daemon=True)
        for pipe, fd in ((child.stdout, 1), (child.stderr, 2))
    ]
    for pump in pumps:
        pump.start()
    _listen(child, stopped, gone)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # what it started; its number is free only after it is waited for
    status = child.wait()
    for pump in pumps:
        pump.join(PATIENCE)
    return status if status >= 0 else 128 - status


def _listen(child: subprocess.Popen, stopped: list[int], gone: threading.Event) -> None:
    """Passes on what the launcher says until the process has ended."""
    heard, deadline = time.monotonic(), None
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        words = None  # nothing came; b"": the end of the input
        if gone.is_set():
            time.sleep(_TICK)
        elif select.select([0], [], [], _TICK)[0]:
            words, heard = os.read(0, 4096), time.monotonic()
        if not gone.is_set() and (words == b"" or time.monotonic() - heard > SILENCE):
            gone.set()
            deadline = time.monotonic() + PATIENCE
            _signal(child, signal.SIGTERM)
        if stopped:
            stopped.clear()
            _signal(child, signal.SIGTERM)
        if words and SHOW in words:
            _signal(child, signal.SIGQUIT)
        if words and PROFILE in words and catches(child.pid, signal.SIGUSR1):
            _signal(child, signal.SIGUSR1)
        if words and STOP in words:
            _signal(child, signal.SIGTERM)
        if (words and KILL in words) or (deadline and time.monotonic() > deadline):
            os.killpg(child.pid, signal.SIGKILL)


def _signal(child: subprocess.Popen, number: int) -> None:
    """As Popen.send_signal, which would first look whether it has ended, and take its status from `_listen`."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, number)


def _pump(source: int, sink: int, gone: threading.Event) -> None:
    """Copies a stream; goes on reading when nobody listens, or a process could not save for want of a reader."""
    while data := os.read(source, 4096):  # a pipe that can be written to takes so much without waiting
        while not gone.is_set():
            if select.select([], [sink], [], _TICK)[1]:
                with contextlib.suppress(OSError):
                    os.write(sink, data)
                break


if __name__ == "__main__":
    main()
