"""One attempt after another: who ended and how, what is started again, what is asked of all, output line by line."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from waiting import ROOT, WAIT, ended, once_there

from launch import resumes
from launch.lines import Lines
from launch.process import Output, Process
from launch.supervise import supervise


def fake(*programs: str, name: str = "") -> list[Process]:
    """Processes that run Python programs."""
    return [
        Process(f"{name}{index}", (sys.executable, "-S", "-c", textwrap.dedent(program)), {"INDEX": str(index)})
        for index, program in enumerate(programs)
    ]


# ---- Lines


def test_lines_are_cut_wherever_the_bytes_are():
    data = b"one\ntwo\xff\xfe\r\n\nthree"
    for size in (1, 2, 5, 100):
        lines, found = Lines(), []
        for start in range(0, len(data), size):
            found += lines.feed(data[start : start + size], 0.0)
        assert found + lines.end() == [b"one", b"two\xff\xfe", b"", b"three"]
        assert lines.last == b"three"


def test_a_redrawn_line_is_shown_now_and_then_and_as_it_ends():
    lines, shown = Lines(), []
    for percent in range(101):
        shown += lines.feed(b"\r%d%%" % percent, now=percent / 4)
    assert shown == [b"0%", b"40%", b"80%"]  # what it was before the redrawing at 0.25, 10.25 and 20.25 s
    assert lines.feed(b"\n", 26.0) == [b"100%"] and lines.end() == []


def test_a_line_without_end_does_not_fill_the_memory():
    lines = Lines()
    assert lines.feed(b"x" * 1_500_000, 0.0) == [b"x" * 1_500_000]
    assert lines.end() == []


# ---- Supervision


def test_output_keeps_its_stream_its_bytes_and_the_name_of_its_process(capsysbinary):
    program = r"""
        import os, sys
        me = os.environ["INDEX"].encode()
        os.write(1, b"out " + me + b" \xff\xfe\n" + "中\n".encode())
        os.write(2, b"err " + me)
    """
    assert supervise(lambda: fake(program, program), restarts=0) == 0
    out, err = capsysbinary.readouterr()
    for index in (b"0", b"1"):
        mine = [line for line in out.splitlines() if line.startswith(b"[" + index + b"]")]
        assert mine == [b"[%s] out %s \xff\xfe" % (index, index), b"[%s] " % index + "中".encode()]
        assert b"[%s] err %s\n" % (index, index) in err
    assert out.count(b"\n") == 4 and err.count(b"\n") == 2


def test_a_process_that_writes_without_end_is_not_waited_for(capsysbinary):
    chatter = "import os\nfor _ in range(400): os.write(1, b'x' * 9999 + b'\\n')"
    assert supervise(lambda: fake(chatter, "import sys; sys.exit(3)"), restarts=0, patience=WAIT) == 3


def counted(folder: pathlib.Path, *programs: str):
    """`start` for `supervise`; notes each attempt, whose number the programs find as ATTEMPT."""
    attempts = []

    def start() -> list[Process]:
        attempts.append(None)
        return fake(*(f"ATTEMPT = {len(attempts)}\n{textwrap.dedent(program)}" for program in programs))

    return start, attempts


def test_the_resume_status_starts_all_again_and_counts_as_no_failure(tmp_path, capfd):
    start, attempts = counted(tmp_path, "import sys; sys.exit(75 if ATTEMPT < 4 else 0)", "import sys")
    assert supervise(start, restarts=0, pause=0) == 0
    assert len(attempts) == 4
    assert capfd.readouterr().err.count("starting all processes again") == 3


def test_who_always_asks_at_once_to_be_started_again_is_given_up_and_who_is_preempted_for_a_month_is_not(
    tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(resumes, "MOST", 3)
    start, attempts = counted(tmp_path, "import sys; sys.exit(75)")
    assert supervise(start, restarts=0, pause=0.2) == 1 and len(attempts) == 3
    err = capfd.readouterr().err
    assert (
        "again in 0.2 s" in err and "again in 0.4 s" in err and "given up: 3 times in a row the processes asked" in err
    )
    often = resumes.Resumes()
    for _ in range(30 * 24 * 20):  # every three minutes
        often.count(180)
        often.count(5)  # and again while it starts
        often.count(30)
        assert not often.why
    often.count(5)
    assert often.why


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("os._exit(7)", 7, "process 1 ended with status 7; its last line: no luck"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 was killed by SIGKILL; its last line: no luck"),
    ],
)
def test_a_failure_ends_the_others_and_is_named_and_the_budget_is_kept(tmp_path, capfd, ending, status, said):
    waits = "import time; time.sleep(1000)"
    start, attempts = counted(
        tmp_path, waits, f"import os, signal, sys; print('no luck', file=sys.stderr, flush=True); {ending}"
    )
    assert supervise(start, restarts=2, pause=0) == status
    assert len(attempts) == 3
    err = capfd.readouterr().err
    assert err.count(f"launch: {said}\n") == 3
    assert "(restart 1 of 2)" in err and "(restart 2 of 2)" in err and "2 restarts are used up" in err


def test_a_failure_that_does_not_come_again_is_got_over(tmp_path):
    start, attempts = counted(tmp_path, "import sys; sys.exit(ATTEMPT == 1)", "")
    assert supervise(start, restarts=1, pause=0) == 0 and len(attempts) == 2


def test_a_mistake_of_the_user_is_not_started_again(tmp_path, capfd):
    start, attempts = counted(tmp_path, "import time; time.sleep(1000)", "import sys; sys.exit(2)")
    assert supervise(start, restarts=5, pause=0) == 2
    assert len(attempts) == 1 and "process 1 ended with status 2" in capfd.readouterr().err


@pytest.mark.parametrize("echo", ["sys.exit(69)", "os.abort()"])
def test_who_only_lost_another_process_is_not_blamed(tmp_path, capfd, echo):
    noted = f"import os, sys; open(f'{tmp_path}/pid{{os.environ[\"INDEX\"]}}', 'w').write(str(os.getpid())); "

    # Both have ended when they are looked at: the launcher is held up by its own start.
    def start():
        yield from fake(noted + echo, noted + "sys.exit(5)", name="p")
        assert all(ended(int(once_there(tmp_path / f"pid{index}"))) for index in range(2))

    assert supervise(start, restarts=0) == 5
    assert "process p1 ended with status 5" in capfd.readouterr().err


def test_who_does_not_listen_is_killed_with_all_that_it_started(tmp_path):
    deaf = f"""
        import os, signal, subprocess, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "1000"])
        with open({str(tmp_path / "pids.new")!r}, "w") as file:
            file.write(f"{{os.getpid()}} {{child.pid}}")
        os.rename({str(tmp_path / "pids.new")!r}, {str(tmp_path / "pids")!r})
        time.sleep(1000)
    """
    fails = f"""
        import os, sys, time
        while not os.path.exists({str(tmp_path / "pids")!r}):
            time.sleep(0.05)
        sys.exit(4)
    """
    assert supervise(lambda: fake(deaf, fails), restarts=0, patience=0.5) == 4
    assert all(ended(int(pid)) for pid in (tmp_path / "pids").read_text().split())


# ---- The launcher is stopped


SAVES = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.5)
    open(f"{folder}/saved{os.environ['INDEX']}", "w").close()
    sys.exit(75)
def show(*_):
    open(f"{folder}/shown{os.environ['INDEX']}", "w").write("here")
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGQUIT, show)
open(f"{folder}/ready{os.environ['INDEX']}", "w").write(str(os.getpid()))
while True:
    time.sleep(1)
"""
LOUD = SAVES.replace("time.sleep(1)", "print('a step', flush=True); time.sleep(0.1)")
DEAF = SAVES.replace(
    "time.sleep(0.5)", "open(f\"{folder}/ready{os.environ['INDEX']}\", 'a').write('saving'); time.sleep(1000)"
)


@contextlib.contextmanager
def launched(folder: pathlib.Path, program: str, first: str = "", **streams):
    """(the launcher of two such processes, their numbers) as soon as they are ready; it begins with `first`."""
    program = program.replace("{folder}", str(folder))
    # A shell has what it runs in the background ignore SIGINT and SIGQUIT, and a launcher leaves what is ignored so.
    heard = "for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP): signal.signal(number, signal.SIG_DFL)"
    run = f"sys.exit(supervise(lambda: fake({program!r}, {program!r}), 3))"
    driver = f"import sys; from test_supervise import *\n{heard}\n{first}\n{run}"
    command = [sys.executable, "-c", driver]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with subprocess.Popen(command, env=environment, text=True, **{"stderr": subprocess.PIPE, **streams}) as launcher:
        try:
            yield launcher, [int(once_there(folder / f"ready{index}")) for index in range(2)]
        finally:
            launcher.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_launcher_waits_until_all_have_saved(tmp_path, number):
    with launched(tmp_path, SAVES) as (launcher, pids):
        launcher.send_signal(number)
        _, err = launcher.communicate(timeout=WAIT)
        assert launcher.returncode == 75 and "launch: stopped; the same command goes on" in err
        assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
        assert all(ended(pid) for pid in pids)


@pytest.mark.parametrize("reader", ["terminal", "pipe under nohup"])
def test_a_launcher_whose_terminal_or_reader_is_gone_waits_until_all_have_saved(tmp_path, reader):
    ours, its = os.pipe() if "pipe" in reader else os.openpty()
    first = "signal.signal(signal.SIGHUP, signal.SIG_IGN)" if "nohup" in reader else ""
    # Its session's terminal sends SIGHUP as well; that is no second request, which would kill.
    session = None if "pipe" in reader else lambda: os.login_tty(1)
    with launched(tmp_path, LOUD, first, stdout=its, stderr=its, preexec_fn=session) as (launcher, pids):
        os.close(its)
        os.close(ours)
        assert launcher.wait(timeout=WAIT) == 75
        assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
        assert all(ended(pid) for pid in pids)


def test_a_full_disk_costs_lines_and_not_the_job(capfd, monkeypatch):
    output = Output(pathlib.Path("/dev/full"))
    assert supervise(lambda: fake("print('one', flush=True); print('two')"), restarts=0, output=output) == 0
    out, err = capfd.readouterr()
    assert "[0] one\n[0] two\n" in out
    assert err == "launch: lines are missing in /dev/full: No space left on device; the job goes on\n"
    full = open("/dev/full", "w")  # noqa: SIM115 (closing it fails)
    monkeypatch.setattr(sys, "stdout", full)
    assert supervise(lambda: fake("print('one')"), restarts=0) == 0
    with pytest.raises(OSError):
        full.close()


def test_all_show_what_they_do_when_the_launcher_is_asked_and_go_on(tmp_path):
    with launched(tmp_path, SAVES) as (launcher, _):
        for _ in range(2):
            launcher.send_signal(signal.SIGQUIT)
            for index in range(2):
                once_there(tmp_path / f"shown{index}", "here")
                (tmp_path / f"shown{index}").unlink()
        assert launcher.poll() is None and not any((tmp_path / f"saved{index}").exists() for index in range(2))


def test_a_profile_is_asked_of_those_that_know_how(tmp_path):
    listens = "if os.environ['INDEX'] == '1': signal.signal(signal.SIGUSR1, show)\nsignal.signal(signal.SIGQUIT"
    with launched(tmp_path, SAVES.replace("signal.signal(signal.SIGQUIT", listens)) as (launcher, pids):
        launcher.send_signal(signal.SIGUSR1)
        once_there(tmp_path / "shown1", "here")
        time.sleep(0.3)
        assert launcher.poll() is None and pathlib.Path(f"/proc/{pids[0]}").exists()
        assert not (tmp_path / "shown0").exists()


def test_a_second_signal_kills(tmp_path):
    with launched(tmp_path, DEAF) as (launcher, pids):
        launcher.send_signal(signal.SIGINT)
        for index in range(2):
            once_there(tmp_path / f"ready{index}", "saving")
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=WAIT)
        assert launcher.returncode == 130 and all(ended(pid) for pid in pids)


def test_nothing_outlives_a_killed_launcher(tmp_path):
    with launched(tmp_path, SAVES) as (launcher, pids):
        launcher.kill()
        launcher.wait(timeout=WAIT)
        assert all(ended(pid) for pid in pids)
        assert not (tmp_path / "saved0").exists()
