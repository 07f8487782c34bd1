"""Keeping third-party chatter away from the user's terminal, and only that."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drops what native libraries write to file descriptor 2 and Python libraries log below ERROR.

    TensorFlow, SentencePiece and Beam remark on devices, builds and defaults at every start. Python's own
    `sys.stderr` (progress, errors, tracebacks) still reaches the terminal; one that leads elsewhere (a notebook's)
    stays as it is.
    """
    logging.getLogger().setLevel(logging.ERROR)
    python_stderr, descriptor = sys.stderr, os.dup(2)
    python_stderr.flush()
    with open(os.devnull, "wb") as nowhere, os.fdopen(descriptor, "w", buffering=1) as terminal:
        os.dup2(nowhere.fileno(), 2)
        if _writes_to(python_stderr, 2):
            sys.stderr = terminal
        try:
            yield
        finally:
            terminal.flush()
            os.dup2(descriptor, 2)
            sys.stderr = python_stderr


def _writes_to(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):  # it has none
        return False
