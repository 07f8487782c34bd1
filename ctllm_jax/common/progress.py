"""Progress of long work on standard error: done, total, rate, time left."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO


class Progress:
    """A progress line; redrawn on a terminal, a line now and then in a log. Use as a context manager."""

    def __init__(self, label: str, total: int | None, unit: str, stream: TextIO | None = None):
        self._label, self._total, self._unit = label, total, unit
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.2 if self._terminal else 10.0
        self._start = self._last = time.monotonic()
        self._first = None  # done at the first report, so that resumed work does not inflate the rate
        self._first_at = self._start  # nor does what came before it, as a compilation, lower it
        self._done = 0
        self._note = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self._draw(final=True)

    def at(self, done: int, note: str = "") -> None:
        """Reports the total amount done so far, with an optional remark (a loss, a file name)."""
        if self._first is None:
            self._first, self._first_at = done, time.monotonic()
        self._done, self._note = done, note
        if time.monotonic() - self._last >= self._interval:
            self._draw()

    def add(self, amount: int = 1, note: str = "") -> None:
        """Reports `amount` more done."""
        if self._first is None:
            self._first = 0
        self.at(self._done + amount, note)

    def _draw(self, final: bool = False) -> None:
        self._last = time.monotonic()
        seconds = max(self._last - self._start, 1e-9)
        rate = (self._done - (self._first or 0)) / max(self._last - self._first_at, 1e-9)
        parts = [f"{self._label}: {self._done:,}" + (f"/{self._total:,}" if self._total else "") + f" {self._unit}"]
        parts.append(f"{rate:,.4g}/s")
        if final:
            parts.append(f"{seconds:.1f} s")
        elif self._total and rate > 0:
            parts.append(f"{_clock((self._total - self._done) / rate)} left")
        if self._note:
            parts.append(self._note)
        line = "  ".join(parts)
        if self._terminal:
            self._stream.write("\r\x1b[K" + line + ("\n" if final else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


class Watch:
    """Polls `count()` in a thread and shows it as progress, for work that other processes do."""

    def __init__(self, label: str, total: int, unit: str, count: Callable[[], int], every: float = 1.0):
        self._progress = Progress(label, total, unit)
        self._count, self._every = count, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._progress.at(self._count())  # what an earlier run did is no speed of this one
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._stop.set()
        self._thread.join()
        self._progress.at(self._count())
        self._progress.__exit__()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self._progress.at(self._count())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
