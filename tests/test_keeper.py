"""The keeper: ends what it keeps when its launcher is gone, and waits for the one before it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from fake_hosts import ROOT, Hosts
from waiting import WAIT, ended, once_there


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    return Hosts(tmp_path / "hosts", monkeypatch)


KEEPER = "from launch import keeper; keeper.SILENCE, keeper.PATIENCE = {silence}, {patience}; keeper.main()"


def kept(hosts: Hosts, silence: float = 40.0, patience: float = 1.0, lock: str = "lock") -> subprocess.Popen:
    """A keeper to which nobody speaks after the first line."""
    order = {"verb": "train", "config": None, "arguments": [], "folder": "", "environment": {}}
    order |= {"lock": str(hosts.folder / lock), "python": str(hosts.environment / "bin" / "python")}
    program = KEEPER.format(silence=silence, patience=patience)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, bufsize=0)
    process.stdin.write(f"{json.dumps(order)}\n".encode())
    return process


def test_a_keeper_ends_what_it_keeps_when_the_launcher_falls_silent_even_what_does_not_listen(hosts):
    hosts.program(
        """
        signal.signal(signal.SIGTERM, lambda *_: (FOLDER / "asked").write_text("asked"))
        (FOLDER / "ready0").write_text(str(os.getpid()))
        while True:
            time.sleep(0.1)
        """
    )
    keeper = kept(hosts, silence=1)
    pid = int(once_there(hosts.folder / "ready0"))
    assert keeper.wait(timeout=WAIT) == 137 and ended(pid) and (hosts.folder / "asked").exists()


def test_a_keeper_waits_for_the_process_before_it(hosts):
    hosts.program(
        """
        signal.signal(signal.SIGTERM, lambda *_: None)
        with (FOLDER / "log").open("a") as log:
            log.write(f"{time.monotonic()} ")
        while not (FOLDER / "go").exists():
            time.sleep(0.05)
        """
    )
    first = kept(hosts, patience=WAIT)
    once_there(hosts.folder / "log")
    second = kept(hosts)
    first.stdin.close()
    time.sleep(0.5)
    assert len((hosts.folder / "log").read_text().split()) == 1
    (hosts.folder / "go").touch()
    assert (first.wait(timeout=WAIT), second.wait(timeout=WAIT)) == (0, 0)
    assert len((hosts.folder / "log").read_text().split()) == 2


def test_the_status_of_a_process_that_ends_as_it_is_asked_to_is_not_lost(hosts):
    hosts.program(
        """
        (FOLDER / "ready0").write_text(str(os.getpid()))
        while not (FOLDER / "go").exists():
            time.sleep(0.05)
        sys.exit(69)
        """
    )
    keeper = kept(hosts)
    pid = int(once_there(hosts.folder / "ready0"))
    os.kill(keeper.pid, signal.SIGSTOP)  # as it waits for a word: it has looked whether the process runs
    (hosts.folder / "go").touch()
    assert ended(pid)
    keeper.stdin.write(b"t")
    os.kill(keeper.pid, signal.SIGCONT)
    assert keeper.wait(timeout=WAIT) == 69


def test_a_keeper_to_whom_nothing_was_said_starts_nothing(hosts):
    ended_at_once = subprocess.run(
        [sys.executable, "-m", "launch.keeper"], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert ended_at_once.returncode == 1 and b"the launcher went before" in ended_at_once.stderr
