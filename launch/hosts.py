"""Jobs on hosts that can be reached by a command (`ssh`, `gcloud ... ssh`): set up side by side, then held together.

A host has the code and the environment each once (`launch.ship`). On it `launch.keeper` stands before each process.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import random
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from ctllm_jax.common.children import die_with_parent
from ctllm_jax.common.errors import UserError
from ctllm_jax.verbs import Option
from launch import ship
from launch.process import Process
from launch.target import Payload

OPTIONS = {
    "devices": Option("--devices=M", "virtual CPU devices of each process; without it what JAX finds", 0),
    "port": Option("--port=N", "port of the coordinator in process 0; without it another one in each attempt", 0),
    "restarts": Option("--restarts=K", "how often to start again after a failure (3)", 3),
    "wait": Option("--wait=SECONDS", "how long a host has to answer (60)", 60),
    "install_minutes": Option("--install_minutes=M", "how long making the environment may take (30)", 30),
    **ship.OPTIONS,
}
_REACHING = {"gcs", "tpu", "dev"}  # extras that have what goes to gs://
_PORTS = range(20000, 32768)  # below those that Linux gives to outgoing connections


@dataclasses.dataclass(frozen=True)
class Host:
    """A host: its name, and the command that runs a line of shell there."""

    name: str
    reach: Callable[[str], tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to run, and where it finds its code."""

    payload: Payload
    place: ship.Place
    options: Mapping[str, Any]
    secrets: Mapping[str, str]
    variables: Mapping[str, str]
    config: str | None
    arguments: tuple[str, ...]


def plan(payload: Payload, options: Mapping[str, Any]) -> Plan:
    """Looks at all that can be wrong before a host is asked.

    Raises:
      UserError: uncommitted changes, a variable that is not set or is no assignment, a config file that is not shipped,
        a wrong number, gs:// without what goes there.
    """
    for name, least in (("devices", 0), ("restarts", 0), ("wait", 1), ("install_minutes", 1)):
        if options[name] < least:
            raise UserError(f"launch: --{name}={options[name]}: must be at least {least}")
    reaches = options["environment"] or _REACHING & {*options["extra"].split(",")}
    if not reaches and any("gs://" in argument for argument in payload.arguments):
        raise UserError(f"launch: --extra={options['extra']}: gs:// needs libraries there: add gcs to --extra")
    place = ship.place(options)
    config, arguments = ship.split_config(payload, place.code)
    secrets, variables = ship.forwarded(options["forward"]), ship.variables(options["variables"])
    return Plan(payload, place, options, secrets, variables, config, arguments)


def processes(plan: Plan, hosts: Sequence[Host], coordinator: str | None) -> list[Process]:
    """The processes of one attempt, one a host and in their order; a host that stands there twice gets two.

    Without a coordinator's address JAX looks for the job itself.
    """
    place, options = plan.place, plan.options
    several = len(hosts) > 1
    given = several and coordinator is not None
    shared = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options["devices"])} if options["devices"] else {}
    if given:
        port = options["port"] or random.choice(_PORTS)
        shared |= {"JAX_COORDINATOR_ADDRESS": f"{coordinator}:{port}", "JAX_NUM_PROCESSES": str(len(hosts))}
    # The same command on the same host waits for what is left of it from before, whoever had launched that.
    words = json.dumps([plan.payload.verb, *plan.payload.arguments, options["folder"]])
    lock = f"{place.home}/locks/{plan.payload.verb}-{hashlib.sha256(words.encode()).hexdigest()[:16]}"
    started = []
    for index, host in enumerate(hosts):
        order = {
            "lock": f"{lock}.{index}",
            "python": place.interpreter,
            "verb": plan.payload.verb,
            "config": plan.config,
            "arguments": [*plan.arguments, *(["--config.distributed=True"] if several else [])],
            "folder": options["folder"],
            "environment": {**plan.variables, **shared, **({"JAX_PROCESS_ID": str(index)} if given else {})},
        }
        command = host.reach(place.keep())
        started.append(Process(f"{index} {host.name}", command, {}, order, plan.secrets))
    return started


def set_up(plan: Plan, hosts: Sequence[Host], say: Callable[[str], None]) -> None:
    """Puts code and environment where they are missing, on all hosts at once.

    Raises:
      UserError: a host does not answer in time, or could not do it; names the first one and says how many.
    """
    place, wait = plan.place, plan.options["wait"]
    hosts = list({host.name: host for host in hosts}.values())
    there = dict(zip(hosts, everywhere(hosts, place.probe(), wait, "does not answer"), strict=True))
    without_code = [host for host, reply in there.items() if "code" not in reply.split()]
    if without_code:
        say(f"shipping {place.code.revision} to {_names(without_code)}")
        with tempfile.TemporaryDirectory() as folder:
            archive = pathlib.Path(folder) / "code.tar.gz"
            archive.write_bytes(place.code.archive())
            everywhere(without_code, place.unpack(), 5 * wait, "could not take the code", archive)
    bare = [host for host, reply in there.items() if "environment" not in reply.split()]
    if bare and place.environment:
        raise UserError(f"launch: {_names(bare)}: no {place.interpreter}; leave --environment out, and one is made")
    if bare:
        say(f"making the environment {place.venv} on {_names(bare)}; this takes minutes")
        everywhere(bare, place.install(), 60 * plan.options["install_minutes"], "could not make the environment")


def describe_set_up(plan: Plan, hosts: Sequence[Host]) -> str:
    """Every command of `set_up`, and when it is used."""
    place = plan.place
    lines = [
        f"# code: {place.code.revision}, tree {place.code.tree}",
        f"git -C {place.code.root} archive --format=tar.gz {place.code.tree}  # the archive",
    ]
    steps = [("what is there", place.probe()), ("unless the code is there; reads the archive", place.unpack())]
    if not place.environment:
        steps.append(("unless the environment is there", place.install()))
    for title, script in steps:
        lines.append(f"# {title}")
        lines += [shlex.join(host.reach(script)) for host in {host.name: host for host in hosts}.values()]
    return "\n".join(lines)


def everywhere(
    hosts: Sequence[Host], script: str, seconds: float, problem: str, stdin: pathlib.Path | None = None
) -> list[str]:
    """Runs a line of shell on all hosts at once and returns what each wrote to its standard output.

    Raises:
      UserError: it failed somewhere, or did not end in time: `problem`, the first host, its last words, how many; or
        the command that reaches a host is not there.
    """
    until, failures, replies = time.monotonic() + seconds, [], []
    with _started(hosts, script, stdin) as running:
        for host, (process, out, err) in zip(hosts, running, strict=True):
            try:
                status, words = process.wait(max(until - time.monotonic(), 0.1)), _words(err)
            except subprocess.TimeoutExpired:
                status, words = None, f"nothing came for {seconds:g} s"
            replies.append(_words(out))
            if status != 0:
                last = words.splitlines()[-1].strip() if words.strip() else f"status {status}"
                failures.append((f"{host.name} {problem} ({last})", shlex.join(host.reach("true"))))
    if failures:
        count = f" ({len(failures)} of {len(hosts)} hosts)" if len(hosts) > 1 else ""
        trouble, by_hand = failures[0]
        raise UserError(f"launch: {trouble}{count}; nothing was started; to try it by hand: {by_hand}")
    return replies


@contextlib.contextmanager
def _started(
    hosts: Sequence[Host], script: str, stdin: pathlib.Path | None
) -> Iterator[list[tuple[subprocess.Popen, IO[bytes], IO[bytes]]]]:
    """The processes with files of their output; none is left when the block ends."""
    with contextlib.ExitStack() as stack:
        running = []
        for host in hosts:
            out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            source = stack.enter_context(open(stdin or "/dev/null", "rb"))
            command = host.reach(script)
            try:
                process = subprocess.Popen(command, stdin=source, stdout=out, stderr=err, preexec_fn=die_with_parent())
            except FileNotFoundError:
                raise UserError(f"launch: no {command[0]} here, by which {host.name} is reached") from None
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append((process, out, err))
        yield running


def _words(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _names(hosts: Sequence[Host]) -> str:
    return ", ".join(host.name for host in hosts[:5]) + (f" and {len(hosts) - 5} more" if len(hosts) > 5 else "")
