"""Target `tpu`: Cloud TPU VMs, one slice or several, as a queued resource that is made or used again.

Everything goes through `gcloud`, whose login and project are the user's. A host gets one process; JAX finds the others
in the TPU's own metadata. A queued resource that was made here is deleted when the job has ended, unless --keep; one
that stops being active (a spot slice that was taken away) is deleted and asked for again, which counts as a restart.
What Google refuses for good (quota, permission, an argument) ends the job with its words and the next step.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ctllm_jax.common.errors import UserError
from ctllm_jax.verbs import Option
from launch import hosts
from launch.held import DETACH, hold
from launch.hosts import Host
from launch.process import Process, say
from launch.target import Payload, Target

_ANSWER = 300  # seconds that a command of gcloud may take
_TICK = 10.0  # seconds between looks at a resource that is waited for
_LONGEST_TICK = 600.0  # seconds between two requests of which none was granted, at most
_OVER = ("FAILED", "SUSPENDED", "SUSPENDING", "DELETING")  # it never becomes active again
_FOR_GOOD = {3: "INVALID_ARGUMENT", 5: "NOT_FOUND", 7: "PERMISSION_DENIED", 16: "UNAUTHENTICATED"}  # google.rpc.Code
_NEXT = {  # what gcloud says: the next step
    "do not currently have an active account": "log in with `gcloud auth login`",
    "Reauthentication": "log in again with `gcloud auth login`",
    "attribute [project]": "name a project: `gcloud config set project PROJECT`, or --project",
    "PERMISSION_DENIED": "the account needs the role TPU Admin in this project",
    "SERVICE_DISABLED": "enable the API: `gcloud services enable tpu.googleapis.com`",
    "uota": "ask for more under IAM & Admin > Quotas, or take another --zone, a smaller --type, or --spot",
    "RESOURCE_EXHAUSTED": "there is no capacity: take another --zone, or wait longer with --queue_minutes",
    "ccelerator type": "`gcloud compute tpus accelerator-types list --zone=ZONE` has those of the zone",
    "untime version": "`gcloud compute tpus tpu-vm versions list --zone=ZONE` has those of the zone",
    "ocation": "`gcloud compute tpus locations list` has the zones",
}


def run(payload: Payload, options: Mapping[str, Any], dry_run: bool) -> int:
    """Runs the payload on the slices; see `Target`.

    Raises:
      UserError: a flag is missing or out of range, gcloud refuses, what `launch.hosts` raises.
    """
    for name in ("name", "zone", "type", "runtime"):
        if not options[name]:
            raise UserError(f"launch tpu: give --{name}={TARGET.options[name].form.partition('=')[2]}")
    for name in ("slices", "queue_minutes"):
        if options[name] < 1:
            raise UserError(f"launch tpu: --{name}={options[name]}: must be at least 1")
    if options["slices"] > 1 and not payload.distributed:
        raise UserError(f"launch tpu: {payload.verb} runs in one process: give --slices=1, and a --type of one host")
    plan, slices = hosts.plan(payload, options), Slices(options)
    if not options["keep"]:
        _check_disk(payload, options["folder"])
    if dry_run:
        listed = [host for node in slices.nodes for host in slices.hosts(node, 1)]
        print("# the slices", *map(_line, (slices.describe_request(), slices.create())), sep="\n")
        print(*(_line(slices.describe(node)) for node in slices.nodes), sep="\n")
        print("# on every host, here worker 0 of each slice", hosts.describe_set_up(plan, listed), sep="\n")
        print("# the processes", *hosts.processes(plan, listed, None), sep="\n")
        print(*([] if options["keep"] else ["# in the end, if it was made here", _line(slices.delete())]), sep="\n")
        return 0

    def start() -> Sequence[Process]:
        slices.ready(say)
        listed = slices.all_hosts()
        if len(listed) > 1 and not payload.distributed:
            raise UserError(
                f"launch tpu: {payload.verb} runs in one process, and {options['name']} has {len(listed)} hosts: "
                "take a --type of one host, such as v6e-8 or v5p-8"
            )
        hosts.set_up(plan, listed, say)
        return hosts.processes(plan, listed, None)

    def finish() -> None:
        if slices.made and not options["keep"]:
            say(f"deleting {options['name']}")
            gcloud(slices.delete(), allowed="NOT_FOUND")

    revision = plan.place.code.revision
    return hold("tpu", payload, revision, start, options["restarts"], options["detach"], finish)


def _check_disk(payload: Payload, folder: str) -> None:
    """Says where the result would go with the slices."""
    path = payload.disk_folder(folder)
    if path is None:
        return
    if not path.startswith("/"):
        raise UserError(
            f"launch tpu: --workdir={payload.writes_to} is on the disk of a machine that is deleted in the end, with "
            "what is in it: give --workdir=gs://BUCKET/FOLDER; or --keep, then fetch it and delete the slices yourself"
        )
    say(f"--workdir={payload.writes_to} is lost with the machines unless it is on a file system that they share")


class Slices:
    """A queued resource and its nodes, each a slice.

    Attributes:
      nodes: their names, as gcloud gives them.
      made: whether it was asked for here; an answer may not have come.
    """

    def __init__(self, options: Mapping[str, Any]):
        self._options, self.made, name = options, False, options["name"]
        project = [f"--project={options['project']}"] if options["project"] else []
        self._where = [f"--zone={options['zone']}", *project]
        count = options["slices"]
        self.nodes = [name] if count == 1 else [f"{name}-{index}" for index in range(count)]

    def describe_request(self) -> list[str]:
        return self._queued("describe", "--format=json")

    def create(self) -> list[str]:
        options = self._options
        several = [f"--node-count={options['slices']}", f"--node-prefix={options['name']}"]
        nodes = several if options["slices"] > 1 else [f"--node-id={options['name']}"]
        kind = [f"--accelerator-type={options['type']}", f"--runtime-version={options['runtime']}"]
        return self._queued("create", *nodes, *kind, *(["--spot"] if options["spot"] else []), "--quiet")

    def delete(self) -> list[str]:
        return self._queued("delete", "--force", "--quiet")

    def describe(self, node: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", "describe", node, *self._where, "--format=json"]

    def _queued(self, verb: str, *flags: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self._options["name"], *self._where, *flags]

    def hosts(self, node: str, count: int) -> list[Host]:
        """The first hosts of a slice."""
        inside = ("--internal-ip",) if self._options["internal_ip"] else ()

        def reach(worker: int) -> Callable[[str], tuple[str, ...]]:
            head = ("gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *self._where, f"--worker={worker}", *inside)
            return lambda script: (*head, "--quiet", f"--command={script}")

        return [Host(f"{node}/{worker}", reach(worker)) for worker in range(count)]

    def all_hosts(self) -> list[Host]:
        """The hosts of all slices, in the order of slices and workers."""
        described = [json.loads(gcloud(self.describe(node))) for node in self.nodes]
        counts = [len(node["networkEndpoints"]) for node in described]
        return [host for node, count in zip(self.nodes, counts, strict=True) for host in self.hosts(node, count)]

    def ready(self, tell: Callable[[str], None]) -> None:
        """Returns when the slices are there: used again, made, or made again.

        Raises:
          UserError: gcloud refuses, they failed for a reason that stays, or they are not there in time.
        """
        name, until = self._options["name"], time.monotonic() + 60 * self._options["queue_minutes"]
        asked, lost = False, 0  # here; what failed before may have been mended since
        told = last = ""  # the state; the last error
        while True:
            found, error = self._state()
            if found == "ACTIVE":
                return
            why = f": {' '.join(error.get('message', '').split())[:500]}" if error else ""
            last = why or last
            if found == "FAILED" and asked and (error.get("code") in _FOR_GOOD or "uota" in why):
                step = _step(f"{why} {_FOR_GOOD.get(error.get('code'), '')}")
                raise UserError(f"launch tpu: {name} has failed{why}" + (f"; {step}" if step else ""))
            if time.monotonic() > until:
                raise UserError(
                    f"launch tpu: {name} is still {found or 'not there'} after {self._options['queue_minutes']} "
                    f"minutes{last}; wait longer with --queue_minutes, or take another --zone or --spot"
                )
            if found in _OVER:
                tell(f"{name} is {found.lower()}{why}; deleting it")
                gcloud(self.delete())
                if asked:
                    pause = min(_TICK * 2**lost, _LONGEST_TICK, max(until - time.monotonic(), 0))
                    tell(f"asking again in {pause:.0f} s")
                    time.sleep(pause)
                    lost += 1
                found = told = ""
            if not found:
                tell(f"asking for {name}")
                self.made = asked = True  # whatever becomes of gcloud, Google may have heard it
                try:
                    gcloud(self.create())
                except UserError as error:
                    self.made = "ALREADY_EXISTS" not in str(error)  # somebody was quicker: it is theirs
                    raise
                continue
            if found != told:
                tell(f"{name} is {found.lower().replace('_', ' ')}")
                told = found
            time.sleep(_TICK)

    def _state(self) -> tuple[str, Mapping[str, Any]]:
        """(as Google has it, empty where there is no such resource; the error of one that failed: code, message)."""
        found = gcloud(self.describe_request(), allowed="NOT_FOUND")
        state = json.loads(found)["state"] if found.strip() else {"state": ""}
        return state["state"], state.get("failedData", {}).get("error", {})


def gcloud(command: list[str], allowed: str = "no such error") -> str:
    """What a command of gcloud prints; nothing where it fails with an error that is `allowed`.

    Raises:
      UserError: there is no gcloud, it fails, it does not answer; with the next step where we know it.
    """
    try:
        ended = _run(command)
    except FileNotFoundError:
        raise UserError(
            "launch tpu: no gcloud here; install the Google Cloud CLI and run `gcloud auth login`"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"launch tpu: {' '.join(command[:5])} did not answer within {_ANSWER} s; try again") from None
    if ended.returncode == 0:
        return ended.stdout
    if allowed in ended.stderr:
        return ""
    words = " ".join(ended.stderr.split()).removeprefix("ERROR: ")[:500] or f"status {ended.returncode}"
    step = _step(words)
    raise UserError(f"launch tpu: {' '.join(command[:5])}: {words}" + (f"; {step}" if step else ""))


def _run(command: list[str]) -> subprocess.CompletedProcess:
    """In a session of its own: Ctrl-C in the terminal is for us to act on, and must not end a deletion.

    Raises:
      subprocess.TimeoutExpired: it took longer than _ANSWER; nothing of it is left.
    """
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=_ANSWER)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # gcloud is a shell script, which has started Python
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _step(words: str) -> str:
    """The next step after what Google says; empty where we know none."""
    return next((step for sign, step in _NEXT.items() if sign in words), "")


def _line(command: Sequence[str]) -> str:
    return str(Process("", tuple(command), {}))


TARGET = Target(
    "Cloud TPU VMs by gcloud: queued resources, spot, several slices",
    {
        "name": Option("--name=NAME", "of the queued resource; used again if it is there", ""),
        "zone": Option("--zone=ZONE", "of Google Cloud", ""),
        "project": Option("--project=PROJECT", "else gcloud's own", ""),
        "type": Option("--type=TYPE", "of a slice, as gcloud names it: v5litepod-16, v6e-8, v5p-128, ...", ""),
        "runtime": Option("--runtime=VERSION", "of the TPU software, as gcloud names it", ""),
        "slices": Option("--slices=N", "how many", 1),
        "spot": Option("--spot", "cheaper, and may be taken away", False),
        "internal_ip": Option("--internal_ip", "reach the hosts by their internal addresses", False),
        "queue_minutes": Option("--queue_minutes=M", "how long to wait for the slices (1440)", 1440),
        "keep": Option("--keep", "do not delete what was made here", False),
        **{name: option for name, option in hosts.OPTIONS.items() if name != "port"},
        **DETACH,
    },
    run,
)
