"""A real sshd on the loopback interface, for two hosts that are folders of this machine.

`python tests/clusters/sshd.py COMMAND ...` runs a command while it is there; CLUSTER names the folder of `ssh_config`,
in which the hosts `one` and `two` stand. Needs root and Debian's openssh-server.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

SERVER = "/usr/sbin/sshd"  # it starts itself anew by this path
HOSTS = ("one", "two")


def missing() -> str:
    """Why there can be no such server here; empty where there can."""
    if os.geteuid() != 0:
        return "sshd for several hosts needs root"
    absent = [name for name in (SERVER, "ssh", "ssh-keygen") if shutil.which(name) is None]
    return f"{absent[0]} is not installed (Debian: openssh-server)" if absent else ""


@contextlib.contextmanager
def sshd(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The ssh_config for two hosts, each with a home below `folder`; the servers are gone when the block ends."""
    pathlib.Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    config = folder / "ssh_config"
    with contextlib.ExitStack() as stack:
        for host in HOSTS:
            (folder / host).mkdir()
            port = free_port()
            settings = {
                "Port": port,
                "ListenAddress": "127.0.0.1",
                "HostKey": folder / "host_key",
                "AuthorizedKeysFile": folder / "key.pub",
                "PidFile": "none",
                "StrictModes": "no",
                "UsePAM": "no",
                "PasswordAuthentication": "no",
                "PermitRootLogin": "prohibit-password",
                "SetEnv": f"HOME={folder / host}",
            }
            server_config = folder / f"sshd_{host}"
            server_config.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
            with (folder / f"sshd_{host}.log").open("w") as log:
                server = subprocess.Popen([SERVER, "-D", "-e", "-f", server_config], stderr=log)
            stack.callback(server.wait)
            stack.callback(server.terminate)
            with config.open("a") as file:
                file.write(
                    f"Host {host}\n HostName 127.0.0.1\n Port {port}\n User root\n IdentityFile {folder / 'key'}\n"
                    f" IdentitiesOnly yes\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
                )
            wait_for_port(port)
        yield config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as place, sshd(pathlib.Path(place) / "hosts") as made:
        sys.exit(subprocess.run(sys.argv[1:], env={**os.environ, "CLUSTER": str(made.parent)}, check=False).returncode)
