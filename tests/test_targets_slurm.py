"""`ctllm launch slurm`: the script that is submitted, what a real SLURM makes of it, and what a user gets wrong."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from clusters import slurm as cluster
from command import ctllm
from fake_hosts import ROOT, Hosts
from test_targets import MEETS, PROFILES, SAVES, TRAIN, ready
from waiting import WAIT, ended, once_there

from ctllm_jax.common.errors import UserError
from launch import jobs, resumes, ship, slurm, view

needs_slurm = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """A home folder of its own, and a launcher that ships a small checkout."""
    made = Hosts(tmp_path / "hosts", monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return made


def launch(hosts: Hosts, *options: str) -> list[str]:
    return ["launch", "slurm", f"--environment={hosts.environment}", *options, "--", *TRAIN]


def fake(hosts: Hosts, name: str, text: str) -> None:
    """A command of SLURM that does this."""
    path = hosts.folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_dry_run_prints_the_script_and_submits_nothing(hosts, capsys, monkeypatch):
    monkeypatch.setenv("TOKEN", "tremendous-secret")
    fake(hosts, "sbatch", "exit 1")
    options = ["--nodes=2", "--per_node=2", "--sbatch=--partition=a --time='1 2'", "--forward=TOKEN", "--devices=3"]
    options.append("--variables=XLA_FLAGS='--a --b'")
    status, out, err = ctllm(capsys, *launch(hosts, *options, "--dry_run"))
    assert (status, err) == (0, "") and not (hosts.folder / "jobs").exists() and "tremendous" not in out
    first = out.index("#!/bin/bash\n#SBATCH --job-name=ctllm-train\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n")
    assert "#SBATCH --signal=B:TERM@120\n#SBATCH --export=HOME,USER,PATH,LANG,SHELL,TOKEN\n#SBATCH --requeue\n" in out
    assert "export JAX_NUM_PROCESSES=4 " in out
    assert " XLA_FLAGS='--a --b' JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=3\n" in out
    tree = f"{os.environ['HOME']}/.ctllm/code/{ship.code('', hosts.checkout).tree}"
    command = f"train --config={tree}/configs/pretrain.py:tiny '--config.data.store=a b' --workdir=gs://b/RUN"
    python = f"{hosts.environment}/bin/python"
    assert f'--kill-on-bad-exit=1 {python} -m launch.task "$statuses" TOKEN \\\n' in out
    assert f"    {python} -m ctllm_jax.cli {command} --config.distributed=True &\n" in out
    assert out.splitlines()[-1].startswith(f"sbatch --parsable --partition=a '--time=1 2' {hosts.folder}/jobs/train-")
    if shutil.which("shellcheck"):
        script = hosts.folder / "script"
        script.write_text(out[first : out.rindex("sbatch --parsable")])
        checked = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed (Debian: shellcheck)")
def test_shellcheck_is_there_and_sees_mistakes(tmp_path):
    (tmp_path / "script").write_text("#!/bin/bash\necho $1\n")
    assert subprocess.run(["shellcheck", tmp_path / "script"], capture_output=True, check=False).returncode == 1


def test_mistakes_and_refusals_are_one_line_each(hosts, capsys, monkeypatch):
    for options, message in (
        (["--nodes=0"], "launch slurm: --nodes=0: must be at least 1"),
        (["--save_seconds=0"], "launch slurm: --save_seconds=0: must be at least 1"),
        (["--port=1"], "launch slurm: Unknown command line flag 'port'"),
    ):
        status, out, err = ctllm(capsys, *launch(hosts, *options))
        assert (status, out, err.count("\n")) == (2, "", 1) and message in err
    status, _, err = ctllm(capsys, *launch(hosts, "--nodes=2")[: -len(TRAIN)], "eval")
    assert status == 2 and "eval runs in one process, not in 2" in err
    refusal = "sbatch: error: Batch job submission failed: Invalid partition name specified"
    fake(hosts, "sbatch", f"echo '{refusal}' >&2; exit 1")
    status, _, err = ctllm(capsys, *launch(hosts))
    assert status == 2 and err.endswith("Invalid partition name specified; `sinfo` shows partitions and what is free\n")
    fake(hosts, "sbatch", "exec sleep 100")
    monkeypatch.setattr(slurm, "_ANSWER", 0.5)
    status, _, err = ctllm(capsys, *launch(hosts))
    assert status == 2 and "sbatch did not answer within 0.5 s; is slurmctld up?" in err
    with pytest.raises(UserError, match="no no-sbatch here; run this where jobs are submitted"):
        slurm._slurm(["no-sbatch"], "")
    assert not jobs.everything()


def test_how_a_job_stands_is_slurms_word_and_then_the_scripts(hosts):
    job = jobs.Job("train-1", "slurm", ("train",), "", 0.0, {"job": "7"})
    fake(hosts, "squeue", 'echo "PENDING Resources"')
    assert slurm.state(job) == jobs.State("pending, SLURM's 7 (Resources)")
    fake(hosts, "squeue", 'echo "NODE_FAIL None"')
    assert slurm.state(job) == jobs.State("SLURM's 7: node_fail", 1)
    fake(hosts, "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert slurm.state(job) == jobs.State("SLURM's 7: no longer known", 1)
    (hosts.folder / "jobs").mkdir()
    (hosts.folder / "jobs" / "train-1.end").write_text("75\n")
    assert slurm.state(job) == jobs.State("ended with status 75", 75)


@pytest.fixture
def batch(hosts, monkeypatch):
    """A stand-in for SLURM that runs the script at once, with one task on this machine; `sleep` writes itself down."""
    monkeypatch.setattr(view, "_ASK", 0.1)
    run = f'SLURM_JOB_ID=7 SLURM_JOB_NODELIST=here setsid bash "$2" > "{hosts.folder}/log" 2>&1 &'
    fake(hosts, "sbatch", f'{run} echo $! > "{hosts.folder}/pid"; echo 7')
    fake(hosts, "srun", 'shift 3; SLURM_PROCID=0 exec "$@"')
    fake(hosts, "scontrol", "echo localhost")
    fake(hosts, "squeue", "echo RUNNING None")
    fake(hosts, "scancel", f'case "$*" in --batch*) kill -USR1 "$(cat "{hosts.folder}/pid")" ;; esac')
    fake(hosts, "sleep", f'echo "$1" >> "{hosts.folder}/slept"')
    return hosts


def test_a_job_that_always_asks_at_once_to_be_started_again_is_given_up_with_growing_pauses(batch, capsys, monkeypatch):
    monkeypatch.setattr(resumes, "MOST", 3)
    batch.program("with open(FOLDER / 'attempts', 'a') as file: file.write('x')\nsys.exit(75)")
    status, _, err = ctllm(capsys, *launch(batch))
    assert status == 1 and "ended with status 1" in err, (batch.folder / "log").read_text()
    assert "launch: given up: 3 times in a row" in (batch.folder / "log").read_text()
    assert (batch.folder / "attempts").read_text() == "xxx" and (batch.folder / "slept").read_text() == "2\n4\n"
    (job,) = jobs.everything()
    assert (batch.folder / "jobs" / f"{job.id}.shorts").read_text() == "3\n"  # it outlasts a time in the queue


def test_a_job_that_is_cancelled_in_a_pause_is_not_started_again(batch, capsys):
    fake(batch, "sleep", f'touch "{batch.folder}/pausing"; exec /bin/sleep 3')
    batch.program("with open(FOLDER / 'attempts', 'a') as file: file.write('x')\nsys.exit(75)")
    assert ctllm(capsys, *launch(batch, "--detach"))[0] == 0
    while not (batch.folder / "pausing").exists():
        time.sleep(0.05)
    (job,) = jobs.everything()
    assert ctllm(capsys, "launch", "cancel", job.id)[0] == 0
    assert ctllm(capsys, "launch", "attach", job.id)[0] == 75 and (batch.folder / "attempts").read_text() == "x"


def test_a_step_that_slurm_cannot_start_counts_as_a_failure(batch, capsys):
    fake(batch, "srun", "echo 'srun: error: Unable to create step for job 7: Node failure' >&2; exit 1")
    assert ctllm(capsys, *launch(batch, "--restarts=1"))[0] == 1
    log = (batch.folder / "log").read_text()
    assert log.count("Node failure") == 2 and "(restart 1 of 1)" in log and "1 restarts are used up" in log


# ---- A real SLURM


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with cluster.slurm(tmp_path_factory.mktemp("cluster") / "slurm") as variables:
        yield variables


@pytest.fixture
def there(real, hosts, monkeypatch):
    for name, value in real.items():
        monkeypatch.setenv(name, value)
    yield hosts
    subprocess.run(["scancel", "--user=root"], check=False)


@pytest.mark.slow
@needs_slurm
def test_failures_are_counted_the_resume_status_is_not_and_who_failed_is_known(there, capsys, monkeypatch):
    monkeypatch.setenv("TOKEN", "tremendous-secret")
    there.program(
        """
        attempt = len(list(FOLDER.glob(f"attempt{INDEX}.*")))
        (FOLDER / f"attempt{INDEX}.{attempt}").write_text(os.environ["JAX_COORDINATOR_ADDRESS"] + os.environ["TOKEN"])
        print("here I am, CPUs:", os.environ["SLURM_CPUS_PER_TASK"], os.environ["TOKEN"], flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        if INDEX == "1":
            time.sleep(1)
            sys.exit([75, 5, 0][attempt])
        while attempt == 1:  # asked to save when the other one fails
            time.sleep(0.1)
        sys.exit([75, 75, 0][attempt])
        """
    )
    options = ["--per_node=2", "--restarts=1", "--forward=TOKEN", "--sbatch=--cpus-per-task=2"]
    status, out, err = ctllm(capsys, *launch(there, *options))
    assert status == 0, out + err
    assert "1: here I am, CPUs: 2 <TOKEN>\n" in out and "launch: the step ended with status 5\n" in out
    assert out.count("launch: starting all processes again") == 2 and "(restart 1 of 1)" in out
    words = [(there.folder / f"attempt0.{attempt}").read_text() for attempt in range(3)]
    assert len(set(words)) == 3 and all(word.startswith("localhost:") and "tremendous" in word for word in words)
    assert not any("tremendous" in path.read_text() for path in (there.folder / "jobs").iterdir())
    there.program("sys.exit(2 if INDEX == '1' else time.sleep(1000))")
    status, out, err = ctllm(capsys, *launch(there, "--per_node=2"))
    assert status == 2 and "starting all" not in out


def by_hand(job: jobs.Job) -> None:
    """Cancels a job as who knows SLURM alone."""
    subprocess.run(["scancel", job.handle["job"]], check=True)


@pytest.mark.slow
@needs_slurm
def test_a_job_that_was_profiled_and_whose_time_is_over_goes_back_to_the_queue_and_one_that_is_cancelled_does_not(
    there, capsys
):
    there.program(PROFILES)
    assert ctllm(capsys, *launch(there, "--per_node=2", "--detach"))[0] == 0
    (job,) = jobs.everything()
    first = ready(there)
    assert ctllm(capsys, "launch", "profile", job.id)[0] == 0
    assert [once_there(there.folder / f"profiled{index}") for index in range(2)] == ["x", "x"]
    for index in range(2):
        (there.folder / f"ready{index}").unlink()
    subprocess.run(["scancel", "--batch", "--signal=TERM", job.handle["job"]], check=True)  # as --signal does
    second = ready(there)
    assert all(map(ended, first)) and all((there.folder / f"saved{index}").exists() for index in range(2))
    assert "running" in ctllm(capsys, "launch", "list")[1]
    assert ctllm(capsys, "launch", "cancel", job.id)[0] == 0
    status, out, _ = ctllm(capsys, "launch", "attach", job.id)
    assert status == 75 and "back to the queue" in out and all(map(ended, second))

    for stop in (lambda job: ctllm(capsys, "launch", "cancel", job.id, "--now"), by_hand):
        (there.folder / "ready0").unlink()
        (there.folder / "ready1").unlink()
        assert ctllm(capsys, *launch(there, "--per_node=2", "--detach"))[0] == 0
        last = jobs.everything()[-1]
        pids = ready(there)
        stop(last)
        assert ctllm(capsys, "launch", "attach", last.id)[0] in (143, 75) and all(map(ended, pids))
        known = subprocess.run(["squeue", "-h", "--states=all", f"--jobs={last.handle['job']}", "-o", "%T"],
                               check=True, capture_output=True, text=True)  # fmt: skip
        assert known.stdout.strip() in ("CANCELLED", "COMPLETING")

    assert ctllm(capsys, *launch(there, "--sbatch=--hold", "--detach"))[0] == 0
    held = jobs.everything()[-1]
    assert "pending" in slurm.state(held).text
    assert ctllm(capsys, "launch", "cancel", held.id)[0] == 0 and slurm.state(held).status == 143


@pytest.mark.slow
@needs_slurm
def test_ctrl_c_where_it_was_launched_waits_until_all_have_saved(there):
    there.program(SAVES)
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    checkout = f"import pathlib; from launch import ship; ship.checkout = lambda: pathlib.Path({str(there.checkout)!r})"
    program = f"{heard}; {checkout}; from ctllm_jax import cli; cli.main({launch(there, '--per_node=2')!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", program]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        pids = ready(there)
        time.sleep(1)
        launcher.send_signal(signal.SIGINT)
        said = launcher.communicate(timeout=WAIT)[0]
    assert launcher.returncode == 75 and "stopping the job" in said and all(map(ended, pids)), said
    assert once_there(there.folder / "saved0") and once_there(there.folder / "saved1")


@pytest.mark.slow
@needs_slurm
def test_of_a_job_of_which_half_has_started_the_half_says_so_and_nothing_is_left(there, capsys):
    waits = """
if INDEX == "1":
    (FOLDER / "waits").write_text(str(os.getpid()))
    time.sleep(1000)
"""
    there.program(f"{waits}{MEETS}")
    status, out, _ = ctllm(capsys, *launch(there, "--per_node=2", "--restarts=0"))
    assert status == 69 and "0: ctllm: error: process 0 has not met the others within 0.05 minutes at" in out, out
    assert ended(int((there.folder / "waits").read_text()))
