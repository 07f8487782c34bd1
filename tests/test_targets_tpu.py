"""`ctllm launch tpu` with a gcloud that checks commands against the vendor's reference; hosts are folders."""

import json
import os
import pathlib
import signal
import sys
import time

import pytest
from clusters.sshd import free_port
from command import ctllm
from fake_hosts import Hosts
from test_targets import MEETS, SAVES, TRAIN, launched, ready
from waiting import WAIT, ended, once_there

from launch import jobs, tpu

FLAGS = ("--name=big", "--zone=us-east5-a", "--type=v5litepod-8", "--runtime=v2-alpha-tpuv5-lite")
SLICES = {"name": "big", "zone": "z", "project": "", "slices": 1, "queue_minutes": 1, "type": "v5litepod-8"}
SLICES |= {"runtime": "r", "spot": True}
FAKE = pathlib.Path(__file__).with_name("fake_gcloud.py")


def install_gcloud(folder: pathlib.Path, monkeypatch) -> None:
    """A fake gcloud whose state lies in `folder`; `folder / "bin"` is where commands are found."""
    path = folder / "bin" / "gcloud"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {FAKE} "$@"\n')
    path.chmod(0o755)
    (folder / "port").write_text(str(free_port()))
    monkeypatch.setenv("FAKE_GCLOUD", str(folder))


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    made = Hosts(tmp_path / "hosts", monkeypatch)
    monkeypatch.setattr(tpu, "_TICK", 0.01)
    install_gcloud(made.folder, monkeypatch)
    return made


def launch(hosts: Hosts, *options: str) -> list[str]:
    return ["launch", "tpu", *FLAGS, f"--environment={hosts.environment}", *options, "--", *TRAIN]


PREEMPTED = """
attempt = len(list(FOLDER.glob(f"attempt{INDEX}.*")))
(FOLDER / f"attempt{INDEX}.{attempt}").write_text(" ".join(sys.argv))
if attempt == 0 and INDEX == "3":
    (FOLDER / "state").write_text("SUSPENDED")
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
while attempt == 0:
    time.sleep(0.1)
"""


def test_slices_that_are_taken_away_are_made_again_and_deleted_in_the_end(hosts, capsys):
    hosts.program(PREEMPTED)
    status, _, err = ctllm(capsys, *launch(hosts, "--slices=2", "--spot", "--restarts=1", "--project=mine"))
    assert status == 0, err
    assert "launch: process 3 big-1/1 was killed by SIGKILL" in err and "big is suspended; deleting it" in err
    calls = hosts.calls().splitlines()
    where = "--zone=us-east5-a --project=mine"
    create = (
        f"queued-resources create big {where} --node-count=2 --node-prefix=big --accelerator-type=v5litepod-8 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --quiet"
    )
    assert calls.count(create) == 2 and calls[-1] == f"queued-resources delete big {where} --force --quiet"
    assert sum(call.startswith("queued-resources delete") for call in calls) == 2
    for index in range(4):
        arguments = (hosts.folder / f"attempt{index}.1").read_text()
        assert arguments.endswith("--workdir=gs://b/RUN --config.distributed=True")
    (job,) = jobs.everything()
    assert (job.target, job.status) == ("tpu", 0)


def test_a_slice_that_is_there_is_used_and_left(hosts, capsys):
    hosts.program("print('worker', INDEX)")
    (hosts.folder / "state").write_text("ACTIVE")
    (hosts.folder / "slices").write_text("1")
    status, out, err = ctllm(capsys, *launch(hosts))
    assert status == 0 and "[0 big/0] worker 0\n" in out and "[1 big/1] worker 1\n" in out, err
    assert "create" not in hosts.calls() and "delete" not in hosts.calls()


def test_what_was_made_stays_with_keep(hosts, capsys):
    hosts.program("sys.exit(2)")
    assert ctllm(capsys, *launch(hosts, "--keep"))[0] == 2
    assert "create big --zone=us-east5-a --node-id=big " in hosts.calls() and "delete" not in hosts.calls()


def test_a_dry_run_asks_google_nothing(hosts, capsys):
    status, out, err = ctllm(capsys, *launch(hosts, "--dry_run"))
    assert (status, err, hosts.calls()) == (0, "", "")
    lines = out.splitlines()
    queued = "gcloud compute tpus queued-resources"
    assert lines[1:3] == [
        f"{queued} describe big --zone=us-east5-a --format=json",
        f"{queued} create big --zone=us-east5-a --node-id=big --accelerator-type=v5litepod-8 "
        "--runtime-version=v2-alpha-tpuv5-lite --quiet",
    ]
    assert lines[-1] == "gcloud compute tpus queued-resources delete big --zone=us-east5-a --force --quiet"
    assert "gcloud compute tpus tpu-vm ssh big --zone=us-east5-a --worker=0 --quiet '--command=cd && " in out
    assert "JAX_COORDINATOR_ADDRESS" not in out  # JAX asks the TPU's metadata


@pytest.mark.parametrize(
    ("says", "step"),
    [
        ("ERROR: (gcloud) You do not currently have an active account selected.", "log in with `gcloud auth login`"),
        ("ERROR: (gcloud) Failed to find attribute [project].", "name a project: "),
        (
            "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProject' exceeded",
            "ask for more under IAM",
        ),
        ("ERROR: (gcloud) INVALID_ARGUMENT: accelerator type 'v9-8' not found", "accelerator-types list --zone=ZONE"),
    ],
)
def test_what_google_refuses_is_one_line_with_the_next_step(hosts, capsys, says, step):
    (hosts.folder / "says").write_text(says)
    status, _, err = ctllm(capsys, *launch(hosts))
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith("ctllm: error: ") and says.removeprefix("ERROR: ") in last and step in last


def fails(hosts: Hosts, code: int, message: str, *becomes: str) -> None:
    """Queued resources that are asked for become this."""
    (hosts.folder / "error").write_text(json.dumps({"code": code, "message": message}))
    (hosts.folder / "becomes").write_text("\n".join(becomes))


@pytest.mark.parametrize(
    ("code", "message", "step"),
    [
        (8, "Quota limit 'TPUV5sLitepodPerProject' exceeded.", "ask for more under IAM"),
        (7, "The service account may not", "the account needs the role TPU Admin"),
        (3, "Runtime version 'v9' is none", "versions list --zone=ZONE"),
    ],
)
def test_what_fails_for_good_after_it_was_asked_for_is_said_once_and_not_asked_for_again(
    hosts, capsys, code, message, step
):
    fails(hosts, code, message, *["FAILED"] * 5)
    status, _, err = ctllm(capsys, *launch(hosts))
    assert status == 2 and f"ctllm: error: launch tpu: big has failed: {message}; " in err and step in err
    calls = [call.split()[1] for call in hosts.calls().splitlines()]
    assert calls.count("create") == 1 and calls[-1] == "delete"  # it was made here


def test_what_fails_for_want_of_machines_is_asked_for_again_with_growing_pauses_within_the_time(hosts, capsys):
    fails(hosts, 8, "There is no more capacity in the zone", "FAILED", "FAILED", "SUSPENDED", "ACTIVE")
    hosts.program("")
    with pytest.MonkeyPatch.context() as patch:
        slept = []
        patch.setattr(tpu, "_TICK", 10.0)
        patch.setattr(tpu.time, "sleep", lambda seconds: slept.append(seconds) if seconds >= 1 else None)
        tpu.Slices(SLICES).ready(print)
    out = capsys.readouterr().out
    assert "big is failed: There is no more capacity in the zone; deleting it\nasking again in 10 s\n" in out
    assert "big is suspended; deleting it\nasking again in 40 s\n" in out
    assert [pause for pause in slept if pause > 10] == [20, 40]
    (hosts.folder / "state").unlink()
    fails(hosts, 8, "There is no more capacity in the zone", *["FAILED"] * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu.time, "monotonic", iter(range(0, 10000, 10)).__next__)
        with pytest.raises(tpu.UserError, match=r"still \w+ after 1 minutes: There is no more capacity in the zone; "):
            tpu.Slices(SLICES).ready(print)


def test_what_had_failed_before_is_asked_for_anew_for_it_may_have_been_mended(hosts, capsys):
    fails(hosts, 8, "Quota limit exceeded", "ACTIVE")
    (hosts.folder / "state").write_text("FAILED")
    tpu.Slices(SLICES).ready(print)
    assert capsys.readouterr().out.startswith("big is failed: Quota limit exceeded; deleting it\nasking for big\n")


@pytest.mark.parametrize("how", ["line", "finish"])
def test_slices_of_a_job_whose_terminal_is_gone_are_deleted(hosts, how):
    """Whether the next line comes from a process, or from the launcher as it deletes them."""
    hosts.program(SAVES.replace("time.sleep(1)", "print('a step', flush=True); time.sleep(0.1)"))
    if how == "finish":
        hosts.program("while not (FOLDER / 'go').exists(): time.sleep(0.1)")
    ours, its = os.openpty()
    arguments = {"stdout": its, "stderr": its, "start_new_session": True}
    with launched(hosts, launch(hosts), "from launch import tpu; tpu._TICK = 0.01", **arguments) as launcher:
        if how == "line":
            pids = ready(hosts)
        else:
            once_there(hosts.folder / "calls", "launch.keeper")
            pids = []
        os.close(its)
        os.close(ours)
        (hosts.folder / "go").touch()
        assert launcher.wait(timeout=WAIT) == (75 if how == "line" else 0)
    assert all(map(ended, pids)) and hosts.calls().splitlines()[-1].startswith("queued-resources delete big")
    (job,) = jobs.everything()
    assert job.status == launcher.returncode
    if how == "line":
        assert all((hosts.folder / f"saved{index}").exists() for index in range(2))
        assert job.log.read_text().endswith("goes on: the terminal, or who read the output, is gone\n")


@pytest.mark.parametrize("how", ["Ctrl-C", "cancel"])
def test_a_job_that_is_stopped_saves_on_all_hosts_and_its_slices_are_deleted(hosts, capsys, how):
    hosts.program(SAVES)
    with launched(hosts, launch(hosts), "from launch import tpu; tpu._TICK = 0.01") as launcher:
        pids = ready(hosts)
        if how == "Ctrl-C":
            launcher.send_signal(signal.SIGINT)
        else:
            assert ctllm(capsys, "launch", "cancel", jobs.everything()[0].id)[0] == 0
        said = launcher.communicate(timeout=WAIT)[0]
        assert launcher.returncode == 75 and "launch: stopped; the same command goes on" in said, said
    assert all((hosts.folder / f"saved{index}").exists() for index in range(2)) and all(map(ended, pids))
    assert hosts.calls().splitlines()[-1].startswith("queued-resources delete big")
    assert jobs.everything()[0].status == 75


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_launcher_that_is_to_go_to_the_background_deletes_what_it_waits_for_when_it_is_stopped(hosts, number):
    (hosts.folder / "becomes").write_text("PROVISIONING")
    with launched(hosts, launch(hosts, "--detach"), "from launch import tpu; tpu._TICK = 0.1") as launcher:
        once_there(hosts.folder / "state", "PROVISIONING")
        launcher.send_signal(number)
        assert launcher.wait(timeout=WAIT) == 130
    assert hosts.calls().splitlines()[-1].startswith("queued-resources delete big") and not jobs.everything()


def test_signals_end_no_deletion(hosts):
    hosts.program("")
    (hosts.folder / "slow").write_text("delete 1")
    with launched(hosts, launch(hosts), "from launch import tpu; tpu._TICK = 0.1", start_new_session=True) as launcher:
        once_there(hosts.folder / "heard")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.killpg(launcher.pid, number)  # as a terminal does
            time.sleep(0.1)
        assert launcher.wait(timeout=WAIT) == 0
    assert not (hosts.folder / "state").exists() and jobs.everything()[0].status == 0


@pytest.mark.parametrize("how", ["Ctrl-C", "time-out"])
def test_slices_that_were_asked_for_are_deleted_though_gcloud_did_not_say_so(hosts, capsys, monkeypatch, how):
    (hosts.folder / "slow").write_text("create 1000")
    if how == "Ctrl-C":
        with launched(hosts, launch(hosts)) as launcher:
            once_there(hosts.folder / "heard")
            launcher.send_signal(signal.SIGINT)
            assert launcher.wait(timeout=WAIT) == 130
    else:
        monkeypatch.setattr(tpu, "_ANSWER", 5)
        status, _, err = ctllm(capsys, *launch(hosts))
        assert status == 2 and "queued-resources create did not answer within 5 s" in err
    assert hosts.calls().splitlines()[-1].startswith("queued-resources delete big")
    assert not (hosts.folder / "state").exists()


def test_slices_that_somebody_else_made_meanwhile_are_theirs(hosts):
    slices = tpu.Slices(SLICES)
    with pytest.raises(tpu.UserError, match="ALREADY_EXISTS"):
        slices.ready(lambda _: (hosts.folder / "state").write_text("ACTIVE"))
    assert not slices.made


def test_slices_that_are_gone_when_they_are_to_be_deleted_are_no_error(hosts, capsys):
    hosts.program(
        """
        (FOLDER / f"here{INDEX}").touch()
        while not (FOLDER / "here1").exists():  # gcloud has led it there
            time.sleep(0.05)
        if INDEX == "0":
            (FOLDER / "state").unlink()
        """
    )
    assert ctllm(capsys, *launch(hosts))[0] == 0
    assert hosts.calls().splitlines()[-1].startswith("queued-resources delete big")


def test_hosts_that_do_not_answer_are_named_nothing_is_started_and_the_slices_are_deleted(hosts, capsys):
    hosts.program("(FOLDER / 'started').touch()")
    for how, said in (("down", "Connection timed out"), ("hangs", "nothing came for 2 s")):
        (hosts.folder / "big.1.is").write_text(how)
        status, _, err = ctllm(capsys, *launch(hosts, "--wait=2"))
        assert (
            status == 2 and "big/1 does not answer (" in err and f"{said}) (1 of 2 hosts); nothing was started" in err
        )
        assert hosts.calls().splitlines()[-1].startswith("queued-resources delete big")
    assert not (hosts.folder / "started").exists()


@pytest.mark.slow
def test_of_a_job_of_which_half_has_started_the_half_says_so_and_nothing_is_left(hosts, capsys):
    hosts.program(MEETS)
    (hosts.folder / "big.1.is").write_text("starts no process")
    status, _, err = ctllm(capsys, *launch(hosts, "--restarts=1"))
    met = "[0 big/0] ctllm: error: process 0 has not met the others within 0.05 minutes at"
    assert status == 69 and err.count(met) == 2, err
    assert "launch: process 0 big/0 ended with status 69" in err and "(restart 1 of 1)" in err
    assert hosts.calls().splitlines()[-1].startswith("queued-resources delete big")


def test_a_verb_of_one_process_runs_on_a_slice_of_one_host_and_on_no_other(hosts, capsys):
    hosts.program("print('arguments', *sys.argv[1:])")
    evaluate = ["eval", "--config.model=RUN", "--workdir=gs://b/SCORES"]
    status, out, err = ctllm(capsys, *launch(hosts)[: -len(TRAIN)], *evaluate)
    assert status == 2 and "eval runs in one process, and big has 2 hosts: take a --type of one host" in err
    assert "arguments" not in out and hosts.calls().splitlines()[-1].startswith("queued-resources delete big")
    status, out, err = ctllm(capsys, *launch(hosts, "--type=v6e-8")[: -len(TRAIN)], *evaluate)
    assert status == 0 and "[0 big/0] arguments eval --config.model=RUN --workdir=gs://b/SCORES\n" in out, out + err


def test_a_result_that_would_go_with_the_machine_is_refused_or_told_of(hosts, capsys):
    hosts.program("pass")
    verb = launch(hosts)[: -len(TRAIN)]
    for local in ([*TRAIN[:-1], "--workdir=RUN"], ["eval", "--config.model=RUN", "--workdir=a/b"]):
        status, out, err = ctllm(capsys, *verb, *local)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{local[-1]} is on the disk of a machine that is deleted in the end" in err
        assert "--workdir=gs://BUCKET/FOLDER; or --keep" in err
    assert not hosts.calls()
    for options, given, said in (
        (["--keep"], "RUN", ""),
        (
            [],
            "/nfs/RUN",
            "launch: --workdir=/nfs/RUN is lost with the machines unless it is on a file system that they ",
        ),
        (["--folder=/nfs"], "RUN", "launch: --workdir=RUN is lost with the machines unless "),
    ):
        status, _, err = ctllm(capsys, *launch(hosts, *options, "--dry_run")[:-1], f"--workdir={given}")
        assert status == 0 and err.startswith(said) and bool(err) == bool(said), err
    for reads in (["trace", "--step=1", "--workdir=RUN"], ["plan", *TRAIN[1:2], "--slice=v5e:2x2"]):
        assert ctllm(capsys, *launch(hosts, "--type=v6e-8", "--dry_run")[: -len(TRAIN)], *reads)[::2] == (0, "")


def test_slices_that_do_not_come_in_time_are_given_up(hosts, capsys, monkeypatch):
    (hosts.folder / "state").write_text("PROVISIONING")
    monkeypatch.setattr(tpu.time, "monotonic", iter(range(0, 10000, 40)).__next__)
    with pytest.raises(tpu.UserError, match="big is still PROVISIONING after 1 minutes; wait longer"):
        tpu.Slices(SLICES).ready(print)


def test_mistakes_are_one_line_each(hosts, capsys, monkeypatch):
    for arguments, message in (
        (["launch", "tpu", "--", *TRAIN], "launch tpu: give --name=NAME"),
        (launch(hosts, "--zone="), "launch tpu: give --zone=ZONE"),
        (launch(hosts, "--slices=0"), "--slices=0: must be at least 1"),
        ([*launch(hosts, "--slices=2")[: -len(TRAIN)], "eval"], "eval runs in one process: give --slices=1"),
    ):
        status, out, err = ctllm(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1) and message in err
    assert not hosts.calls()
    with pytest.raises(tpu.UserError, match="no gcloud here"):
        monkeypatch.setenv("PATH", "/nowhere")
        tpu.gcloud(["gcloud"])
    monkeypatch.setattr(tpu, "_ANSWER", 0.2)
    with pytest.raises(tpu.UserError, match="did not answer within 0.2 s; try again"):
        tpu.gcloud([sys.executable, "-c", "import time; time.sleep(9)"])
