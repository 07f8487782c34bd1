"""A real SLURM of one node on this machine, with munge for its passwords.

`python tests/clusters/slurm.py COMMAND ...` runs a command while it is there. Needs root and Debian's slurm-wlm, munge.
"""

import contextlib
import os
import pathlib
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from clusters.sshd import free_port

PROGRAMS = ("/usr/sbin/munged", "/usr/sbin/slurmctld", "/usr/sbin/slurmd", "sbatch", "srun")


def missing() -> str:
    """Why there can be no SLURM here; empty where there can."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{absent[0]} is not installed (Debian: slurm-wlm)" if absent else ""


@contextlib.contextmanager
def slurm(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """The variables with which commands find a SLURM; it is gone when the block ends."""
    folder.mkdir(parents=True, mode=0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(64))
    (folder / "munge.key").chmod(0o400)
    socket, config = folder / "munge.socket", folder / "slurm.conf"
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": "localhost(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "SlurmdPort": free_port(),
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={socket},cred_expire=5",  # a job waits as long in the queue when it comes again
        "CredType": "cred/munge",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "ReturnToService": 2,
        "MpiDefault": "none",
        "KillWait": 5,
        "SlurmdParameters": "config_overrides",  # more CPUs than there are
        "NodeName": "localhost NodeAddr=127.0.0.1 CPUs=8 Sockets=8 CoresPerSocket=1 ThreadsPerCore=1 RealMemory=1000",
        "PartitionName": "tiny Nodes=ALL Default=YES MaxTime=INFINITE OverTimeLimit=0 State=UP",
    }
    config.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    environment = {"SLURM_CONF": str(config)}
    daemons = [
        ["/usr/sbin/munged", "--foreground", f"--socket={socket}", f"--key-file={folder / 'munge.key'}", "--force"]
        + [f"--{name}={folder / f'munge.{end}'}" for name, end in (("pid-file", "pid"), ("seed-file", "seed"))],
        ["/usr/sbin/slurmctld", "-D", "-f", str(config)],
        ["/usr/sbin/slurmd", "-D", "-f", str(config), "-N", "localhost"],
    ]
    with contextlib.ExitStack() as stack:
        for command in daemons:
            log = stack.enter_context((folder / f"{pathlib.Path(command[0]).name}.log").open("w"))
            daemon = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            time.sleep(0.5)
        _wait_until_idle({**os.environ, **environment}, folder)
        yield environment


def _wait_until_idle(environment: dict[str, str], folder: pathlib.Path) -> None:
    for _ in range(60):
        found = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False
        )
        if found.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    raise AssertionError(f"SLURM did not come up: {found.stdout} {found.stderr}\n{logs}")


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as place, slurm(pathlib.Path(place) / "slurm") as found:
        sys.exit(subprocess.run(sys.argv[1:], env={**os.environ, **found}, check=False).returncode)
