"""`ctllm launch` over a real sshd, a real SLURM, a fake gcloud and kubectl: small runs, disturbed, that end alike."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from clusters import slurm, sshd
from test_processes import OPTIONS
from test_targets_gke import fake_cluster
from test_targets_tpu import install_gcloud
from tiny_runs import assert_same_run
from tiny_stores import tiny_store
from waiting import ROOT, WAIT, once_saved, once_there, pids_of

LONG = ("--config.duration=32 steps", "--config.checkpoints.every=8", "--config.eval.every=16")
VENV = pathlib.Path(sys.executable).parent.parent


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(store, folder of a run that two processes of `ctllm launch local` have made of it)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    store = tiny_store(folder / "store").folder
    log = folder / "log"
    job = launch("local", ["--processes=2", "--devices=2"], store, folder / "run", log=log)
    assert job.wait(timeout=5 * WAIT) == 0, log.read_text()
    return store, folder / "run"


def launch(target: str, options: list[str], store: pathlib.Path, workdir: pathlib.Path, log: pathlib.Path):
    """`ctllm launch TARGET` with a small training run, its output in `log`."""
    options = options if target == "local" else [f"--environment={VENV}", *uncommitted(), *options]
    command = [sys.executable, "-m", "ctllm_jax.cli", "launch", target, *options, "--"]
    command += ["train", *OPTIONS, *LONG, f"--config.data.store={store}", f"--workdir={workdir}"]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def uncommitted() -> list[str]:
    """The flag that ships what is being worked on."""
    status = subprocess.run(
        ["git", "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = ",".join(entry[3:] for entry in status.split("\0") if entry)
    return [f"--uncommitted={names}"] if names else []


def connection_to(host: str) -> int:
    """The ssh client that leads to the process of a job there."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if words[0] == b"ssh" and host.encode() in words and b"launch.keeper" in words[-2]:
                return int(folder.name)
    raise AssertionError(f"no connection to {host}")


@pytest.mark.slow
@pytest.mark.skipif(bool(sshd.missing()), reason=sshd.missing())
def test_over_ssh_a_job_that_lost_a_connection_and_was_stopped_ends_in_the_undisturbed_bits(undisturbed, tmp_path):
    store, whole = undisturbed
    workdir, log = tmp_path / "run", tmp_path / "log"
    with sshd.sshd(tmp_path / "hosts") as config:
        options = [f"--ssh_config={config}", "--hosts=one,two", "--coordinator=127.0.0.1", "--devices=2"]

        job = launch("ssh", options, store, workdir, log)
        once_saved(workdir, 8)
        os.kill(connection_to("two"), signal.SIGKILL)
        once_there(log, "launch: process 1 two was killed by SIGKILL")
        once_there(log, "[0 one] train: resumed at step")
        once_saved(workdir, 16)
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=WAIT) == 75, log.read_text()
        text = log.read_text()
        assert "(restart 1 of 3)" in text and "shipping " in text
        assert "is saved; the same command goes on" in text and not pids_of(workdir)

        job = launch("ssh", options, store, workdir, log)
        assert job.wait(timeout=5 * WAIT) == 0, log.read_text()
        assert "[0 one] train lm: 32/32 steps" in log.read_text() and "shipping" not in log.read_text()
        assert (tmp_path / "hosts" / "two" / ".ctllm" / "code").is_dir() and not pids_of(workdir)
    assert_same_run(workdir, whole)


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())
def test_under_slurm_a_job_that_lost_a_process_and_was_cancelled_ends_in_the_undisturbed_bits(
    undisturbed, tmp_path, monkeypatch
):
    store, whole = undisturbed
    workdir, log = tmp_path / "run", tmp_path / "log"
    monkeypatch.setenv("CTLLM_JOBS", str(tmp_path / "jobs"))
    with slurm.slurm(tmp_path / "slurm") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        options = [
            "--per_node=2",
            "--devices=2",
            f"--environment={VENV}",
            f"--home={tmp_path / 'home'}",
            *uncommitted(),
        ]

        job = launch("slurm", options, store, workdir, log)
        once_saved(workdir, 8)
        os.kill(pids_of(workdir)[1], signal.SIGKILL)
        once_there(log, "launch: the step ended with status 137")
        once_there(log, "0: train: resumed at step")
        once_saved(workdir, 16)
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=WAIT) == 75, log.read_text()
        text = log.read_text()
        assert "(restart 1 of 3)" in text and not pids_of(workdir)

        job = launch("slurm", options, store, workdir, log)
        assert job.wait(timeout=5 * WAIT) == 0, log.read_text()
        assert "0: train lm: 32/32 steps" in log.read_text() and not pids_of(workdir)
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_on_tpu_slices_a_job_of_four_that_was_preempted_and_stopped_ends_in_the_bits_of_an_undisturbed_one(
    tmp_path, monkeypatch
):
    store, log = tiny_store(tmp_path / "store").folder, tmp_path / "log"
    options = ["--name=big", "--zone=z", "--type=v5litepod-8", "--runtime=r", "--slices=2", "--spot", "--devices=1"]
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CTLLM_JOBS", str(tmp_path / "jobs"))
    install_gcloud(tmp_path, monkeypatch)
    for name in ("whole", "preempted"):
        job = launch("tpu", options, store, tmp_path / name, log)
        if name == "preempted":
            once_saved(tmp_path / name, 8)
            (tmp_path / "state").write_text("SUSPENDED")
            os.kill(pids_of(tmp_path / name)[3], signal.SIGKILL)
            once_there(log, "[0 big-0/0] train: resumed at step 8", 5 * WAIT)
            once_saved(tmp_path / name, 16, 5 * WAIT)
            job.send_signal(signal.SIGINT)
            assert job.wait(timeout=2 * WAIT) == 75, log.read_text()
            text = log.read_text()
            assert "big is suspended; deleting it" in text
            assert "is saved; the same command goes on" in text and not pids_of(tmp_path / name)
            assert not (tmp_path / "state").exists()  # the slices went with it
            job = launch("tpu", options, store, tmp_path / name, log)
        assert job.wait(timeout=6 * WAIT) == 0, log.read_text()
        assert not (tmp_path / "state").exists() and not pids_of(tmp_path / name)
    assert_same_run(tmp_path / "preempted", tmp_path / "whole")


@pytest.mark.slow
def test_on_gke_a_job_of_four_that_lost_a_pod_and_was_stopped_ends_in_the_bits_of_an_undisturbed_one(
    tmp_path, monkeypatch
):
    store, workdir, log = tiny_store(tmp_path / "store").folder, tmp_path / "run", tmp_path / "log"
    options = ["--accelerator=tpu-v5-lite-podslice", "--topology=2x4", "--slices=2", "--spot", "--devices=1"]
    options.append(f"--pod={tmp_path / 'volume.yaml'}")
    (tmp_path / "volume.yaml").write_text(
        "spec:\n  volumes: [{name: shared, nfs: {server: files, path: /}}]\n"
        f"  containers: [{{name: main, volumeMounts: [{{name: shared, mountPath: {tmp_path}}}]}}]\n"
    )
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CTLLM_JOBS", str(tmp_path / "jobs"))
    with fake_cluster(tmp_path, monkeypatch):
        whole = launch("gke", options, store, tmp_path / "whole", log)
        assert whole.wait(timeout=9 * WAIT) == 0, log.read_text()

        job = launch("gke", options, store, workdir, log)
        once_saved(workdir, 8, 5 * WAIT)
        os.kill(pids_of(workdir)[3], signal.SIGKILL)
        once_there(log, "launch: starting all pods again (restart 1 of 3)", 3 * WAIT)
        once_there(log, "[0 slice-0-0] train: resumed at step 8", 5 * WAIT)
        once_saved(workdir, 16, 5 * WAIT)
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=3 * WAIT) == 75, log.read_text()
        text = log.read_text()
        assert "[3 slice-1-1] launch: ended with status 137" in text
        assert "is saved; the same command goes on" in text and not pids_of(workdir)

        job = launch("gke", options, store, workdir, log)
        assert job.wait(timeout=9 * WAIT) == 0, log.read_text()
        assert "[0 slice-0-0] train lm: 32/32 steps" in log.read_text() and not pids_of(workdir)
    assert not list((tmp_path / "objects").iterdir())
    assert_same_run(workdir, tmp_path / "whole")
