"""Requests to stop a run: it saves after the step at hand and ends, to be taken up again.

They come from a signal, from another process of the job, or from the machine: Google's metadata server says when a
virtual machine is about to be taken away. Signals reach a process on every platform; a notice comes earlier, and to
programs that no one sends a signal. (JAX's own preemption service hears of SIGTERM alone.)
"""

import contextlib
import dataclasses
import http.client
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

# What the metadata server is asked for, and the answer that announces the end. The other events (a migration) are over
# by themselves.
_KEYS = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
_PAUSE = 2.0  # seconds between two looks; a spot machine has 30 from its notice to its end
_PATIENCE = 5.0  # seconds that the server may take to answer
ECHO = 1.0  # seconds: some schedulers signal a process and what stands before it, which passes the signal on


@dataclasses.dataclass
class Stopping:
    """Whether, why and since when (`time.monotonic`) this process is to stop."""

    reason: str = ""
    since: float | None = None

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.since is not None

    def request(self, reason: str) -> None:
        """Asks for it; the first reason counts."""
        if self.since is None:
            self.reason, self.since = reason, time.monotonic()


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stopping]:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours after the step at hand; a second one kills.

    What comes within ECHO seconds is the same one.
    """
    stopping = Stopping()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def request(*_):
        stopping.request("a signal")
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        time.sleep(ECHO)  # here, for handlers can be set in this thread alone, and a default one ends even what hangs
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_on_notice(server: str, stopping: Stopping) -> Iterator[None]:
    """Turns a notice of the machine's end into a request to stop, inside the block.

    A notice that stands at the beginning changes nothing: the run before has stopped for it, and maintenance may be an
    hour away. Two small requests every two seconds: one that waits for a change needs a thread for each key.

    Args:
      server: address of the metadata server (Google's: `http://metadata.google.internal`); empty: no one is asked.
      stopping: what the request is made to.
    """
    if not server:
        yield
        return
    leaving = threading.Event()
    thread = threading.Thread(target=_watch_notices, args=(server, stopping, leaving), name="notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leaving.set()
        thread.join(_PATIENCE)


def _watch_notices(server: str, stopping: Stopping, leaving: threading.Event) -> None:
    known: dict[str, str] | None = None  # what it said before
    silent = False
    while not stopping.requested:
        try:
            values = {key: _read_value(server, key) for key in _KEYS}
        except (OSError, http.client.HTTPException) as error:
            if not silent:
                print(f"train: {server} does not answer ({error}); no notice is heard until it does", file=sys.stderr)
            silent = True
        else:
            silent = False
            for key, end in _KEYS.items():
                if values[key] == end and known is not None and known[key] != end:
                    stopping.request(f"a notice ({key}: {end})")
            known = values
        if leaving.wait(_PAUSE):
            return


def _read_value(server: str, key: str) -> str:
    url = f"{server.rstrip('/')}/computeMetadata/v1/instance/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on the machine's own link
    with opener.open(request, timeout=_PATIENCE) as response:
        return response.read().decode().strip()
