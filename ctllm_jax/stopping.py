"""Requests to stop a run: it saves after the step at hand and ends, to be taken up again."""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator


@dataclasses.dataclass
class Stopping:
    """Whether this process has been asked to stop."""

    requested: bool = False


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stopping]:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours after the step at hand; a second one kills."""
    stopping = Stopping()

    def request(number, _):
        stopping.requested = True
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
