"""Standard error on a disk that is full: its lines are lost, the work that they tell of goes on."""

import contextlib
import errno
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PATIENCE = 5.0  # seconds that a pipe or terminal may take to have room for a line


class _Lossy:
    """A stream that drops what its disk has no room for."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with _unless_full():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _unless_full():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _unless_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise


@contextlib.contextmanager
def lossy_stderr() -> Iterator[None]:
    """Inside the block, what is written to `sys.stderr` (`2> run.log`, a SLURM job's file) may be lost."""
    with contextlib.redirect_stderr(_Lossy(sys.stderr)):
        yield


def write_past_stderr(line: str) -> bool:
    """Writes a line to the process's standard error without `sys.stderr`, which a thread that hangs may hold.

    Whether it was written: on a full disk, to a terminal that is gone or a pipe that nobody reads it is lost, for what
    the caller does next, such as ending the process, must happen all the same.
    """
    descriptor = sys.__stderr__.fileno()
    with contextlib.suppress(OSError):
        if select.select([], [descriptor], [], _PATIENCE)[1]:
            os.write(descriptor, f"{line}\n".encode())
            return True
    return False
