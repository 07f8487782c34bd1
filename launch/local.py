"""Target `local`: processes on this machine.

Accelerators are not divided among them: with several processes give each CPU devices of its own (`--devices`), or leave
one process to the whole machine, as JAX means it on a TPU VM or a GPU host.
"""

import functools
import socket
import sys
from collections.abc import Mapping
from typing import Any

from ctllm_jax.common.errors import UserError
from ctllm_jax.verbs import Option
from launch.held import DETACH, hold
from launch.process import Process
from launch.target import Payload, Target


def run(payload: Payload, options: Mapping[str, Any], dry_run: bool) -> int:
    """Runs the payload in so many processes; see `Target`.

    Raises:
      UserError: a number is out of range, or the verb cannot be a job of several processes.
    """
    count, devices, restarts = options["processes"], options["devices"], options["restarts"]
    for name, least in (("processes", 1), ("devices", 0), ("restarts", 0)):
        if options[name] < least:
            raise UserError(f"launch local: --{name}={options[name]}: must be at least {least}")
    if count > 1 and not payload.distributed:
        raise UserError(f"launch local: {payload.verb} runs in one process, not in {count}: give --processes=1")
    start = functools.partial(processes, payload, count, devices)
    if dry_run:
        print("\n".join(str(process) for process in start()))
        return 0
    return hold("local", payload, "", start, restarts, options["detach"])


def processes(payload: Payload, count: int, devices: int) -> list[Process]:
    """The processes of one attempt, which meet at a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "ctllm_jax.cli", payload.verb, *payload.arguments]
    shared = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # JAX would listen to the whole network
        "JAX_NUM_PROCESSES": str(count),
        "PYTHONUNBUFFERED": "1",  # lines arrive when they are written
    }
    if count > 1:
        command.append("--config.distributed=True")
    if devices:
        shared |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return [Process(str(index), tuple(command), {**shared, "JAX_PROCESS_ID": str(index)}) for index in range(count)]


TARGET = Target(
    "processes on this machine",
    {
        "processes": Option("--processes=N", "how many", 1),
        "devices": Option("--devices=M", "virtual CPU devices of each; without it what JAX finds", 0),
        "restarts": Option("--restarts=K", "how often to start again after a failure (3)", 3),
        **DETACH,
    },
    run,
)
