"""`ctllm launch`: processes run together, say who they are, end together, and are started again when that can help."""

import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from command import ctllm
from test_processes import OPTIONS
from test_train import assert_same_run
from tiny_stores import tiny_store

from ctllm_jax.common.errors import UserError
from ctllm_jax.verbs import Option
from launch import resumes, view
from launch import run as launch_run
from launch.jobs import Job, State
from launch.lines import Lines
from launch.local import processes
from launch.process import Output, Process
from launch.supervise import supervise
from launch.target import Payload, Target

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = ("train", "--config=configs/pretrain.py:tiny", "--config.data.store=a b", "--workdir=RUN")
WAIT = 120  # seconds that something is waited for, on a busy machine


def fake(*programs: str, name: str = "") -> list[Process]:
    """Processes that run Python programs."""
    return [
        Process(f"{name}{index}", (sys.executable, "-S", "-c", textwrap.dedent(program)), {"INDEX": str(index)})
        for index, program in enumerate(programs)
    ]


def ended(pid: int) -> bool:
    """Whether no such process runs, within the time that a busy machine needs to end it."""
    for _ in range(WAIT * 10):
        stat = pathlib.Path(f"/proc/{pid}/stat")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False


def once_there(path: pathlib.Path, text: str = "", seconds: int = WAIT) -> str:
    """A file's content, as soon as it contains the text."""
    for _ in range(seconds * 20):
        with contextlib.suppress(FileNotFoundError):
            if text in (content := path.read_text()) and content:
                return content
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {text!r}")


def once_saved(workdir: pathlib.Path, step: int, seconds: int = WAIT) -> None:
    """Returns as soon as a run can be resumed at that step."""
    once_there(workdir / "checkpoints" / str(step) / "commit_success.txt", seconds=seconds)


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
    driver = f"import sys; from test_launch import *\n{heard}\n{first}\n{run}"
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


# ---- The command line


@pytest.fixture(autouse=True)
def own_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ctllm"])


def test_help_names_targets_and_flags(capsys):
    assert "\n  launch      " in ctllm(capsys, "--help")[1]
    for asked in (["launch"], ["launch", "--help"]):
        status, out, _ = ctllm(capsys, *asked)
        assert status == 0 and "\n  local       processes on this machine" in out
    status, out, _ = ctllm(capsys, "launch", "local", "--help")
    assert status == 0
    assert all(f"\n  {flag}" in out for flag in ("--processes=N", "--devices=M", "--restarts=K", "--dry_run"))
    assert "token store -> checkpoints" in ctllm(capsys, "launch", "local", "--", "train", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moon", "--", *TRAIN], "unknown target 'moon'; there are: local"),
        (["local", "--process=2", "--", *TRAIN], "launch local: Unknown command line flag 'process'"),
        (["local", "--processes=two", "--", *TRAIN], "launch local: flag --processes=two"),
        (["local", "--processes=0", "--", *TRAIN], "--processes=0: must be at least 1"),
        (["local", "--restarts=-1", "--", *TRAIN], "--restarts=-1: must be at least 0"),
        (["local", "train"], "unexpected argument 'train' (the verb comes after `--`)"),
        (["local", "--processes=2"], "give the verb to run after `--`"),
        (["local", "--"], "give the verb to run after `--`"),
        (["local", "--", "training"], "unknown verb 'training'; there are: corpus, "),
        (["local", "--", "launch", "local"], "unknown verb 'launch'"),
        (["local", "--", *TRAIN, "--config.stepz=1"], "train: "),
        (["local", "--processes=2", "--", "eval"], "eval runs in one process, not in 2: give --processes=1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_starts_nothing(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("launch.local.hold", lambda *_: pytest.fail("started"))
    status, out, err = ctllm(capsys, "launch", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("ctllm: error: ") and message in err and err.count("\n") == 1


def test_a_dry_run_prints_what_would_be_started(capsys, monkeypatch):
    monkeypatch.setattr("launch.local.hold", lambda *_: pytest.fail("started"))
    status, out, err = ctllm(capsys, "launch", "local", "--processes=2", "--devices=3", "--dry_run", "--", *TRAIN)
    assert (status, err) == (0, "")
    first, second = (shlex.split(line) for line in out.splitlines())
    address = first[1].removeprefix("JAX_COORDINATOR_ADDRESS=")
    assert address.startswith("127.0.0.1:")
    for index, words in enumerate((first, second)):
        assert words == [
            "env",
            f"JAX_COORDINATOR_ADDRESS={address}",
            f"JAX_COORDINATOR_BIND_ADDRESS={address}",
            "JAX_NUM_PROCESSES=2",
            "PYTHONUNBUFFERED=1",
            "JAX_PLATFORMS=cpu",
            "JAX_NUM_CPU_DEVICES=3",
            f"JAX_PROCESS_ID={index}",
            *(sys.executable, "-m", "ctllm_jax.cli", *TRAIN, "--config.distributed=True"),
        ]
    assert "'--config.data.store=a b'" in out


def test_one_process_is_the_plain_command_and_each_attempt_has_a_port_of_its_own():
    payload = Payload("eval", ("--workdir=x",), distributed=False)
    attempts = [processes(payload, 1, 0) for _ in range(2)]
    assert attempts[0][0].command == (sys.executable, "-m", "ctllm_jax.cli", "eval", "--workdir=x")
    assert "JAX_PLATFORMS" not in attempts[0][0].environment
    ports = [attempt[0].environment["JAX_COORDINATOR_ADDRESS"] for attempt in attempts]
    assert ports[0] != ports[1]


def test_a_target_is_a_table_entry(capsys, monkeypatch):
    calls = []
    target = Target("the moon", {"craters": Option("--craters=N", "how many", 1)}, lambda *call: calls.append(call))
    monkeypatch.setitem(launch_run.TARGETS, "moon", "moon")
    monkeypatch.setitem(sys.modules, "moon", type(sys)("moon"))
    sys.modules["moon"].TARGET = target
    assert ctllm(capsys, "launch", "moon", "--craters=4", "--dry_run", "--", *TRAIN)[0] is None
    assert calls == [(Payload("train", TRAIN[1:], True, "RUN"), {"craters": 4}, True)]


def test_the_launcher_needs_no_jax():
    program = "import sys, launch.local, launch.run; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


# ---- Real training


def launch(store: pathlib.Path, workdir: pathlib.Path, *options: str, log: pathlib.Path) -> subprocess.Popen:
    """`ctllm launch local` with a small training run of two processes; standard error goes to `log`."""
    command = [sys.executable, "-m", "ctllm_jax.cli", "launch", "local", "--processes=2", "--devices=2"]
    command += ["--", "train", *OPTIONS, f"--config.data.store={store}", f"--workdir={workdir}", *options]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, stderr=file)


def pids_of(workdir: pathlib.Path) -> dict[int, int]:
    """{JAX_PROCESS_ID: number} of the processes that train there."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            names = dict(entry.partition(b"=")[::2] for entry in (folder / "environ").read_bytes().split(b"\0"))
            if f"--workdir={workdir}".encode() in command and b"JAX_PROCESS_ID" in names:
                found[int(names[b"JAX_PROCESS_ID"])] = int(folder.name)
    return found


@pytest.mark.slow
def test_a_job_that_lost_a_process_and_one_that_was_stopped_end_in_the_undisturbed_bits(tmp_path):
    store = tiny_store(tmp_path / "store").folder
    long = ("--config.duration=32 steps", "--config.checkpoints.every=8", "--config.eval.every=16")
    log = tmp_path / "log"

    whole = launch(store, tmp_path / "whole", *long, log=log)
    assert whole.wait(timeout=5 * WAIT) == 0, log.read_text()
    assert "[0] train lm: 32/32 steps" in log.read_text()

    # Process 1, then, of what was started again, the coordinator.
    killed = launch(store, tmp_path / "killed", *long, log=log)
    for victim, step in ((1, 8), (0, 16)):
        once_saved(tmp_path / "killed", step)
        os.kill(pids_of(tmp_path / "killed")[victim], signal.SIGKILL)
        once_there(log, f"launch: process {victim} was killed by SIGKILL")
    assert killed.wait(timeout=5 * WAIT) == 0, log.read_text()
    assert "[0] train: resumed at step" in log.read_text() and "(restart 2 of 3)" in log.read_text()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")

    stopped = launch(store, tmp_path / "stopped", *long, log=log)
    once_there(tmp_path / "stopped" / "metrics.jsonl", '"step": 7,')
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(timeout=WAIT) == 75, log.read_text()
    assert "is saved; the same command goes on" in log.read_text() and not pids_of(tmp_path / "stopped")
    assert launch(store, tmp_path / "stopped", *long, log=log).wait(timeout=5 * WAIT) == 0, log.read_text()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_a_mistake_that_only_the_processes_see_ends_the_job_at_once(tmp_path):
    store = tiny_store(tmp_path / "store").folder
    log = tmp_path / "log"
    job = launch(store, tmp_path / "run", "--config.model.vocab_size=100", log=log)
    assert job.wait(timeout=2 * WAIT) == 2
    assert "the model only 100" in log.read_text() and "starting all processes again" not in log.read_text()


def test_a_scheduler_that_does_not_answer_for_a_moment_ends_no_following(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CTLLM_JOBS", str(tmp_path))
    monkeypatch.setattr(view, "_ASK", 0.0)
    monkeypatch.setattr(view, "_TICK", 0.01)
    job = Job("train-1", "slurm", ("train",), "", 0.0, {})
    job.save()
    answers = [
        State("running"),
        UserError("squeue did not answer"),
        UserError("squeue did not answer"),
        State("done", 0),
    ]

    def state(_) -> State:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert view.follow(job, Target("", {}, None, state)) == 0
    said = [f"launch: train-1: {text}" for text in ("running", "squeue did not answer", "done")]
    assert capsys.readouterr().err.splitlines() == said
    answers.append(UserError("no squeue here"))
    with pytest.raises(UserError, match="no squeue here"):  # it has never answered
        view.follow(job, Target("", {}, None, state))
