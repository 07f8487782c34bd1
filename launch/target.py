"""What a target is: a place where a verb's processes run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ctllm_jax.cli import Option


@dataclasses.dataclass(frozen=True)
class Payload:
    """The command line after `--`, checked as far as it can be without running it."""

    verb: str
    arguments: tuple[str, ...]
    distributed: bool  # whether the verb can be a job of several processes


@dataclasses.dataclass(frozen=True)
class Target:
    """One entry of `launch.run.TARGETS`.

    `run(payload, options, dry_run)` runs the payload and returns the exit status for the shell. With dry_run it prints
    every command and file exactly as it would use them, and does nothing else.
    """

    help: str
    options: Mapping[str, Option]
    run: Callable[[Payload, Mapping[str, Any], bool], int]
