"""Orbax checkpoints of a run: parameters, optimizer and a JSON record, committed whole or not there.

Parameters are an item of their own, so that evaluation and warm starts read nothing else.
"""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, read_json


class Checkpoints:
    """The checkpoints of one run directory; saving returns at once, the writing goes on in the background."""

    def __init__(self, run_dir: str | os.PathLike, keep: int | None = None):
        self.folder = as_path(run_dir) / "checkpoints"
        location = self.folder.absolute() if isinstance(self.folder, pathlib.Path) else self.folder
        self._manager = ocp.CheckpointManager(
            location,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
            ),
        )

    def latest(self) -> int | None:
        """Newest committed step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, optimizer: Any, record: dict) -> None:
        """Starts to save a step; raises what an earlier background save ran into."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                record=ocp.args.JsonSave(record),
            ),
        )

    def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any, dict]:
        """(params, optimizer, record) of a step, laid out like the given abstract trees (with shardings)."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                optimizer=ocp.args.StandardRestore(optimizer),
                record=ocp.args.JsonRestore(),
            ),
        )
        return restored.params, restored.optimizer, restored.record

    def close(self) -> None:
        """Waits until everything saved is committed, then frees the manager's threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(run_dir: str | os.PathLike, params: dict, step: int) -> None:
    """Writes parameters alone, as a checkpoint that evaluation and warm starts can read."""
    manager = ocp.CheckpointManager((pathlib.Path(run_dir) / "checkpoints").absolute())
    manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
    manager.wait_until_finished()
    manager.close()


def load_params(run_dir: str | os.PathLike, abstract: Any, step: int | None = None) -> tuple[dict, int, str]:
    """Reads the parameters of a run.

    Args:
      run_dir: a run directory.
      abstract: tree of ShapeDtypeStructs to read into; their shardings, where set, are honoured.
      step: which checkpoint; None takes the newest.

    Returns:
      (params, step, digest that names the run and step).

    Raises:
      UserError: no such checkpoint.
    """
    folder = pathlib.Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run_dir}: holds no checkpoints")
    steps = sorted(ocp.utils.checkpoint_steps(folder.absolute()))  # committed ones only
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{run_dir}: no checkpoint of step {step}; there are: {steps or 'none'}")
    step = steps[-1] if step is None else step
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default), abstract
    )
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder.absolute() / str(step) / "params", abstract)
    return params, step, f"{read_json(pathlib.Path(run_dir) / 'run.json')['fingerprint']}@{step}"
