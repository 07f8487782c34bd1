"""What stands before a process under SLURM and in a pod: it hides secrets, passes signals on, keeps the status."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from waiting import ROOT, WAIT, ended

from ctllm_jax.common.errors import UserError
from launch import ship
from launch.hide import Hider, pieces
from launch.process import Process

KEY = '{\n  "type": "account",\n  "private_key": "-----BEGIN KEY-----\\nMIIEvQIBADANBg\\n-----END KEY-----"\n}'


def task(program: str, statuses: str = "", names: str = "", **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.task", statuses, names, sys.executable, "-S", "-c"]
    return subprocess.Popen(
        [*command, textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ---- What is hidden


def test_of_a_secret_of_several_lines_each_is_hidden_however_it_is_printed():
    hide = Hider({"KEY": KEY})
    for line in (b'  "type": "account",', b"MIIEvQIBADANBg", b"'-----BEGIN KEY-----\\nMIIEvQIBADANBg\\n'"):
        assert b"<KEY>" in hide(line)
        assert not any(word in hide(line) for word in (b"account", b"MIIE"))
    assert hide(repr(KEY).encode()).count(b"MIIE") == 0
    assert hide(b"}") == b"}" and hide(b"an innocent line") == b"an innocent line"
    assert Process("0", (), {}, secrets={"TOKEN": "tremendous"}).hide(b"my tremendous one") == b"my <TOKEN> one"


def test_a_secret_that_is_a_part_of_another_one_leaves_nothing_of_it():
    assert Hider({"A": "tremendous", "B": "tremendous-secret"})(b"tremendous-secret") == b"<B>"


@pytest.mark.parametrize("value", ["", "short", "four\nfive\nsix"])
def test_what_could_not_be_hidden_is_not_forwarded(monkeypatch, value):
    monkeypatch.setenv("TOKEN", value)
    assert not pieces(value)
    with pytest.raises(UserError, match="--forward=TOKEN: its value is too short to be hidden.*--variables"):
        ship.forwarded("TOKEN")


def test_a_task_prints_no_secret_on_either_stream_and_keeps_the_status():
    program = r"""
        import os, sys
        print("my", os.environ["KEY"])
        os.write(2, b"\xff no end ")
        sys.exit(os.environ["TOKEN"])
    """
    with task(program, names="KEY,TOKEN", KEY=KEY, TOKEN="tremendous-secret") as process:
        out, err = (pipe.buffer.read() for pipe in (process.stdout, process.stderr))
    assert process.wait() == 1
    assert out == b"my {\n  <KEY>\n  <KEY>\n}\n" and err == b"\xff no end <TOKEN>\n"


# ---- Signals and ends


@pytest.mark.parametrize(
    ("ending", "status"), [("sys.exit(7)", 7), ("os.abort()", 134), ("os.kill(os.getpid(), 9)", 137)]
)
def test_a_task_ends_as_its_command_does(ending, status):
    with task(f"import os, sys; {ending}") as process:
        assert process.wait(WAIT) == status
    missing = [sys.executable, "-m", "launch.task", "", "", "/no/such/command"]
    found = subprocess.run(missing, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (127, "launch: /no/such/command: No such file or directory\n")


LISTENS = """
import os, signal, sys, time
def hear(number, _):
    print("heard", signal.Signals(number).name)
    if number == signal.SIGTERM:
        sys.exit(75)
for number in {numbers}:
    signal.signal(number, hear)
print("ready", os.getpid())
while True:
    time.sleep(0.05)
"""


def test_signals_are_passed_on_and_a_profile_is_asked_of_those_alone_that_listen(tmp_path):
    program = LISTENS.format(numbers="(signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1)")
    with task(program, str(tmp_path / "statuses"), SLURM_PROCID="3") as process:
        assert process.stdout.readline().startswith("ready")
        for number, name in ((signal.SIGURG, "SIGUSR1"), (signal.SIGQUIT, "SIGQUIT"), (signal.SIGTERM, "SIGTERM")):
            process.send_signal(number)
            assert process.stdout.readline() == f"heard {name}\n"
        assert process.wait(WAIT) == 0  # or SLURM would ask those again that are still saving
    assert (tmp_path / "statuses").read_text() == "75\n"
    with task(LISTENS.format(numbers="(signal.SIGTERM,)")) as process:
        assert process.stdout.readline().startswith("ready")
        process.send_signal(signal.SIGURG)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "heard SIGTERM\n" and process.wait(WAIT) == 75


def test_what_a_task_stands_before_does_not_outlive_it():
    with task(LISTENS.format(numbers="()")) as process:
        pid = int(process.stdout.readline().split()[1])
        process.kill()
        process.wait(WAIT)
    assert ended(pid)


def test_output_that_somebody_else_holds_open_is_not_waited_for_long():
    program = "import subprocess; print('mine'); subprocess.Popen(['sleep', '60'])"
    with task(program) as process:
        assert process.wait(30) == 0 and process.stdout.readline() == "mine\n"
        process.stdout.close()
