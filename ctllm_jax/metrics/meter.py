"""Accounts for finished steps: what they say goes to the log, the token ledger and the progress line.

Speed counts completed device work only. MFU is given in both conventions: causal (only the visible half of attention)
and full square.
"""

import itertools
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.progress import Progress
from ctllm_jax.data.store import TokenStore
from ctllm_jax.hardware import GIB, chip_of
from ctllm_jax.metrics.log import LogConfig, MetricsLog
from ctllm_jax.metrics.profile import Profiler
from ctllm_jax.model import ModelConfig, flops_per_token
from ctllm_jax.step import UPDATE_METRICS

_SMOOTH = 0.98  # what the smoothed loss of the progress line keeps of itself at a step
_ALWAYS = ("count", "loss", "source_tokens", "skipped", "grad_norm")  # of a step's metrics: for what is seen to at once
_DIGITS = 5  # significant ones of a metric by layer


class Meter:
    """Accounts for finished steps.

    A step's metrics are handed over when it is dispatched and read when the next one has been, so that the device
    never waits for the host. The objective's sums are divided by the step's count; the update's metrics are not.

    Attributes:
      ledger: tokens learned so far from each source, up to the last step that was read.
      profiler: to be entered while steps are made.
    """

    def __init__(
        self,
        log: MetricsLog,
        config: LogConfig,
        sources: Sequence[str],
        ledger: dict[str, int],
        patience: float = math.inf,
    ):
        """`patience`: [steps] so many in a row may change nothing; more of them end the run with a UserError."""
        self.ledger, self._patience = ledger, patience
        self.profiler = Profiler(log.folder, config.profile)
        self._log, self._timesheet, self._every = log, log.timesheet, config.every
        self._sources = sources
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._step = 0  # that was read last
        self._skipped: int | None = None  # steps that have changed nothing
        self._in_a_row = 0  # of them, up to the last one
        self._tokens_per_step, self._flops, self._peak, self._devices = 0, (0.0, 0.0), None, []
        self._loss, self._weight, self._pace = 0.0, 0.0, ""  # for the progress line
        self._restart()

    def measure(self, model: ModelConfig, store: TokenStore, batch_size: int, mesh: Mesh, adapters: int = 0) -> None:
        """What a step's speed and share of the hardware's peak are computed from."""
        rows = 2 * batch_size if store.kind == "preference" else batch_size
        self._tokens_per_step = rows * store.sequence_length
        length = store.sequence_length
        self._flops = tuple(flops_per_token(model, length, causal, adapters) for causal in (True, False))
        chip = chip_of(mesh.devices.flat[0])  # an unknown device has no share of a peak: a guess would be worse
        self._peak = chip.peak_flops * mesh.size if chip else None
        self._devices = list(mesh.local_devices)

    def steps(self, batches: Iterator[Any], first: int, progress: Progress) -> Iterator[tuple[int, Any]]:
        """(step, batch) of the steps after `first`; takes the time that each batch is waited for.

        Args:
          batches: of those steps.
          first: steps that have been made before.
          progress: where finished steps are shown from now on.
        """
        self._progress = progress
        for step in itertools.count(first + 1):
            began = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            self._waited += time.monotonic() - began
            if self.profiler.due(step):
                self.pause("profile")
                self.profiler.start(step)
                self.go_on()
            yield step, batch

    def dispatched(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes a step's metrics and accounts for the step before."""
        self._catch_up()
        self._pending = (step, metrics)

    def pause(self, account: str) -> None:
        """Waits for the step taken last; what comes now is no step, and is charged to that account."""
        self._catch_up()
        self._log.flush()  # a checkpoint must not know of steps that the log does not
        self._timesheet.switch(account)

    def go_on(self) -> dict[str, float]:
        """Ends a pause. Returns how long it was, as a metric: {"evaluation_seconds": ...}; a save is logged here."""
        account = self._timesheet.doing
        seconds = {f"{account}_seconds": round(self._timesheet.switch("steps"), 4)}
        if account == "checkpoint":
            self._log.write("job", self._step, {**self._timesheet.entry(), **seconds})
        self._restart()
        return seconds

    def _restart(self) -> None:
        """Leaves what happened since the last step out of the speed."""
        self._since: float | None = None
        self._steps, self._waited = 0, 0.0

    def _catch_up(self) -> None:
        """Waits for the step taken last and accounts for it."""
        if self._pending is None:
            return
        (self._step, metrics), self._pending = self._pending, None
        logged = self._step == 1 or self._step % self._every == 0
        # Every array that is read takes its time, and most are only wanted now and then.
        sums = jax.device_get(metrics if logged else {name: metrics[name] for name in _ALWAYS if name in metrics})
        now = time.monotonic()
        if self._since is None:  # the first step after a pause only sets the clock
            self._since, self._waited = now, 0.0
        else:
            self._steps += 1
        if self._timesheet.doing == "start":
            self._timesheet.switch("steps")
        for source, tokens in zip(self._sources, sums.get("source_tokens", ()), strict=False):
            self.ledger[source] += int(tokens)
        self._check_skip(sums)
        if logged:
            self._log.write("train", self._step, {**self._values(sums), **self._speed(now), **self._memory()})
        if self._timesheet.due():
            self._log.write("job", self._step, self._timesheet.entry())
        self._show(float(sums["loss"]) / max(float(sums["count"]), 1.0))
        if self.profiler.over(self._step):
            self._timesheet.switch("profile")
            self.profiler.stop()
            self.go_on()

    def _check_skip(self, sums: Mapping[str, np.ndarray]) -> None:
        """Says that a step changed nothing. A spike that stays is normal before long; NaN would be skipped for ever.

        Raises:
          UserError: more steps in a row than `patience` were skipped.
        """
        if "skipped" not in sums:
            return
        norm, before, self._skipped = float(sums["grad_norm"]), self._skipped, int(sums["skipped"])
        if before is None:  # the first step after a start, which is no spike as far as is known
            before = self._skipped - (not np.isfinite(norm))
        if self._skipped == before:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        what = f"a spike (norm {norm:.3g})" if np.isfinite(norm) else "not finite"
        if self._in_a_row > self._patience:
            self._log.flush()
            raise UserError(
                f"the last {self._in_a_row} steps, up to {self._step}, changed nothing: the gradient is {what}, and "
                f"will stay so. `ctllm trace --step={self._step}` shows what the step read; a smaller learning rate or "
                "an earlier checkpoint (move the later ones away), may get past it"
            )
        if self._in_a_row == 1 and jax.process_index() == 0:
            print(f"train: step {self._step} changed nothing: its gradient is {what}", file=sys.stderr, flush=True)

    def _values(self, sums: Mapping[str, np.ndarray]) -> dict[str, float | list[float]]:
        """What a step says of itself; means where it gives sums, a list where it gives one value a layer."""
        values, count = {}, max(float(sums["count"]), 1.0)
        for name, value in sums.items():
            if name in ("source_tokens", "source_loss"):
                continue
            if np.ndim(value):
                values[name] = [float(f"{item:.{_DIGITS}g}") for item in value]
            else:
                values[name] = float(value) / (1.0 if name in ("count", *UPDATE_METRICS) else count)
        for i in np.flatnonzero(sums.get("source_tokens", ())):
            values[f"loss/{self._sources[i]}"] = float(sums["source_loss"][i] / sums["source_tokens"][i])
        return values

    def _speed(self, now: float) -> dict[str, float]:
        """Of the steps since the last line; MFU where the device's peak is known."""
        if not self._steps:
            return {}
        seconds = (now - self._since) / self._steps
        rate = self._tokens_per_step / seconds
        speed = {
            "step_ms": round(1e3 * seconds, 3),
            "tokens_per_second": round(rate, 1),
            "input_wait_ms": round(1e3 * self._waited / self._steps, 3),
        }
        self._pace = f"{_short(rate)} tok/s"
        if self._peak:
            causal, full = (flops * rate / self._peak for flops in self._flops)
            speed |= {"mfu_causal": causal, "mfu_full": full}
            self._pace += f"  MFU {causal:.0%}"
        self._since, self._steps, self._waited = now, 0, 0.0
        return speed

    def _memory(self) -> dict[str, float]:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        memory = {"host_memory_gib": round(pages * resource.getpagesize() / GIB, 3)}
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in self._devices]
        if any(peaks):
            memory["device_memory_peak_gib"] = round(max(peaks) / GIB, 3)
        return memory

    def _show(self, loss: float) -> None:
        """The loss beside its exponential mean, and the speed, on the progress line."""
        if np.isfinite(loss):
            self._loss, self._weight = _SMOOTH * self._loss + (1 - _SMOOTH) * loss, _SMOOTH * self._weight + 1 - _SMOOTH
        smooth = self._loss / self._weight if self._weight else float("nan")
        self._progress.at(self._step, "  ".join(filter(None, (f"loss {loss:.3f} ({smooth:.3f})", self._pace))))


def _short(number: float) -> str:
    """A rate in three digits: 950, 12.3k, 1.23M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
