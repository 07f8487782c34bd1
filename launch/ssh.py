"""Target `ssh`: processes on a list of hosts, one each, as OpenSSH's client reaches them.

Keys, users, ports and jump hosts belong to ~/.ssh/config; nothing is asked for, so a key must open the hosts without a
passphrase that nobody has entered (ssh-agent). The hosts need Python, git is not needed there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ctllm_jax.common.errors import UserError
from ctllm_jax.verbs import Option
from launch import hosts
from launch.held import DETACH, hold
from launch.hosts import Host
from launch.process import Process, say
from launch.target import Payload, Target

_ALIVE = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3")  # a dead connection is noticed in 45 s


def run(payload: Payload, options: Mapping[str, Any], dry_run: bool) -> int:
    """Runs the payload on the hosts; see `Target`.

    Raises:
      UserError: no hosts, a verb that cannot have several processes, what `launch.hosts` raises.
    """
    names = [name.strip() for name in options["hosts"].split(",") if name.strip()]
    if not names:
        raise UserError("launch ssh: give --hosts=NAME[,NAME], as ssh knows them")
    if dashed := [name for name in names if name.startswith("-")]:
        raise UserError(f"launch ssh: --hosts: {dashed[0]!r} is not a host")
    if len(names) > 1 and not payload.distributed:
        raise UserError(f"launch ssh: {payload.verb} runs in one process: give one host, not {len(names)}")
    plan = hosts.plan(payload, options)
    listed = [Host(name, _reach(name, options)) for name in names]
    coordinator = options["coordinator"] or names[0].rpartition("@")[2]
    if dry_run:
        print(hosts.describe_set_up(plan, listed), "# the processes", sep="\n")
        print(*hosts.processes(plan, listed, coordinator), sep="\n")
        return 0

    def start() -> Sequence[Process]:
        hosts.set_up(plan, listed, say)
        return hosts.processes(plan, listed, coordinator)

    return hold("ssh", payload, plan.place.code.revision, start, options["restarts"], options["detach"])


def _reach(name: str, options: Mapping[str, Any]):
    config = ("-F", options["ssh_config"]) if options["ssh_config"] else ()
    timeout = ("-o", f"ConnectTimeout={options['wait']}")
    return lambda script: ("ssh", *config, "-T", "-o", "BatchMode=yes", *timeout, *_ALIVE, name, script)


TARGET = Target(
    "processes on hosts that ssh reaches",
    {
        "hosts": Option("--hosts=NAME[,NAME]", "one process each; a name that stands twice gets two", ""),
        "coordinator": Option("--coordinator=ADDRESS", "of the first host, as the others know it; else its name", ""),
        "ssh_config": Option("--ssh_config=FILE", "instead of ~/.ssh/config", ""),
        **hosts.OPTIONS,
        **DETACH,
    },
    run,
)
