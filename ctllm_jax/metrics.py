"""What a run writes down: metrics.jsonl, and how fast the hardware is said to be.

`metrics.jsonl` has one object a line: {"kind": "train" | "eval", "step", "time", ...}. Speed counts completed device
work only. MFU is given in both conventions: causal (only the visible half of attention) and full square.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from ctllm_jax.common.progress import Progress
from ctllm_jax.data.store import TokenStore
from ctllm_jax.hardware import chip_of
from ctllm_jax.model import ModelConfig, flops_per_token
from ctllm_jax.step import UPDATE_METRICS


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written down while a run goes on."""

    every: int  # steps between lines of metrics.jsonl


class MetricsLog:
    """Appends to a run's metrics.jsonl (process 0 only).

    A run that goes on from the checkpoint of step `resume_step` first drops the lines of later steps; one that starts
    (resume_step 0) drops all: a run killed before its first checkpoint says everything again.
    """

    def __init__(self, run_dir: str | os.PathLike, resume_step: int):
        self._file = None
        if jax.process_index() != 0:
            return
        path = pathlib.Path(run_dir) / "metrics.jsonl"
        kept = []
        if resume_step and path.exists():
            kept = [json.dumps(entry) for entry in _whole_lines(path) if entry["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: dict) -> None:
        """Appends one line and flushes it."""
        if self._file is not None:
            entry = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class Meter:
    """Accounts for finished steps: metrics.jsonl, the token ledger, the progress line, the speed of completed work.

    A step's metrics are handed over when it is dispatched and read when the next one has been, so that the device
    never waits for the host.

    Attributes:
      ledger: tokens learned so far from each source, up to the last step that was read.
    """

    def __init__(self, log: MetricsLog, every: int, sources: Sequence[str], ledger: dict[str, int]):
        self.ledger = ledger
        self._log, self._every, self._sources = log, every, sources
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._tokens_per_step, self._flops, self._peak = 0, (0.0, 0.0), None
        self.restart_clock()

    def measure(self, model: ModelConfig, store: TokenStore, batch_size: int, mesh: Mesh) -> None:
        """What a step's speed and share of the hardware's peak are computed from."""
        rows = 2 * batch_size if store.kind == "preference" else batch_size
        self._tokens_per_step = rows * store.sequence_length
        self._flops = tuple(flops_per_token(model, store.sequence_length, causal) for causal in (True, False))
        chip = chip_of(mesh.devices.flat[0])  # an unknown device has no share of a peak: a guess would be worse
        self._peak = chip.peak_flops * mesh.size if chip else None

    def restart_clock(self) -> None:
        """Leaves what happened since the last step (compiling, evaluation, saving) out of the speed."""
        self._since: float | None = None
        self._steps = 0

    def dispatched(self, step: int, metrics: dict[str, jax.Array], progress: Progress) -> None:
        """Takes a step's metrics and accounts for the step before."""
        self.catch_up(progress)
        self._pending = (step, metrics)

    def catch_up(self, progress: Progress) -> None:
        """Waits for the step taken last and accounts for it."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        sums = jax.device_get(metrics)
        now = time.monotonic()
        if self._since is None:
            self._since = now  # the first step after a pause only sets the clock
        else:
            self._steps += 1
        by_source = {name: sums.pop(name) for name in ("source_tokens", "source_loss") if name in sums}
        for source, tokens in zip(self._sources, by_source.get("source_tokens", ()), strict=False):
            self.ledger[source] += int(tokens)
        count = max(float(sums["count"]), 1.0)
        progress.at(step, f"loss {sums['loss'] / count:.4f}")
        if step == 1 or step % self._every == 0:
            entry = {name: sums.pop(name).tolist() for name in ("count", *UPDATE_METRICS)}
            entry |= {name: float(value) / count for name, value in sums.items()}
            if by_source:
                seen = np.flatnonzero(by_source["source_tokens"])
                means = by_source["source_loss"][seen] / by_source["source_tokens"][seen]
                entry |= {f"loss/{self._sources[i]}": float(mean) for i, mean in zip(seen, means, strict=True)}
            self._log.write("train", step, {**entry, **self._speed(now)})

    def _speed(self, now: float) -> dict[str, float]:
        """Tokens per second (padding included) since the last line, and MFU where the device's peak is known."""
        if not self._steps:
            return {}
        tokens_per_second = self._tokens_per_step * self._steps / (now - self._since)
        self._since, self._steps = now, 0
        speed = {"tokens_per_second": round(tokens_per_second, 1)}
        if self._peak:
            speed |= {
                f"mfu_{name}": flops * tokens_per_second / self._peak
                for name, flops in zip(("causal", "full"), self._flops, strict=True)
            }
        return speed


def read_metrics(run_dir: str | os.PathLike, kind: str) -> list[dict]:
    """All entries of one kind, in order."""
    return [entry for entry in _whole_lines(pathlib.Path(run_dir) / "metrics.jsonl") if entry["kind"] == kind]


def _whole_lines(path: pathlib.Path) -> Iterator[dict]:
    """The entries of a metrics file, without the line that a kill cut short."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)
