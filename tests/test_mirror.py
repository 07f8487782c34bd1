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

import pytest
from fake_gcs import serving, settings
from test_train import assert_same_run, at_step, compiled_once, config_of, entries  # noqa: F401 (a fixture)
from tiny_stores import tiny_store

from ctllm_jax import bucket, mirror, train
from ctllm_jax.bucket import CLAIM, BucketFolder, Changed, Claim, Unreachable
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUN = "gs://bucket/deep/run"


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    with serving(tmp_path / "buckets") as server:
        for name, value in settings(server).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield server


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
        with pytest.raises(UserError, match="a folder of this machine or gs://BUCKET/FOLDER"):
            BucketFolder(url)
    with pytest.raises(UserError, match="gs://nowhere/run: .*bucket does not exist"):
        BucketFolder("gs://nowhere/run").names()


# ---- One job at a time


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bucket, "_BEAT", 0.2)
    monkeypatch.setattr(bucket, "_SILENCE", 3.0)


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
    assert time.monotonic() - since >= 3.0
    assert "was last held by process 1 on elsewhere" in capsys.readouterr().err
    claim.release()


def test_a_holder_that_died_on_this_machine_is_not_waited_for(server, quick):
    dead = subprocess.Popen(["true"])
    dead.wait()
    claim_of_another(server, pid=dead.pid, machine=bucket._machine(), host=socket.gethostname())
    since = time.monotonic()
    Claim(RUN).release()
    assert time.monotonic() - since < 2.0


def test_a_holder_that_finds_another_in_its_place_leaves(server, quick, monkeypatch):
    left = threading.Event()
    monkeypatch.setattr(bucket.processes, "leave", lambda news: "taken over by another job" in news and left.set())
    claim = Claim(RUN)
    claim_of_another(server)
    assert left.wait(10)
    claim._leaving.set()


# ---- The mirror


def test_changes_arrive_and_the_manifest_last(server):
    with mirror.run_folder(RUN) as folder:
        for name in (
            "manifest.json",
            "stage.json",
            "metrics.jsonl",
            "stacks/process-0.txt",
            "tokenizer/tokenizer.model",
        ):
            (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            (folder.path / name).write_text(name)
        for name in (".lock", ".stage.json.1.tmp", "metrics.tmp", "checkpoints/5/x", "wandb/x"):
            (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            (folder.path / name).write_text("not copied")
        folder.before_commit()
        assert (there(server) / "metrics.jsonl").read_text() == "metrics.jsonl"
    found = sorted(path.relative_to(there(server)).as_posix() for path in there(server).rglob("*") if path.is_file())
    assert found == [
        "manifest.json",
        "metrics.jsonl",
        "stacks/process-0.txt",
        "stage.json",
        "tokenizer/tokenizer.model",
    ]
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
    assert said.count("does not answer") == 1 and "has what the run has logged again" in said
    assert (there(server) / "metrics.jsonl").read_text() == "line"


def test_what_cannot_arrive_in_the_end_is_an_error_that_says_where_it_is(server, monkeypatch):
    monkeypatch.setattr(mirror, "_PATIENCE", 0.5)
    monkeypatch.setattr(bucket, "_ANSWER", 0.3)
    with pytest.raises(UserError, match=f"{RUN} lacks files of .*/run, which could not be copied"):
        with mirror.run_folder(RUN) as folder:
            (folder.path / "metrics.jsonl").write_text("line")
            server.down = True
    with pytest.raises(Unreachable):
        BucketFolder(RUN).names()


def test_an_error_names_the_bucket_and_not_the_mirror(server):
    with pytest.raises(UserError, match=f"^{RUN} holds another run"):
        with mirror.run_folder(RUN) as folder:
            raise UserError(f"{folder.path} holds another run")


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
