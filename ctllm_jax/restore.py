"""Reads checkpoints, and tells damage from a wrong request.

A checkpoint is damaged when a file of it is missing, cut short or not what was written: the run goes on from the one
before. It is not damaged when it holds another model than is asked for, or when the storage does not answer: those are
errors, and every other checkpoint would meet them too.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ctllm_jax.checkpoint import checkpoints_folder, checksums, message
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import is_remote
from ctllm_jax.common.storage import is_storage, unread
from ctllm_jax.mirror import remote_of
from ctllm_jax.processes import together, votes


class Damaged(Exception):
    """A checkpoint is not what was written: which file, and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint as it was saved."""

    step: int
    params: Any
    optimizer: Any
    record: dict


def restore_newest(
    run_dir: str | os.PathLike, params: Any, optimizer: Any, make_room: Callable[[], None] = lambda: None
) -> Restored | None:
    """Reads the newest checkpoint that is whole, the same in all processes; None where there never was one.

    Damaged ones on the way are moved aside, under a name that says so, and reported on stderr.

    Args:
      run_dir: a run directory.
      params, optimizer: trees of ShapeDtypeStructs with shardings, to read into.
      make_room: called before arrays are read, maybe again; what follows is a checkpoint or an error.

    Raises:
      UserError: all are damaged; one holds other arrays than are asked for; the storage does not answer.
    """
    folder = checkpoints_folder(run_dir)
    with _answering(folder):
        return _newest_whole(folder, params, optimizer, make_room)


def _newest_whole(folder: epath.Path, params: Any, optimizer: Any, make_room: Callable[[], None]) -> Restored | None:
    together(functools.partial(_put_aside_unreadable, folder))
    while (step := _newest(folder)) is not None:
        make_room()
        found = together(functools.partial(_attempt, folder / str(step), params, optimizer))
        damaged = votes(isinstance(found, Damaged))[:, 0]
        if not damaged.any():
            found = _compared(folder / str(step), *found)
            if isinstance(found, Restored):
                return found
        why = found if isinstance(found, Damaged) else f"process {int(damaged.argmax())} could not read it"
        together(functools.partial(_put_aside, folder / str(step), why))
    aside = sorted(path.name for path in folder.glob("*.damaged*")) if folder.exists() else []
    if aside:
        raise UserError(
            f"{folder}: no whole checkpoint is left; damaged: {', '.join(aside)}. Copy a whole one here under its "
            "step's number, or delete this folder to start at step 0"
        )
    return None


def checkpoint_steps(run_dir: str | os.PathLike) -> list[int]:
    """The steps of a run's committed checkpoints, in order.

    Raises:
      UserError: it has no folder of them; the storage does not answer.
    """
    folder = checkpoints_folder(run_dir)
    with _answering(folder):
        if not folder.exists():
            raise UserError(f"{remote_of(run_dir) or run_dir}: holds no checkpoints")
        return sorted(ocp.utils.checkpoint_steps(folder))


def find_step(run_dir: str | os.PathLike, step: int | None) -> int:
    """The step of the checkpoint that is asked for; None asks for the newest.

    Raises:
      UserError: no such checkpoint; the storage does not answer.
    """
    steps = checkpoint_steps(run_dir)
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{remote_of(run_dir) or run_dir}: no checkpoint of step {step}; there are: {steps or 'none'}")
    return steps[-1] if step is None else step


def load_params(run_dir: str | os.PathLike, abstract: Any, step: int) -> dict:
    """Reads the parameters of a run.

    Args:
      run_dir: a run directory.
      abstract: tree of ShapeDtypeStructs with shardings, to read into; where these reach over several processes, all
        must read.
      step: which checkpoint.

    Raises:
      UserError: the checkpoint is damaged or holds other parameters; the storage does not answer.
    """
    folder = checkpoints_folder(run_dir)
    try:
        with _answering(folder):
            _check_files(folder / str(step))
            return _read(folder / str(step) / "params", abstract)
    except Damaged as damage:
        others = [other for other in checkpoint_steps(run_dir) if other != step]
        raise UserError(
            f"{remote_of(run_dir) or run_dir}: the checkpoint of step {step} is damaged: {damage}. Others, which "
            f"can be asked for by step: {others or 'none'}"
        ) from None


# ---- One checkpoint


def _attempt(folder: epath.Path, params: Any, optimizer: Any) -> tuple[Any, Any, dict] | Damaged:
    """(params, optimizer, record) of a step's folder, or what is wrong with it."""
    try:
        _check_files(folder)
        record = _json(folder / "record" / "metadata")
        if missing := {"checksums", "ledger", "rates"} - record.keys():
            raise Damaged(f"{folder / 'record' / 'metadata'} lacks {', '.join(sorted(missing))}")
        params, optimizer = _read(folder / "params", params), _read(folder / "optimizer", optimizer)
        return params, optimizer, record
    except Damaged as damage:
        return damage


def _compared(folder: epath.Path, params: Any, optimizer: Any, record: dict) -> Restored | Damaged:
    """What was read, if its checksums are those of the record; all processes must call it."""
    expected = record["checksums"]
    sums = checksums({"params": params, "optimizer": optimizer})
    differing = [name for name in expected if sums.get(name) != expected[name]]
    if differing:
        return Damaged(f"{folder}: {differing[0]} was read but is not what was saved (checksums differ)")
    return Restored(int(folder.name), params, optimizer, record)


def _check_files(folder: epath.Path) -> None:
    """Looks at a step's small files; reads no arrays.

    Raises:
      Damaged: a file that every checkpoint has is missing or unreadable.
    """
    if not (folder / "commit_success.txt").exists():
        raise Damaged(f"{folder / 'commit_success.txt'}, which says that the save was completed, is missing")
    items = _json(folder / "_CHECKPOINT_METADATA").get("item_handlers") or {}
    for item in items:
        _json(folder / item / {"record": "metadata", "metrics": "metrics"}.get(item, "_METADATA"))
    if "params" not in items:
        raise Damaged(f"{folder / '_CHECKPOINT_METADATA'} names no parameters")


def _read(folder: epath.Path, abstract: Any) -> Any:
    """The arrays of an item, laid out as `abstract` says.

    Raises:
      Damaged: they cannot be read, or are not what was written.
      UserError: the item holds other arrays than `abstract`; the storage does not answer.
    """
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        try:
            found = ocp.tree.to_flat_dict(handler.metadata(folder).tree, sep="/")
        except Exception as error:
            raise _judged(folder, error) from error
        _check_arrays(folder, found, ocp.tree.to_flat_dict(abstract, sep="/"))
        try:
            return handler.restore(folder, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # TensorStore has no type of its own for what a disk says
            raise _judged(folder, error) from error


def _check_arrays(folder: epath.Path, found: dict, wanted: dict) -> None:
    """UserError unless both have the same names and shapes; dtypes are converted."""
    shapes = [{name: tuple(leaf.shape) for name, leaf in leaves.items()} for leaves in (found, wanted)]
    differing = [name for name in sorted({*found, *wanted}) if shapes[0].get(name) != shapes[1].get(name)]
    if differing:
        first = "; ".join(
            f"{n}: {shapes[0].get(n, 'not')} there, {shapes[1].get(n, 'not')} wanted" for n in differing[:3]
        )
        raise UserError(
            f"{folder} holds other arrays than this model and optimizer have ({len(differing)} differ: {first}). It "
            "is not damaged: give the settings that it was made with"
        )


def _judged(folder: epath.Path, error: Exception) -> Exception:
    """What an error in reading arrays means: Damaged, or a UserError where the storage cannot be read."""
    return unread(folder, error, message(error)) or Damaged(f"{folder}: {message(error)}")


@contextlib.contextmanager
def _answering(folder: epath.Path) -> Iterator[None]:
    """Turns the errors of a bucket that does not answer into a UserError."""
    try:
        yield
    except Exception as error:
        if not is_remote(folder) or not is_storage(error):
            raise
        raise unread(folder, error, message(error)) from error


def _json(path: epath.Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{path} is missing") from None
    except ValueError as error:
        raise Damaged(f"{path} is not valid JSON ({error})") from None
    except OSError as error:
        raise unread(path, error, str(error)) from None
    if not isinstance(value, dict):
        raise Damaged(f"{path} holds no JSON object")
    return value


# ---- All of a run's


def _newest(folder: epath.Path) -> int | None:
    """The newest step on process 0, which may see the shared folder before the others do."""
    steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
    newest = int(multihost_utils.broadcast_one_to_all(np.int32(max(steps, default=-1))))
    return None if newest < 0 else newest


def _put_aside_unreadable(folder: epath.Path) -> None:
    """Moves aside what a cheap look shows to be damaged; old checkpoints too, for Orbax reads something of each."""
    if jax.process_index() != 0:
        return
    for step in sorted(ocp.utils.checkpoint_steps(folder), reverse=True) if folder.exists() else ():
        try:
            _check_files(folder / str(step))
        except Damaged as damage:
            _put_aside(folder / str(step), damage)


def _put_aside(folder: epath.Path, why: Damaged | str) -> None:
    """Renames a step's folder (process 0 does), so that nothing reads it again and the step can be saved again."""
    if jax.process_index() != 0:
        return
    target, number = folder.with_name(f"{folder.name}.damaged"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.damaged-{number}")
    folder.rename(target)
    print(f"train: THE CHECKPOINT OF STEP {folder.name} IS DAMAGED: {why}. Moved to {target}", file=sys.stderr)
