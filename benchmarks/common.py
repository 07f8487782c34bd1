"""What the benchmarks share: peers in environments of their own, CPU seconds of child processes, tables.

Absolute times mean little on a shared machine, so contestants take turns on one core, CPU seconds stand beside wall
seconds, and what counts is the ratio within one run.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from ctllm_jax.common.files import cache_folder

CTLLM = (sys.executable, "-m", "ctllm_jax.cli")
CACHE = cache_folder("benchmarks")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a child process and its children took.

    cpu, wall: seconds; output: what it wrote to standard output; peak_mib: the largest resident memory of one process,
    with what it maps of files; own_mib: the largest without that (looked at 20 times a second), of the child alone.
    """

    cpu: float
    wall: float
    output: str = ""
    peak_mib: float = 0.0
    own_mib: float = 0.0


def environment(name: str, requirements: Sequence[str]) -> str:
    """The Python of a virtual environment with the pinned requirements: made once, kept in the cache folder.

    Raises:
      CalledProcessError: the package index cannot be reached, or lacks a version.
    """
    mark = hashlib.sha256(" ".join([sys.version, *requirements]).encode()).hexdigest()[:8]
    folder = CACHE / f"{name}-{mark}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():  # written last: a half-made environment is made anew
        shutil.rmtree(folder, ignore_errors=True)
        print(f"benchmark: installing {' '.join(requirements)} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True, stdout=sys.stderr)
        done.touch()
    return str(python)


def made(folder: pathlib.Path, verb: str, settings: Mapping[str, object], config: str = "") -> pathlib.Path:
    """The folder that `ctllm VERB` makes with these settings of its config; made unless it is finished there."""
    if not (folder / "manifest.json").exists():
        flags = [f"--config={config}"] * bool(config) + [f"--config.{key}={value}" for key, value in settings.items()]
        subprocess.run([*CTLLM, verb, *flags, f"--workdir={folder}"], check=True)
    return folder


def pin() -> None:
    """Keeps this process, and every child started from now on, on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def measure(command: Sequence[str], **variables: str) -> Cost:
    """Runs a command to its end, with more environment variables; what it says on standard error is shown if it fails.

    Raises:
      RuntimeError: the exit status is not 0.
    """
    log_file = CACHE / f"{os.getpid()}.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(log_file, "wb") as log:
            start = time.perf_counter()
            child = subprocess.Popen(
                command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=log, text=True
            )
            peak = Peak(child.pid)
            output = child.stdout.read()
            child.stdout.close()
            _, status, usage = os.wait4(child.pid, 0)
            own = peak.stop()
            child.returncode = os.waitstatus_to_exitcode(status)
            wall = time.perf_counter() - start
        if child.returncode:
            tail = log_file.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)}: exit status {child.returncode}\n{tail}")
    finally:
        log_file.unlink(missing_ok=True)
    return Cost(usage.ru_utime + usage.ru_stime, wall, output, usage.ru_maxrss / 1024, own)


class Peak:
    """Watches a process's memory without mapped files, which the system takes back when it needs room."""

    def __init__(self, process: int):
        self._status, self._most = pathlib.Path(f"/proc/{process}/status"), 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            try:
                lines = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
            except OSError:  # it has ended
                return
            self._most = max(self._most, int(lines.get("RssAnon", "0 kB").split()[0]))

    def stop(self) -> float:
        """Ends the watch; the most that was seen, in MiB."""
        self._over.set()
        self._thread.join()
        return self._most / 1024


class Peer:
    """Another contestant: a script that works once for each line it is sent, and waits while it is not its turn.

    It prints a line of JSON when it is ready, and one for each turn, with "cpu" and "wall" seconds.

    Attributes:
      about: the first line.
      found: the last one.
    """

    def __init__(self, process: subprocess.Popen):
        self._process, self.about = process, json.loads(process.stdout.readline())
        self.found: dict = {}

    def __call__(self, line: object = "go") -> Cost:
        print(line, file=self._process.stdin, flush=True)
        self.found = json.loads(self._process.stdout.readline())
        return Cost(self.found["cpu"], self.found["wall"])


@contextlib.contextmanager
def peer(command: Sequence[object], kind: type[Peer] = Peer) -> Iterator[Peer]:
    """A peer that is ready; its process ends with the block."""
    with subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield kind(process)


def take_turns(contestants: Mapping[str, Callable[[], Cost]], rounds: int) -> dict[str, list[Cost]]:
    """Every contestant once, then every contestant again: a machine that slows down slows all of them."""
    costs: dict[str, list[Cost]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, run in contestants.items():
            costs[name].append(run())
            print(f"benchmark: round {number + 1}: {name}: {costs[name][-1].cpu:.2f} CPU s", file=sys.stderr)
    return costs


def least(costs: Sequence[Cost]) -> float:
    """CPU seconds of the least disturbed run."""
    return min(cost.cpu for cost in costs)


def middle(costs: Sequence[Cost]) -> float:
    """Median of the CPU seconds."""
    return statistics.median(cost.cpu for cost in costs)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table: the first column to the left, the others to the right, floats with three figures or more."""
    cells = [list(header), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    print(f"\n{title}")
    for line in cells:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.1f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def finish(figures: Mapping[str, object]) -> None:
    """The last line of every benchmark: its figures as JSON, ratios first, floats to four digits."""

    def shortened(value: object) -> object:
        if isinstance(value, Mapping):
            return {name: shortened(entry) for name, entry in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    print(f"\n{json.dumps(shortened(figures))}", flush=True)
