"""Jobs of several processes: joining them, and letting one go first."""

import contextlib
import os
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from ctllm_jax.common.errors import UserError

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join() -> None:
    """Joins the other processes of the job; call before anything else asks for devices.

    Addresses come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; without them JAX looks for the
    job itself, as it can on TPU pods and under SLURM.

    Raises:
      UserError: only some of the variables are set, or there is no such job.
    """
    given = [name for name in (_ADDRESS, _COUNT, _INDEX) if name in os.environ]
    if given and len(given) < 3:
        raise UserError(f"{', '.join(given)} set, but a job needs {_ADDRESS}, {_COUNT} and {_INDEX}")
    try:
        if given:
            jax.distributed.initialize(os.environ[_ADDRESS], int(os.environ[_COUNT]), int(os.environ[_INDEX]))
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"could not join a job of several processes: {error}") from None


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Process 0 runs the block, then the others do: for work on a shared folder that must not race."""
    if jax.process_count() > 1 and jax.process_index() > 0:
        multihost_utils.sync_global_devices("first process first")
    try:
        yield
    finally:  # an error must not leave the others waiting: they go on and meet it themselves
        if jax.process_count() > 1 and jax.process_index() == 0:
            multihost_utils.sync_global_devices("first process first")
