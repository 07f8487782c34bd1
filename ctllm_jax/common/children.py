"""Child processes that do not outlive the process that started them, and signals that do not end them."""

import ctypes
import os
import pathlib
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None]:
    """For `subprocess`'s preexec_fn: Linux kills the child when this process ends, however that happens.

    The system watches the thread that starts the child: it must live as long as the child may.
    """
    if sys.platform != "linux":
        return lambda: None
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl  # before the fork: little is allowed after it

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be asked for
            os._exit(1)

    return ask


def catches(pid: int, number: int) -> bool:
    """Whether a process does something of its own with a signal, which could else end it; False where it is gone."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)
