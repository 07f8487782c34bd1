"""Runs on gs://, written to and read from a server on this machine through the libraries that go to the real one."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from command import ctllm
from fake_gcs import serving, settings
from gcsfs.retry import HttpError
from test_checkpoint import POLICY, RECORD, assert_is_step, cut, largest, mesh, newest, save, state
from test_kills import assert_same_bits
from test_processes import job, started
from tiny_runs import assert_same_run, at_step, compiled_once, config_of, entries  # noqa: F401 (a fixture)
from tiny_stores import tiny_store

from ctllm_jax import bucket, checkpoint, mirror, restore, stage_mirror, train
from ctllm_jax.bucket import CLAIM, BucketFolder, Changed, Claim, Unreachable
from ctllm_jax.checkpoint import Checkpoints
from ctllm_jax.common.errors import Unanswered, UserError
from ctllm_jax.common.status import EXIT_LOST, EXIT_RESUME
from ctllm_jax.loading import load_model, load_stored

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUN = "gs://bucket/deep/run"


@pytest.fixture(scope="module")
def one_server(tmp_path_factory):
    """One for all tests: clients remember its port."""
    with serving(tmp_path_factory.mktemp("buckets")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in settings(server).items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def server(one_server, tmp_path, monkeypatch):
    """The server with an empty bucket, in whose stead nothing else can be reached."""
    shutil.rmtree(one_server.root / "bucket", ignore_errors=True)
    (one_server.root / "bucket").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield one_server
    one_server.down = False


def there(server) -> pathlib.Path:
    return server.root / "bucket" / "deep" / "run"


# ---- A folder of a bucket


def test_objects_are_written_read_listed_and_deleted_by_generation(server):
    folder = BucketFolder(RUN)
    assert folder.read("a/b.json") is None and folder.generation("a/b.json") == 0
    first = folder.write("a/b.json", b"one", expected=0)
    with pytest.raises(Changed):
        folder.write("a/b.json", b"two", expected=0)
    second = folder.write("a/b.json", b"two", expected=first)
    assert folder.generation("a/b.json") == second != first
    folder.delete("a/b.json", first)
    assert folder.read("a/b.json") == b"two"
    folder.write("c", b"\r\n\x00--" * 1000)
    assert folder.read("c") == b"\r\n\x00--" * 1000
    assert folder.names() == ["c"] and folder.names("a/") == ["a/b.json"]
    folder.delete("a/b.json", second)
    assert folder.names("a/") == []


def test_what_is_no_place_for_a_run_is_refused(server):
    for url in ("s3://bucket/run", "gs://bucket", "gs://"):
        with pytest.raises(UserError, match="a local folder or gs://BUCKET/FOLDER"):
            BucketFolder(url)
    with pytest.raises(UserError, match="gs://nowhere/run: .*bucket does not exist"):
        BucketFolder("gs://nowhere/run").names()


# ---- One job at a time


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bucket, "_BEAT", 0.1)
    monkeypatch.setattr(bucket, "_SILENCE", 1.5)


def claim_of_another(server, **changes) -> None:
    about = {"owner": "another", "host": "elsewhere", "pid": 1, "machine": "elsewhere"}
    BucketFolder(RUN).write(CLAIM, json.dumps(about | changes).encode())


def test_a_second_job_is_refused_while_the_first_is_alive(server, quick):
    first = Claim(RUN)
    with pytest.raises(UserError, match=f"another job is working here .process {os.getpid()} on"):
        Claim(RUN)
    first.release()
    assert not (there(server) / CLAIM).exists()
    Claim(RUN).release()


def test_a_claim_whose_holder_is_silent_is_taken_over(server, quick, capsys):
    claim_of_another(server)
    since = time.monotonic()
    claim = Claim(RUN)
    assert time.monotonic() - since >= 1.5
    assert "was last held by process 1 on elsewhere" in capsys.readouterr().err
    claim.release()


def test_a_holder_that_died_on_this_machine_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(bucket, "_SILENCE", 600.0)
    dead = subprocess.Popen(["true"])
    dead.wait()
    claim_of_another(server, pid=dead.pid, machine=bucket._machine(), host=socket.gethostname())
    since = time.monotonic()
    Claim(RUN).release()
    assert time.monotonic() - since < 60


def test_a_holder_that_finds_another_in_its_place_leaves(server, quick, monkeypatch):
    left = threading.Event()
    monkeypatch.setattr(bucket.processes, "exit_lost", lambda news: "taken over by another job" in news and left.set())
    claim = Claim(RUN)
    claim_of_another(server)
    assert left.wait(10)
    claim.release()


# ---- The mirror


def test_changes_arrive_and_the_manifest_last(server):
    with mirror.run_folder(RUN) as folder:
        copied = ["manifest.json", "metrics.jsonl", "stacks/process-0.txt", "stage.json", "tokenizer/tokenizer.model"]
        for name in (*copied, ".lock", ".stage.json.1.tmp", "metrics.tmp", "checkpoints/5/x", "wandb/x"):
            (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            (folder.path / name).write_text(name)
        folder.before_commit()
        assert (there(server) / "metrics.jsonl").read_text() == "metrics.jsonl"
    found = [path.relative_to(there(server)).as_posix() for path in there(server).rglob("*") if path.is_file()]
    assert sorted(found) == copied
    times = {name: (there(server) / name).stat().st_mtime_ns for name in found}
    assert max(times, key=times.get) == "manifest.json"


def test_a_run_begins_with_what_is_on_the_bucket_and_uploads_it_no_second_time(server):
    with mirror.run_folder(RUN) as folder:
        (folder.path / "metrics.jsonl").write_text("old")
        path = folder.path
    (path / "metrics.jsonl").write_text("never arrived")
    (path / "manifest.json").write_text("never arrived")
    (there(server) / "stage.json").write_text("of another machine")
    server.requests.clear()
    with mirror.run_folder(RUN) as folder:
        assert folder.path == path and path.name == "run"
        assert (path / "metrics.jsonl").read_text() == "old"
        assert (path / "stage.json").read_text() == "of another machine"
        assert not (path / "manifest.json").exists()
        folder.before_commit()
    assert not [name for name in server.requests if "upload" in name and CLAIM not in name and "metrics" in name]
    assert mirror.remote_of(path / "base") == f"{RUN}/base" and mirror.remote_of(path.parent) is None


def test_an_outage_is_said_once_and_made_up_for(server, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "_PAUSES", (0.1,))
    monkeypatch.setattr(bucket, "_ANSWER", 0.3)
    with mirror.run_folder(RUN) as folder:
        server.down = True
        (folder.path / "metrics.jsonl").write_text("line")
        folder.publish()
        until = time.monotonic() + 20
        said = ""
        while "the run goes on" not in said and time.monotonic() < until:
            time.sleep(0.05)
            said += capsys.readouterr().err
        time.sleep(0.5)
        server.down = False
        folder.before_commit()
        said += capsys.readouterr().err
    assert said.count("does not answer") == 1 and "has what the run has written again" in said
    assert (there(server) / "metrics.jsonl").read_text() == "line"


def test_what_cannot_arrive_in_the_end_is_said_and_the_job_may_be_taken_up(server, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "_PATIENCE", 0.5)
    monkeypatch.setattr(bucket, "_ANSWER", 0.3)
    with pytest.raises(SystemExit) as end:
        with mirror.run_folder(RUN) as folder:
            (folder.path / "metrics.jsonl").write_text("line")
            server.down = True
    assert end.value.code == EXIT_RESUME
    assert f"{RUN} lacks files of {folder.path}; the same command copies them" in capsys.readouterr().err
    with pytest.raises(Unreachable):
        BucketFolder(RUN).names()


def test_of_other_processes_than_the_first_stacks_and_profiles_are_copied(server, monkeypatch):
    monkeypatch.setattr(mirror.jax, "process_index", lambda: 1)
    folder = mirror.Mirror(RUN, "train", 1)
    for name in ("stacks/process-1.txt", "profile/step-3-process-1/x", "metrics.jsonl"):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_text(name)
    assert folder.close(10) and folder.path.parent.name.endswith("-process-1")
    assert sorted(path.name for path in there(server).iterdir()) == ["profile", "stacks"]


@pytest.mark.parametrize("kind", [UserError, Unanswered])
def test_an_error_names_the_bucket_and_not_the_mirror(server, kind):
    with pytest.raises(UserError, match=f"^{RUN} holds another run") as raised:
        with mirror.run_folder(RUN) as folder:
            raise kind(f"{folder.path} holds another run")
    assert type(raised.value) is kind


def test_a_bucket_that_is_away_at_the_start_or_to_a_reader_is_no_mistake_of_the_user(server, monkeypatch):
    monkeypatch.setattr(mirror, "_START", 0)
    monkeypatch.setattr(bucket, "_ANSWER", 0.3)
    server.down = True
    with pytest.raises(Unanswered, match=f"^{RUN} does not answer .*; the same command goes on once it does"):
        with mirror.run_folder(RUN):
            pass
    for read in (mirror.fetched, stage_mirror.copied, lambda run: mirror.is_there(run, "run.json")):
        with pytest.raises(Unanswered, match=f"^{RUN} does not answer .*; start again once it does"):
            read(RUN)


# ---- Checkpoints


@pytest.mark.slow
def test_a_checkpoint_on_a_bucket_is_committed_after_what_must_come_before_it(server):
    committed, seen = there(server) / "checkpoints" / "3" / "commit_success.txt", []

    def before():
        seen.append((committed.exists(), (committed.parent / "params" / "manifest.ocdbt").exists()))

    checkpoints = Checkpoints(RUN, POLICY, ask_every=1, before_commit=before)
    checkpoints.save(3, *state(3, mesh(4, 2)), RECORD | {"step": 3}, wait=True)
    checkpoints.close()
    assert committed.exists() and seen[-1] == (False, True)
    assert not any(already for already, _ in seen)  # it is asked for each item, too
    assert_is_step(newest(RUN), 3)


@pytest.mark.slow
def test_on_a_bucket_the_oldest_goes_a_damaged_one_is_put_aside_and_one_that_was_cut_short_is_cleared(server, capsys):
    save(RUN, [1, 2, 3], kept=2)
    folder = there(server) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    cut(largest(folder / "3" / "params"))
    (folder / "4" / "params").mkdir(parents=True)
    (folder / "4" / "params" / "manifest.ocdbt").write_bytes(b"the process was killed here")
    assert_is_step(newest(RUN), 2)
    said = capsys.readouterr().err
    assert "THE CHECKPOINT OF STEP 3 IS DAMAGED" in said and f"Moved to {RUN}/checkpoints/3.damaged" in said
    save(RUN, [5], kept=2)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3.damaged", "5"]
    assert_is_step(newest(RUN), 5)


@pytest.mark.slow
def test_a_save_whose_commit_cannot_be_is_made_up_for(server, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "PAUSES", (0, 0))
    broken = [OSError("the metrics have not arrived"), HttpError({"code": 503, "message": "later"})]

    def before():
        if broken:
            raise broken.pop(0)

    checkpoints = Checkpoints(RUN, POLICY, ask_every=1, before_commit=before)
    checkpoints.save(3, *state(3, mesh(4, 2)), RECORD | {"step": 3}, wait=True)
    checkpoints.close()
    assert capsys.readouterr().err.count("the checkpoint of step 3 could not be written") == 2
    assert_is_step(newest(RUN), 3)


def test_a_bucket_that_does_not_answer_is_no_damage(monkeypatch):
    def fail(*_):
        raise HttpError({"code": 503, "message": "later"})

    monkeypatch.setattr(restore, "_put_aside_unreadable", fail)
    with pytest.raises(Unanswered, match=f"{RUN}/checkpoints cannot be read now .later, 503.; nothing was changed"):
        newest(RUN)


# ---- Training


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("stores") / "store").folder


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    """A run on this machine's disk."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    train.run(config_of(store), str(workdir))
    return workdir


def killed_run(store: str, committed: str) -> None:
    """Trains and dies without warning in step 8, after the checkpoint of step 5 is committed."""

    def die():
        while not pathlib.Path(committed).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    train.prefetched = at_step(8, die)
    train.run(config_of(store), RUN)


@pytest.mark.slow
def test_a_run_that_lost_its_machine_goes_on_from_the_bucket_to_the_same_bits(
    server, undisturbed, store, tmp_path, monkeypatch, capsys
):
    """What the server stores lies as a run on a disk does, so all that reads one can look at it."""
    program = (
        "import sys; sys.path.insert(0, 'tests'); import conftest, test_mirror; "
        f"test_mirror.killed_run({str(store)!r}, {str(there(server) / 'checkpoints' / '5' / 'commit_success.txt')!r})"
    )
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-3000:]
    assert max(entry["step"] for entry in entries(there(server), "train")) >= 5
    shutil.rmtree(tmp_path / "cache")
    result = train.run(config_of(store), RUN)
    assert "train: resumed at step 5" in capsys.readouterr().err
    assert_same_run(there(server), undisturbed)
    assert sorted(path.name for path in (there(server) / "checkpoints").iterdir()) == ["10", "12", "5"]
    assert not (there(server) / CLAIM).exists()
    monkeypatch.setattr(train, "_train", None)
    assert train.run(config_of(store), RUN) == result


@pytest.mark.slow
def test_the_other_verbs_read_a_run_on_a_bucket(server, undisturbed, store, tmp_path, capsys):
    train.run(config_of(store), RUN)
    model, own = load_stored(RUN, step=10), load_stored(str(undisturbed), step=10)
    assert model.name == "run@10" and model.digest == own.digest
    jax.tree.map(np.testing.assert_array_equal, model.params, own.params)
    status, out, err = ctllm(capsys, "report", RUN, str(undisturbed))
    assert status == 0, err
    page = (there(server) / "report.html").read_text()
    assert "finished" in page and "undisturbed" in page
    status, out, err = ctllm(capsys, "trace", f"--workdir={RUN}", "--step=3", "--json")
    assert status == 0, err
    assert out == ctllm(capsys, "trace", f"--workdir={undisturbed}", "--step=3", "--json")[1]
    status, _, err = ctllm(
        capsys,
        "convert",
        f"--config.source={RUN}",
        "--config.dtype=float32",
        f"--workdir={tmp_path / 'converted'}",
    )
    assert status == 0, err
    with pytest.raises(UserError, match=f"{RUN}: no checkpoint of step 7; there are: .5, 10, 12."):
        load_model(RUN, step=7)
    with pytest.raises(UserError, match="gs://bucket/nowhere: neither a run directory"):
        load_model("gs://bucket/nowhere")


@pytest.mark.slow
def test_adapters_find_the_frozen_parameters_of_their_run_on_the_bucket(server, undisturbed, store, tmp_path):
    change = {"model": None, "init_from": str(undisturbed), "lora__rank": 2, "duration": "3 steps"}
    config = config_of(store, **change)
    train.run(config, RUN)
    train.run(config, str(tmp_path / "local"))
    assert (there(server) / "base" / "checkpoints" / "0" / "commit_success.txt").exists()
    jax.tree.map(np.testing.assert_array_equal, load_stored(RUN).params, load_stored(str(tmp_path / "local")).params)


@pytest.mark.slow
def test_a_bucket_that_is_gone_for_a_while_costs_no_step(server, undisturbed, store, monkeypatch, capsys):
    monkeypatch.setattr(bucket, "_ANSWER", 0.5)
    monkeypatch.setattr(bucket, "_BEAT", 0.5)

    def go():
        server.down = True
        threading.Timer(6.0, setattr, (server, "down", False)).start()

    monkeypatch.setattr(train, "prefetched", at_step(4, go))
    train.run(config_of(store), RUN)
    said = capsys.readouterr().err
    assert f"{RUN} does not answer" in said and "the run goes on, its claim is not renewed" in said
    assert_same_run(there(server), undisturbed)


@pytest.mark.slow
def test_a_second_run_into_the_same_folder_is_refused_and_the_first_goes_on(server, undisturbed, store, tmp_path):
    program = (
        "import sys; sys.path.insert(0, 'tests'); import conftest, pathlib, test_mirror, time;"
        "from ctllm_jax import train;"
        "act = lambda: [time.sleep(0.1) for _ in iter(pathlib.Path(sys.argv[1]).exists, True)];"
        "train.prefetched = test_mirror.at_step(8, act); train.run(test_mirror.config_of(sys.argv[2]), test_mirror.RUN)"
    )
    first = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "go"), str(store)], cwd=ROOT)
    until = time.monotonic() + 120
    while not (there(server) / "checkpoints" / "5" / "commit_success.txt").exists() and time.monotonic() < until:
        time.sleep(0.1)
    with pytest.raises(UserError, match=f"another job is working here .process {first.pid} on"):
        train.run(config_of(store), RUN)
    (tmp_path / "go").touch()
    assert first.wait(120) == 0
    assert_same_run(there(server), undisturbed)


@pytest.mark.slow
def test_a_job_of_two_on_a_bucket_loses_one_and_ends_in_the_same_bits(server, store, tmp_path):
    settings = ("--config.duration=20 steps", "--config.checkpoints.every=5", "--config.checkpoints.kept=2")
    job(2, 2, store, tmp_path / "local", *settings)
    running = started(2, 2, store, RUN, *settings)
    until = time.monotonic() + 120
    while not (there(server) / "checkpoints" / "10" / "commit_success.txt").exists() and time.monotonic() < until:
        time.sleep(0.02)
    running[1].kill()
    _, log = running[0].communicate(timeout=120)
    assert running[0].returncode in (EXIT_LOST, -signal.SIGABRT), log[-2000:]
    running[1].communicate()
    shutil.rmtree(tmp_path / "cache")
    job(2, 2, store, RUN, *settings)
    assert_same_bits(there(server), tmp_path / "local")
    assert not (there(server) / CLAIM).exists()
