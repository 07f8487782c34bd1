"""`ctllm launch ssh` on hosts that are folders here: what is shipped, what is started, what each kind of end leaves."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from command import ctllm
from fake_hosts import ROOT, Hosts, git, repository
from waiting import WAIT, ended, once_there

from ctllm_jax.common.errors import UserError
from launch import jobs, ship, view
from launch.hosts import Host, everywhere
from launch.target import Payload

TRAIN = ("train", "--config=configs/pretrain.py:tiny", "--config.data.store=a b", "--workdir=gs://b/RUN")
HEARD = "import signal; [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)]"


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """Fake hosts, whose launcher ships a small checkout."""
    made = Hosts(tmp_path / "hosts", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for launchers that are processes of their own
    return made


def ssh(hosts: Hosts, *options: str, names: str = "one,two") -> list[str]:
    return ["launch", "ssh", f"--hosts={names}", f"--environment={hosts.environment}", *options, "--", *TRAIN]


@contextlib.contextmanager
def launched(hosts: Hosts, arguments: list[str], first: str = "", **streams):
    """The launcher as a process of its own, whatever the target; `first` is Python that it begins with."""
    checkout = f"import pathlib; from launch import ship; ship.checkout = lambda: pathlib.Path({str(hosts.checkout)!r})"
    program = f"{HEARD}; signal.signal(signal.SIGINT, signal.default_int_handler); {checkout}; {first}\n"
    program += f"from ctllm_jax import cli; cli.main({arguments!r})"
    command = [sys.executable, "-P", "-c", program]  # not the packages of the small checkout
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **streams}
    with subprocess.Popen(command, env=environment, text=True, **streams) as launcher:
        try:
            yield launcher
        finally:
            launcher.kill()


SAVES = """
def save(*_):
    time.sleep(0.3)
    (FOLDER / f"saved{INDEX}").write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGQUIT, lambda *_: (FOLDER / f"shown{INDEX}").write_text("shown"))
(FOLDER / f"ready{INDEX}").write_text(str(os.getpid()))
while True:
    time.sleep(1)
"""
PROFILES = f"""
signal.signal(signal.SIGUSR1, lambda *_: (FOLDER / f"profiled{{INDEX}}").write_text("x"))
{SAVES}"""
MEETS = f"""
os.environ["PYTHONPATH"] = {str(ROOT)!r}
join = "from ctllm_jax import processes; processes._MEETING = 0.05; processes.join()"
os.execv(sys.executable, [sys.executable, "-c", join])
"""  # the real thing, less patient


def ready(hosts: Hosts) -> list[int]:
    return [int(once_there(hosts.folder / f"ready{index}")) for index in range(2)]


# ---- What is shipped


def test_changed_files_are_refused_until_they_are_named_and_then_shipped(tmp_path):
    root = repository(tmp_path / "checkout")
    clean = ship.code("", root)
    assert clean.revision == git(root, "rev-parse", "HEAD").strip()
    (root / "setup.py").write_text("changed")
    (root / "configs" / "mine.py").write_text("new")
    (root / "runs").mkdir()
    (root / "runs" / "log").write_text("ignored")
    with pytest.raises(UserError, match="configs/mine.py, setup.py; commit .*--uncommitted=configs/mine.py,setup.py"):
        ship.code("", root)
    with pytest.raises(UserError, match="are not: setup.py; commit"):
        ship.code("configs/mine.py", root)
    with pytest.raises(UserError, match="--uncommitted=other.py: no such changed file"):
        ship.code("other.py", root)
    before = git(root, "status", "--porcelain")
    named = ship.code("configs/mine.py,setup.py", root)
    assert named.tree != clean.tree and named.revision.endswith(" with uncommitted configs/mine.py, setup.py")
    assert named.read("setup.py") == b"changed" and named.has("configs/mine.py") and not named.has("runs/log")
    assert git(root, "status", "--porcelain") == before
    (root / "setup.py").unlink()
    assert not ship.code("configs/mine.py,setup.py", root).has("setup.py")


def test_a_changed_file_whose_name_is_no_utf_8_is_named_and_shipped(tmp_path):
    root = repository(tmp_path / "checkout")
    name = os.fsdecode(b"\xff.py")
    (root / name).write_text("new")
    with pytest.raises(UserError, match=r"are not: \\xff.py; commit them"):
        ship.code("", root)
    named = ship.code(name, root)
    assert named.revision.endswith(r" with uncommitted \xff.py") and named.read(name) == b"new"


def test_a_command_that_reaches_hosts_and_is_not_there_is_named():
    host = Host("far", lambda script: ("no-such-ssh", "far", script))
    with pytest.raises(UserError, match="launch: no no-such-ssh here, by which far is reached"):
        everywhere([host], "true", 5.0, "does not answer")


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(UserError, match="is none: clone the repository"):
        ship.code("", tmp_path)


def test_a_config_file_goes_by_its_place_in_the_code_or_is_refused(tmp_path, monkeypatch):
    root = repository(tmp_path / "checkout")
    shipped = ship.code("", root)
    monkeypatch.chdir(tmp_path)
    for given in ("configs/pretrain.py:tiny", f"{root}/configs/pretrain.py:tiny", "checkout/configs/pretrain.py:tiny"):
        payload = Payload("train", ("--a=1", f"--config={given}", "--config.b=2"), True)
        assert ship.split_config(payload, shipped) == ("configs/pretrain.py:tiny", ("--a=1", "--config.b=2"))
    spaced = Payload("train", ("--config", "configs/pretrain.py", "--workdir", "x"), True)
    assert ship.split_config(spaced, shipped) == ("configs/pretrain.py", ("--workdir", "x"))
    (tmp_path / "own.py").write_text("")
    for outside in ("own.py", "configs/none.py", "checkout/.git/HEAD"):
        with pytest.raises(UserError, match="not part of the code that is shipped"):
            ship.split_config(Payload("train", (f"--config={outside}",), True), shipped)


def test_the_environment_is_made_once_from_the_lock_and_has_no_code_of_ours(tmp_path, hosts, capsys):
    hosts.program("")

    def options(prepare: str) -> list[str]:
        words = ssh(hosts, "--extra=tpu", "--restarts=0", f"--prepare={prepare}", names="one")
        return [word for word in words if not word.startswith("--environment")]

    status, _, err = ctllm(capsys, *options("echo 'no such package' >&2; false && true"))
    assert status == 2 and "one could not make the environment (no such package)" in err
    options = options("echo 'as it' >> prepared && test -s prepared")
    for _ in range(2):
        status, _, err = ctllm(capsys, *options)
        assert status == 0, err
    venv = next(path for path in (hosts.folder / "one/.ctllm/env").iterdir() if path.is_dir())
    tree = ship.code("", hosts.checkout).tree
    name = f".ctllm/env/{venv.name}"
    assert (hosts.folder / "one" / "pip").read_text().splitlines() == [
        f"-m pip install --quiet --constraint .ctllm/code/{tree}/requirements.lock {name}/source[tpu]",
        "-m pip uninstall --quiet --yes ctllm-jax",
    ]
    assert sorted(path.name for path in venv.iterdir()) == ["bin", "whole"]
    assert (hosts.folder / "one" / "prepared").read_text() == "as it\n"


# ---- What is started


def test_a_dry_run_prints_every_command_and_no_secret(hosts, capsys, monkeypatch):
    monkeypatch.setenv("TOKEN", "tremendous-secret")
    variables = ("--forward=TOKEN", "--variables=XLA_FLAGS='--a --b=c=d' NCCL_DEBUG=INFO")
    status, out, err = ctllm(capsys, *ssh(hosts, "--dry_run", *variables, "--port=4000", "--devices=2"))
    assert (status, err) == (0, "") and not hosts.calls() and not (hosts.folder / "jobs").exists()
    shipped = ship.code("", hosts.checkout)
    home = f".ctllm/code/{shipped.tree}"
    assert out.startswith(f"# code: {shipped.revision}, tree {shipped.tree}\ngit -C {hosts.checkout} archive ")
    begin = "ssh -T -o BatchMode=yes -o ConnectTimeout=60 -o ServerAliveInterval=15 -o ServerAliveCountMax=3 "
    lines = [line for line in out.splitlines() if line.startswith("ssh")]
    assert [line.removeprefix(begin).split()[0] for line in lines] == ["one", "two"] * 3
    assert f"mkdir -p {home}.new.$$ && tar -xzf - -C {home}.new.$$" in lines[2]
    assert lines[5].endswith(f'&& cd {home} && exec "$python" -m launch.keeper\'')
    order = json.loads(out.splitlines()[-1].removeprefix("  reads: "))
    assert order.pop("lock").startswith(".ctllm/locks/train-")
    assert order == {
        "python": f"{hosts.environment}/bin/python",
        "verb": "train",
        "config": "configs/pretrain.py:tiny",
        "arguments": [*TRAIN[2:], "--config.distributed=True"],
        "folder": "",
        "environment": {
            "XLA_FLAGS": "--a --b=c=d",
            "NCCL_DEBUG": "INFO",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_COORDINATOR_ADDRESS": "one:4000",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "1",
            "TOKEN": "***",
        },
    }
    assert "secret" not in out


def test_the_code_arrives_the_processes_run_and_a_secret_is_seen_by_them_alone(hosts, capsys, monkeypatch):
    monkeypatch.setenv("TOKEN", "tremendous-secret")
    hosts.program(
        """
        import json
        (FOLDER / f"told{INDEX}").write_text(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))
        print("my token is", os.environ["TOKEN"])
        sys.exit("failed with " + os.environ["TOKEN"] if INDEX == "1" else 0)
        """
    )
    status, out, err = ctllm(
        capsys, *ssh(hosts, "--forward=TOKEN", "--folder=work", "--restarts=0", "--coordinator=adr")
    )
    assert status == 1 and "[0 one] my token is <TOKEN>\n" in out and "[1 two] failed with <TOKEN>\n" in err
    assert "launch: process 1 two ended with status 1; its last line: failed with <TOKEN>\n" in err
    tree = ship.code("", hosts.checkout).tree
    addresses = set()
    for index, host in enumerate(("one", "two")):
        home = hosts.folder / host
        code = home / ".ctllm" / "code" / tree
        arguments, environment, folder = json.loads((hosts.folder / f"told{index}").read_text())
        config = f"--config={code}/configs/pretrain.py:tiny"
        assert arguments == ["train", config, *TRAIN[2:], "--config.distributed=True"]
        assert folder == str(home / "work") and environment["PYTHONPATH"] == str(code)
        assert environment["JAX_PROCESS_ID"] == str(index) and environment["JAX_NUM_PROCESSES"] == "2"
        assert environment["TOKEN"] == "tremendous-secret"
        addresses.add(environment["JAX_COORDINATOR_ADDRESS"])
        assert sorted(path.name for path in code.iterdir() if path.name != "__pycache__") == sorted(
            git(hosts.checkout, "ls-tree", "--name-only", "HEAD").split()
        )
    assert len(addresses) == 1 and addresses.pop().startswith("adr:")
    written = [path.read_text() for path in (hosts.folder / "jobs").iterdir()]
    assert len(written) == 2 and not any("tremendous" in text for text in (out, err, hosts.calls(), *written))


def test_a_lost_process_and_the_resume_status_start_all_again_without_shipping_again(hosts, capsys):
    hosts.program(
        """
        attempt = len(list(FOLDER.glob(f"attempt{INDEX}.*")))
        (FOLDER / f"attempt{INDEX}.{attempt}").write_text(os.environ["JAX_COORDINATOR_ADDRESS"])
        if attempt == 0 and INDEX == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt == 1:
            sys.exit(75)
        while attempt == 0:
            time.sleep(1)
        """
    )
    status, _, err = ctllm(capsys, *ssh(hosts, "--restarts=1"))
    assert status == 0, err
    assert "process 1 two was killed by SIGKILL" in err and "(restart 1 of 1)" in err
    assert err.count("starting all processes again") == 2
    ports = [(hosts.folder / f"attempt0.{attempt}").read_text() for attempt in range(3)]
    assert len(set(ports)) == 3 and hosts.calls().count("tar -xzf") == 2


def test_a_host_that_goes_down_between_attempts_is_a_failure_within_the_budget(hosts, capsys):
    hosts.program('(FOLDER / "two.is").write_text("down"); sys.exit(1)')
    status, _, err = ctllm(capsys, *ssh(hosts, "--restarts=1"))
    assert status == 69
    assert "launch: two does not answer (ssh: connect to host two port 22: Connection refused) (1 of 2 hosts)" in err
    assert err.endswith("1 restarts are used up\n")


# ---- Mistakes


def test_mistakes_are_one_line_each_and_start_nothing(hosts, capsys, tmp_path):
    (hosts.checkout / "setup.py").write_text("changed")
    for arguments, message in (
        (ssh(hosts), "are not: setup.py; commit them, or ship them as they are with --uncommitted=setup.py"),
        (ssh(hosts, names=""), "give --hosts=NAME[,NAME]"),
        (ssh(hosts, names="-oProxyCommand=x"), "'-oProxyCommand=x' is not a host"),
        (ssh(hosts, "--uncommitted=setup.py", "--forward=NOBODY_SETS_THIS"), "--forward=NOBODY_SETS_THIS: no such"),
        (ssh(hosts, "--wait=0"), "--wait=0: must be at least 1"),
        (ssh(hosts, "--prepare=true"), "--environment names one that is there"),
        ([word for word in ssh(hosts, "--extra=cuda") if "environment" not in word], "there: add gcs to --extra"),
        (ssh(hosts, "--uncommitted=setup.py", "--variables=A=1 -B=2"), "'-B=2' is not NAME=VALUE"),
        (ssh(hosts, "--uncommitted=setup.py", "--variables=A='1"), "--variables=A='1: No closing quotation"),
        ([*ssh(hosts)[: -len(TRAIN)], "eval"], "eval runs in one process: give one host, not 2"),
    ):
        status, out, err = ctllm(capsys, *arguments)
        assert (
            (status, out, err.count("\n")) == (2, "", 1) and err.startswith("ctllm: error: launch") and message in err
        )
    assert not hosts.calls()


def test_hosts_that_are_down_or_hang_are_named_within_the_time_and_nothing_is_started(hosts, capsys):
    hosts.program("(FOLDER / 'started').touch()")
    hosts.becomes("two", "down")
    hosts.becomes("three", "hangs")
    status, _, err = ctllm(capsys, *ssh(hosts, "--wait=5", names="one,two"))
    assert status == 2 and "two does not answer (ssh: connect to host two" in err
    assert "(1 of 2 hosts); nothing was started; to try it by hand: ssh -T -o BatchMode=yes" in err
    assert err.endswith(" two true\n")
    begun = time.monotonic()
    status, _, err = ctllm(capsys, *ssh(hosts, "--wait=1", names="three"))
    assert status == 2 and time.monotonic() - begun < 30
    assert "launch: three does not answer (nothing came for 1 s); nothing was started; to try it by hand" in err
    status, _, err = ctllm(capsys, *ssh(hosts, "--environment=nowhere", names="one"))
    assert status == 2 and "one: no nowhere/bin/python; leave --environment out" in err
    assert not (hosts.folder / "started").exists()


# ---- The end, whoever brings it about


def test_ctrl_c_waits_until_all_have_saved(hosts):
    hosts.program(SAVES)
    with launched(hosts, ssh(hosts)) as launcher:
        pids = ready(hosts)
        launcher.send_signal(signal.SIGQUIT)
        assert [once_there(hosts.folder / f"shown{index}") for index in range(2)] == ["shown"] * 2
        launcher.send_signal(signal.SIGINT)
        said = launcher.communicate(timeout=WAIT)[0]
        assert launcher.returncode == 75 and "launch: stopped; the same command goes on" in said, said
        assert all((hosts.folder / f"saved{index}").exists() for index in range(2)) and all(map(ended, pids))


def test_all_are_asked_for_a_profile_but_those_that_would_die_of_it(hosts, capsys):
    hosts.program(PROFILES)
    with launched(hosts, ssh(hosts)) as launcher:
        ready(hosts)
        (job,) = jobs.everything()
        status, _, err = ctllm(capsys, "launch", "profile", job.id)
        assert status == 0 and f"{job.id} has been asked for a profile" in err
        assert [once_there(hosts.folder / f"profiled{index}") for index in range(2)] == ["x", "x"]
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(WAIT) == 75
    status, _, err = ctllm(capsys, "launch", "profile", job.id)
    assert status == 2 and f"launch profile: {job.id} does not run: ended with status 75" in err
    for index in range(2):
        (hosts.folder / f"ready{index}").unlink()
    hosts.program(SAVES)
    with launched(hosts, ssh(hosts)) as launcher:
        pids = ready(hosts)
        last = jobs.everything()[-1]
        assert ctllm(capsys, "launch", "profile", last.id)[0] == 0
        launcher.send_signal(signal.SIGQUIT)
        assert [once_there(hosts.folder / f"shown{index}") for index in range(2)] == ["shown"] * 2
        assert launcher.poll() is None and all(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)
        dataclasses.replace(last, id="eval-1", command=("eval",)).save()
        status, _, err = ctllm(capsys, "launch", "profile", "eval-1")
        assert status == 2 and "eval-1 is a job of eval; only `train` takes profiles" in err
        dataclasses.replace(last, id="train-2", handle={**last.handle, "host": "far"}).save()
        assert "held by a launcher on far" in ctllm(capsys, "launch", "profile", "train-2")[2]


def test_a_second_ctrl_c_kills(hosts):
    hosts.program(SAVES.replace("time.sleep(0.3)", "(FOLDER / f'saving{INDEX}').write_text('x'); time.sleep(1000)"))
    with launched(hosts, ssh(hosts)) as launcher:
        pids = ready(hosts)
        launcher.send_signal(signal.SIGINT)
        assert [once_there(hosts.folder / f"saving{index}") for index in range(2)]
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=WAIT)
        assert launcher.returncode == 130 and all(map(ended, pids))


def test_processes_whose_launcher_was_killed_save_and_end(hosts):
    hosts.program(SAVES)
    with launched(hosts, ssh(hosts)) as launcher:
        pids = ready(hosts)
        launcher.kill()
        assert all(map(ended, pids)) and all((hosts.folder / f"saved{index}").exists() for index in range(2))
    (job,) = jobs.everything()
    assert jobs.held_state(job) == jobs.State("its launcher was killed, and the job with it", 137)


# ---- Jobs from other terminals


def test_jobs_are_listed_followed_and_cancelled_from_elsewhere(hosts, capsys, monkeypatch):
    monkeypatch.setattr(view, "_ASK", 0.1)
    hosts.program("print('first line', flush=True)\n" + SAVES)
    with launched(hosts, ssh(hosts, "--detach")) as launcher:
        said = launcher.communicate(timeout=WAIT)[0]
        assert launcher.returncode == 0 and "runs in the background" in said, said
    pids = ready(hosts)
    (job,) = jobs.everything()
    try:
        assert job.target == "ssh" and job.revision == git(hosts.checkout, "rev-parse", "HEAD").strip()
        assert (
            f"{job.id} " in ctllm(capsys, "launch", "list")[1] and "running under" in ctllm(capsys, "launch", "list")[1]
        )
        once_there(job.log, "[1 two] first line")
        assert "[1 two] first line" in ctllm(capsys, "launch", "tail", job.id[:6])[1]
        assert ctllm(capsys, "launch", "cancel", job.id)[0] == 0
        status, out, err = ctllm(capsys, "launch", "attach", job.id)
        assert status == 75 and "launch: stopped" in out and "ended with status 75; the same command goes on" in err
        assert all(map(ended, pids)) and all((hosts.folder / f"saved{index}").exists() for index in range(2))
        assert ctllm(capsys, "launch", "cancel", job.id)[2] == f"launch: {job.id}: ended with status 75\n"
        assert "ended with status 75" in ctllm(capsys, "launch", "list")[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.handle["pid"], signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tail"], "launch tail: ID [--lines=N]"),
        (["tail", "none"], "'none': no such job; `ctllm launch list` shows those in "),
        (["cancel", "train-"], "'train-': 2 jobs begin so: train-1, train-2"),
        (["attach", "train-1", "--now"], "launch attach: Unknown command line flag 'now'"),
        (["tail", "train-1"], "train-1 has no output yet"),
        (["attach", "train-2"], "made for target 'moon', which this version does not have"),
    ],
)
def test_a_wrong_question_about_a_job_is_answered_in_one_line(hosts, capsys, arguments, message):
    for name, target in (("train-1", "local"), ("train-2", "moon")):
        jobs.Job(name, target, ("train",), "", 0.0, {"host": "elsewhere", "pid": 1, "born": "1"}).save()
    status, out, err = ctllm(capsys, "launch", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


def test_a_job_of_another_machine_is_left_to_it(hosts, capsys):
    jobs.Job("far", "local", ("train",), "", 0.0, {"host": "elsewhere", "pid": os.getpid(), "born": "1"}).save()
    assert "held by a launcher on elsewhere: ask there" in ctllm(capsys, "launch", "list")[1]
    status, _, err = ctllm(capsys, "launch", "cancel", "far")
    assert status == 2 and "cancel it there" in err


def test_a_record_that_cannot_be_written_costs_no_job_its_status(hosts, capsys):
    hosts.program("import shutil; shutil.rmtree(FOLDER / 'jobs'); (FOLDER / 'jobs').write_text('')")
    status, _, err = ctllm(capsys, *ssh(hosts, names="one"))
    assert status == 0 and "ended with status 0, which could not be written down: " in err, err


def test_a_damaged_record_is_named(hosts, capsys):
    (jobs.jobs_folder()).mkdir(parents=True)
    (jobs.jobs_folder() / "x.json").write_text("{}")
    status, _, err = ctllm(capsys, "launch", "list")
    assert status == 2 and "x.json: not the record of a job" in err
