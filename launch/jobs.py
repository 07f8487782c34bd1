"""Records of jobs: one JSON file a job, `ID.json`, and beside it the job's output, `ID.log`.

They lie in ~/.ctllm/jobs, or in the folder that CTLLM_JOBS names. A job that a launcher holds together (`local`, `ssh`,
`tpu`) ends with its launcher; one that was handed to a scheduler (`slurm`, `gke`) has its name there in `handle`.
"""

import contextlib
import dataclasses
import os
import pathlib
import secrets
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

from ctllm_jax.common.children import catches
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json, write_json


@dataclasses.dataclass(frozen=True)
class Job:
    """What is written down of a job when it starts, and its status when it has ended."""

    id: str
    target: str
    command: tuple[str, ...]  # what was given after `--`
    revision: str  # of the code: a commit, with the files that differ from it
    started: float  # seconds since 1970
    handle: Mapping[str, Any]  # how its target finds it again
    status: int | None = None  # as a shell has it; None until then

    @property
    def log(self) -> pathlib.Path:
        """The file of its output."""
        return jobs_folder() / f"{self.id}.log"

    def save(self) -> None:
        """Writes the record, in place of an earlier one of this job."""
        write_json(jobs_folder() / f"{self.id}.json", dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class State:
    """How a job stands: in words, and its status once it has ended."""

    text: str
    status: int | None = None


def jobs_folder() -> pathlib.Path:
    """Where records are: see above."""
    return pathlib.Path(os.environ.get("CTLLM_JOBS") or "~/.ctllm/jobs").expanduser().absolute()


def new_id(verb: str) -> str:
    """A name that no other job has: what runs, when it was started, four random letters."""
    return f"{verb}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def load(name: str) -> Job:
    """The record of a job; the beginning of a name is enough where only one begins so.

    Raises:
      UserError: no job, or several, have such a name.
    """
    found = sorted(path for path in jobs_folder().glob("*.json") if path.stem.startswith(name))
    exact = [path for path in found if path.stem == name]
    if len(exact or found) != 1:
        which = f"{len(found)} jobs begin so: {', '.join(path.stem for path in found[:5])}" if found else "no such job"
        raise UserError(f"launch: {name!r}: {which}; `ctllm launch list` shows those in {jobs_folder()}")
    return _read((exact or found)[0])


def everything() -> list[Job]:
    """All recorded jobs, the oldest first."""
    return sorted((_read(path) for path in jobs_folder().glob("*.json")), key=lambda job: job.started)


def _read(path: pathlib.Path) -> Job:
    try:
        values = read_json(path)
        return Job(**{**values, "command": tuple(values["command"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: not the record of a job ({error})") from None


# ---- Jobs that a launcher holds


def launcher() -> dict[str, Any]:
    """This process as the handle of a job that it holds."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}


def held_state(job: Job) -> State:
    """How a job stands that a launcher on this machine holds, or held."""
    if job.status is not None:
        return State("done" if job.status == 0 else f"ended with status {job.status}", job.status)
    host, pid = job.handle["host"], job.handle["pid"]
    if host != socket.gethostname():
        return State(f"held by a launcher on {host}: ask there")
    if _born(pid) == job.handle["born"]:
        return State(f"running under launcher {pid}")
    return State("its launcher was killed, and the job with it", 128 + signal.SIGKILL)


def held_cancel(job: Job, now: bool) -> None:
    """Asks the launcher to stop the job, as Ctrl-C does; `now` does not wait for a save.

    Raises:
      UserError: the launcher is on another machine.
    """
    if job.handle["host"] != socket.gethostname():
        raise UserError(f"launch: {job.id} is held by a launcher on {job.handle['host']}: cancel it there")
    for _ in range(2 if now else 1):
        with contextlib.suppress(ProcessLookupError):
            if _born(job.handle["pid"]) == job.handle["born"]:
                os.kill(job.handle["pid"], signal.SIGTERM)
        time.sleep(0.1)  # two signals at once may arrive as one


def held_profile(job: Job) -> None:
    """Asks the launcher to have every process take a profile.

    Raises:
      UserError: the launcher is on another machine, or not at the point where it would pass that on.
    """
    if job.handle["host"] != socket.gethostname():
        raise UserError(f"launch: {job.id} is held by a launcher on {job.handle['host']}: ask for profiles there")
    if _born(job.handle["pid"]) != job.handle["born"] or not catches(job.handle["pid"], signal.SIGUSR1):
        raise UserError(f"launch: the launcher of {job.id} runs no processes now; try again when it does")
    os.kill(job.handle["pid"], signal.SIGUSR1)


def _born(pid: int) -> str | None:
    """When a process of this machine started, in its own ticks: a number that is given again has another one."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None
