"""What a target is: a place where a verb's processes run."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from ctllm_jax.verbs import Option
from launch.jobs import Job, State, held_cancel, held_profile, held_state


@dataclasses.dataclass(frozen=True)
class Payload:
    """The command line after `--`, checked as far as it can be without running it.

    Attributes:
      distributed: whether the verb can be a job of several processes.
      writes_to: its --workdir, if that is written and on no bucket.
    """

    verb: str
    arguments: tuple[str, ...]
    distributed: bool
    writes_to: str | None = None

    def disk_folder(self, folder: str) -> str | None:
        """Where it writes on a machine's disk, its paths relative to `folder` there; None where it writes none."""
        return None if self.writes_to is None else os.path.normpath(os.path.join(folder, self.writes_to))


@dataclasses.dataclass(frozen=True)
class Target:
    """One entry of `launch.run.TARGETS`.

    `run(payload, options, dry_run)` runs the payload and returns the exit status for the shell. With dry_run it prints
    every command and file exactly as it would use them, and does nothing else.

    `state(job)`, `cancel(job, now)` and `profile(job)` are what `ctllm launch list`, `attach`, `cancel` and `profile`
    ask of a job that is recorded (`launch.jobs`). As they stand here they are those of a job that a launcher holds.
    """

    help: str
    options: Mapping[str, Option]
    run: Callable[[Payload, Mapping[str, Any], bool], int]
    state: Callable[[Job], State] = held_state
    cancel: Callable[[Job, bool], None] = held_cancel
    profile: Callable[[Job], None] = held_profile
