"""Orbax checkpoints of a run: parameters, optimizer and a JSON record, committed whole or not there.

Parameters are an item of their own, so that evaluation and warm starts read nothing else; where a run keeps an average
of them, the average is that item, and what training goes on from lies with the optimizer. This module writes;
`ctllm_jax.restore` reads, and judges what it reads.
"""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from ctllm_jax.common.errors import Unanswered, UserError
from ctllm_jax.common.files import is_remote
from ctllm_jax.metrics.definitions import find
from ctllm_jax.mirror import prepare_paths, remote_of
from ctllm_jax.processes import together, votes
from ctllm_jax.save_barrier import SaveBarrier

PAUSES = (5, 10, 20, 40, 80, 160)  # seconds before a save that failed is tried again; after the last one it is given up
TIMEOUT = 600  # seconds that a save may take
_BEST = ("lowest", "highest")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, and which checkpoints stay: the newest, every so many steps, and the best."""

    every: int  # [steps] between checkpoints; the last step is always saved
    minutes: float  # [minutes] one is also due when the last is so many minutes old (0: never for that reason)
    kept: int  # [checkpoints] newest checkpoints that stay
    keep_every: int  # [steps] checkpoints of the multiples of so many steps stay for ever (0: none)
    keep_best: int  # [checkpoints] so many stay that are best by `best` (0: none), of the steps evaluated
    best: str = "lowest loss"  # "lowest METRIC" or "highest METRIC", a metric of the looks at held-out data

    def __post_init__(self):
        if self.every < 1 or self.kept < 1:
            raise ValueError("every and kept must be at least 1")
        if min(self.minutes, self.keep_every, self.keep_best) < 0:
            raise ValueError("minutes, keep_every and keep_best must not be negative; 0 turns each of them off")
        if self.keep_every % self.every:
            raise ValueError(
                f"keep_every {self.keep_every} is not a multiple of every {self.every}: most of those steps would not "
                "be saved"
            )
        order, _, metric = self.best.partition(" ")
        known = find("eval", metric)
        if order not in _BEST or known is None or known.timing:
            raise ValueError(
                f"best {self.best!r} is neither 'lowest METRIC' nor 'highest METRIC' with a metric of held-out data, "
                "such as 'lowest loss', 'lowest loss/SOURCE', 'highest accuracy' (docs/metrics.md has them all)"
            )

    @property
    def metric(self) -> str:
        """The metric that checkpoints are ranked by."""
        return self.best.partition(" ")[2]

    def goodness(self, held_out: Mapping[str, float]) -> float:
        """How good a checkpoint with these held-out figures is: larger is better; -inf without a finite figure."""
        value = held_out.get(self.metric, math.nan)
        return (value if self.best.startswith("highest ") else -value) if math.isfinite(value) else -math.inf

    def check_known(self, held_out: Mapping[str, float]) -> None:
        """UserError if the best are to stay and this run's evaluations do not have the metric that they go by."""
        if self.keep_best and self.metric not in held_out:
            raise UserError(
                f"checkpoints.keep_best goes by {self.metric!r}, which the evaluations of this run do not have; they "
                f"have: {', '.join(sorted(held_out)) or 'nothing (the store has no held-out split)'}. Set "
                "checkpoints.best to one of them, or keep_best to 0"
            )


class Checkpoints:
    """Saves the checkpoints of one run directory; saving returns at once, the writing goes on in the background.

    A save that fails is tried again after a pause with what the state is by then: training goes on meanwhile, and no
    copy of the old state takes up memory. All processes must make the same calls in the same order.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        config: CheckpointConfig,
        ask_every: int,
        before_commit: Callable[[], None] | None = None,
    ):
        """
        Args:
          run_dir: a run directory.
          config: when, and what stays.
          ask_every: steps between looks at the clock (of process 0) in a job of several processes.
          before_commit: what process 0 does in the background between writing a checkpoint on a bucket and committing
            it; an error of it fails the save.
        """
        self.folder, self._config = checkpoints_folder(run_dir), config
        self._remote = is_remote(self.folder)
        self._temporary = _committed_after(before_commit) if before_commit else None
        self._every, self._seconds, self._ask_every = config.every, 60 * config.minutes or math.inf, ask_every
        self._saving: int | None = None  # the step under way in the background
        self._error: Exception | None = None  # what kept that save from starting
        self._failures = 0  # since the last save that was committed
        self._lost = 0  # saves that failed in all
        self._saved_at, self._retry_at = time.monotonic(), 0.0
        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(config.kept)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        if config.keep_best:
            best = functools.partial(policies.BestN, get_metric_fn=config.goodness)  # of equals the newer stays
            keep.append(best(n=config.keep_best, keep_checkpoints_without_metrics=False))
        self._keep = policies.AnyPreservationPolicy(keep)
        together(self._prepare)
        self._manager: ocp.CheckpointManager | None = self._open()  # None after a failure

    def _prepare(self) -> None:
        """Makes the requests to the storage that opening a manager makes, and deletes saves that were cut short: Orbax
        would report a failure to do so in the next save, where no process may fail alone."""
        if self.folder.exists():
            if jax.process_index() == 0:
                for leftover in ocp.utils.tmp_checkpoints(self.folder, temporary_path_cls=self._temporary):
                    leftover.get().rmtree(missing_ok=True)
            ocp.utils.checkpoint_steps(self.folder)

    def _open(self) -> ocp.CheckpointManager:
        name = f"after-{self._lost}"
        self._barrier = SaveBarrier(name) if jax.process_count() > 1 else None
        logging.getLogger("absl").addFilter(_worth_saying)
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._keep,
                best_fn=self._config.goodness,  # without it no metrics are written
                enable_async_checkpointing=True,
                temporary_path_class=self._temporary,
                async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT, barrier_sync_fn=self._barrier),
                multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name),
            ),
        )

    def due(self, step: int) -> bool:
        """Whether a checkpoint of this step is wanted, by steps or by the clock; the same in all processes.

        Raises:
          UserError: an earlier save failed for the last time.
        """
        scheduled = step % self._every == 0
        if not scheduled and jax.process_count() > 1 and step % self._ask_every:
            return False
        now = time.monotonic()
        by_clock = now - self._saved_at >= self._seconds
        saving = self._manager is not None and self._manager.is_saving_in_progress()
        said = votes(saving, by_clock, now >= self._retry_at)
        busy, by_clock, calm = said[:, 0].any(), said[0, 1], said[0, 2]
        known = self._failures
        if not busy:
            self._settle()
        if self._failures:
            return self._failures == known and bool(calm)
        return bool(scheduled or (by_clock and not busy))

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        record: dict,
        held_out: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Starts to save a step, after the save before it has ended.

        Args:
          step: names the checkpoint.
          params, optimizer: trees of arrays, which may be used up as soon as this returns.
          record: JSON-able, as it is now; checksums of the arrays are added.
          held_out: figures of the held-out data, saved beside it, by which the best are told; None where the step was
            not evaluated.
          wait: returns only when the checkpoint is committed, trying again with the same state if need be.

        Raises:
          UserError: the save failed for the last time (with `wait`), or an earlier one did.
        """
        self._settle()
        # A copy: the ledger in it goes on while the background writes.
        record = {**copy.deepcopy(record), "checksums": checksums({"params": params, "optimizer": optimizer})}
        if jax.default_backend() == "cpu" and not wait:
            # Orbax reads such arrays where they lie: a step that takes their memory over would wait for the whole save.
            params, optimizer = jax.tree.map(jnp.copy, (params, optimizer))
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            record=ocp.args.JsonSave(record),
        )
        metrics = None if held_out is None else dict(held_out)
        self._start(step, items, metrics)
        while wait:
            self._settle()
            if not self._failures:
                return
            time.sleep(max(0.0, self._retry_at - time.monotonic()))
            self._start(step, items, metrics)

    def best(self) -> tuple[int, float] | None:
        """(step, metric) of the best checkpoint there is, once all are committed; None where no step was evaluated."""
        metric = self._config.metric
        known = {step: (self._manager.metrics(step) or {}).get(metric) for step in self._manager.all_steps()}
        known = {step: value for step, value in known.items() if value is not None}
        if not known:
            return None
        step = max(known, key=lambda step: (self._config.goodness({metric: known[step]}), step))
        return step, known[step]

    def close(self) -> None:
        """Waits until everything saved is committed, then frees the manager's threads."""
        self._settle()
        if self._manager is not None:
            self._manager.close()

    def _start(self, step: int, items: ocp.args.Composite, metrics: dict | None) -> None:
        """Begins a save; an error is left to `_settle`."""
        self._saving, self._saved_at = step, time.monotonic()
        # From here on process 0 goes to the storage between barriers that are collectives. An error there takes it on
        # to the next step while the others wait for it. So all look first, and none begins where one cannot.
        if not votes(self._tried(functools.partial(self._look, step))).all():
            return
        if not self._tried(functools.partial(self._save, step, items, metrics)) and self._barrier is not None:
            self._barrier.absent()

    def _look(self, step: int) -> None:
        """Makes the requests to the storage that the beginning of a save makes."""
        if self._manager is None:
            self._prepare()
        (self.folder / str(step)).exists()

    def _save(self, step: int, items: ocp.args.Composite, metrics: dict | None) -> None:
        if self._manager is None:
            self._manager = self._open()
        self._manager.save(step, args=items, metrics=metrics)

    def _tried(self, action: Callable[[], Any]) -> bool:
        """Whether an action went well in this process; an error of the storage is kept for `_settle`."""
        try:
            action()
        except Exception as error:
            if not isinstance(error, OSError) and not self._remote:  # gs:// has libraries with errors of their own
                raise
            self._error = error
            return False
        return True

    def _settle(self) -> None:
        """Waits for the save under way and notes whether it failed in any process.

        Raises:
          UserError: it failed, and no further attempt is allowed.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        error, self._error = self._error, None
        try:
            if self._manager is not None:
                self._manager.wait_until_finished()
        except Exception as failure:  # TensorStore has no type of its own for what a disk says
            error = failure
        failed = votes(error is not None)[:, 0]
        if not failed.any():
            self._failures = 0
            return
        if jax.process_index() == 0 and not self._remote:  # what it wrote takes up the room that the next attempt needs
            for leftover in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)  # its threads may still write: see `_prepare`
        self._failures, self._lost = self._failures + 1, self._lost + 1
        self._drop()
        cause = message(error) if error else f"process {int(failed.argmax())} says why"
        what = f"{self.folder}: the checkpoint of step {step} could not be written ({cause})"
        if self._failures > len(PAUSES):
            what += f", nor could the {len(PAUSES)} attempts before it. Checkpoints there: {_steps_in(self.folder)}"
            if self._remote:
                raise Unanswered(f"{what}. The same command goes on from the newest") from error
            raise UserError(f"{what}. Make room or mend the disk; the same command goes on from the newest") from error
        pause = PAUSES[self._failures - 1]
        self._retry_at = time.monotonic() + pause
        print(f"train: {what}; attempt {self._failures + 1} in {pause} s", file=sys.stderr)

    def _drop(self) -> None:
        """Closes the manager. The next attempt opens one that knows nothing of the failed save: the checkpoints that it
        was to replace stay, and no barrier has the name of one where a process was missing."""
        with contextlib.suppress(Exception):  # of the save that failed, once more
            self._manager.close()
        self._manager = None


def _worth_saying(remark: logging.LogRecord) -> bool:
    """False for Orbax's warning at each checkpoint of a step that was not evaluated, which is as it should be."""
    return not str(remark.msg).startswith("Requested `tracked_metric`")


def checkpoints_folder(run_dir: str | os.PathLike) -> epath.Path:
    """Where a run's checkpoints lie, as Orbax wants it: absolute; those of a mirror's run lie on its bucket."""
    location = str(run_dir) if is_remote(run_dir) else remote_of(run_dir)
    if location is None:
        return epath.Path(os.path.abspath(epath.Path(run_dir) / "checkpoints"))
    prepare_paths()
    return epath.Path(location) / "checkpoints"


def _committed_after(action: Callable[[], None]) -> type:
    """How Orbax writes to a bucket, where nothing can be renamed: under the final name, with a marker at the end; with
    an action before the marker."""

    class CommittedAfter(ocp.path.atomicity.CommitFileTemporaryPath):
        async def finalize(self) -> None:
            await asyncio.to_thread(action)
            await super().finalize()

    return CommittedAfter


def _steps_in(folder: epath.Path) -> str:
    try:
        return str(sorted(ocp.utils.checkpoint_steps(folder)) or "none")
    except Exception as error:  # the storage is what fails
        return f"not known ({message(error)})"


def message(error: BaseException) -> str:
    """An error's first cause in one line; TensorStore's own messages go on for pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).partition(" [tensorstore_spec=")[0].splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 400 else f"{lines[0][:195]} ... {lines[0][-200:]}"  # the reason comes last


def checksums(tree: Any) -> dict[str, int]:
    """Sum of each leaf's bits, by 32 (modulo 2^32), by the leaf's name: the same however the leaf is laid out."""
    leaves = ocp.tree.to_flat_dict(tree, sep="/")
    everywhere = NamedSharding(next(iter(leaves.values())).sharding.mesh, PartitionSpec())
    sums = jax.device_get(jax.jit(_bit_sums, out_shardings=everywhere)(leaves))
    return {name: int(value) for name, value in sums.items()}


def _bit_sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def sum_of(leaf: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)  # 8 bytes give two of four
        return jnp.sum(jax.lax.bitcast_convert_type(leaf, unsigned), dtype=jnp.uint32)

    return {name: sum_of(leaf) for name, leaf in leaves.items()}


def save_params(run_dir: str | os.PathLike, params: dict, step: int) -> None:
    """Writes parameters alone, as a checkpoint that evaluation and warm starts can read, unless it is there already.

    All processes must call it.
    """
    options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
    with ocp.CheckpointManager(checkpoints_folder(run_dir), options=options) as manager:
        if step not in manager.all_steps():
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
            manager.wait_until_finished()
