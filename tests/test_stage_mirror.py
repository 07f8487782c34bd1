"""Verbs whose folder is on gs://: a server on this machine, reached through the library that goes to the real one."""

# ruff: noqa: F811 (fixtures of other tests)

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from test_benchmark import config_of, model  # noqa: F401 (a fixture)
from test_mirror import one_server, server  # noqa: F401 (fixtures)

from ctllm_jax import bucket, mirror, stage_mirror
from ctllm_jax.bucket import CLAIM, BucketFolder, Unreachable
from ctllm_jax.common.errors import Unanswered, UserError
from ctllm_jax.common.files import place
from ctllm_jax.common.manifest import open_stage
from ctllm_jax.common.status import EXIT_RESUME
from ctllm_jax.loading import find_model
from ctllm_jax.stage_mirror import LISTING, StageMirror, at_hand
from ctllm_jax.verbs import VERBS

ROOT = pathlib.Path(__file__).resolve().parent.parent
URL = "gs://bucket/deep/scores"


@dataclasses.dataclass(frozen=True)
class Config:
    """Of a verb that has no keys."""


def writing(name: str = "eval", url: str = URL):
    """A block in which the verb is at work; gives (config, folder of this machine)."""
    return at_hand(name, dataclasses.replace(VERBS[name], folders=()), Config(), url)


def put(folder: str | pathlib.Path, *names: str, text: str = "") -> None:
    for name in names:
        path = pathlib.Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or name)


def files(folder: str | pathlib.Path) -> list[str]:
    """All files below a folder but those that say what it is."""
    found = [path.relative_to(folder).as_posix() for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    return sorted(name for name in found if name not in (LISTING, ".ctllm-copy"))


def there(server) -> pathlib.Path:
    return server.root / "bucket" / "deep" / "scores"


def wait_for(folder: str | pathlib.Path, name: str) -> None:
    """Returns when files whose names begin so are among those that a run would begin with."""
    listing, until = pathlib.Path(folder, LISTING), time.monotonic() + 60
    while time.monotonic() < until:
        if listing.exists() and any(found.startswith(name) for found in json.loads(listing.read_text())["files"]):
            return
        time.sleep(0.01)
    raise AssertionError(f"{name} has not arrived")


def test_what_is_written_arrives_what_is_deleted_goes_and_nothing_stays_here(server, monkeypatch):
    monkeypatch.setattr(StageMirror, "every", 0.05)
    put(there(server), "raw/of-somebody-else")
    with writing() as (_, folder):
        assert place(folder) == URL and place(f"{folder}/a/b") == f"{URL}/a/b" and place("/x") == "/x"
        put(folder, "stage.json", "work/1", "parts/a.jsonl", ".lock", "a.tmp", "x/incomplete.AB_1.0.0/y", text="{}")
        wait_for(there(server), "work/1")
        assert files(there(server)) == [CLAIM, "parts/a.jsonl", "raw/of-somebody-else", "stage.json", "work/1"]
        pathlib.Path(folder, "work/1").unlink()
        put(folder, "manifest.json", text="{}")
        server.requests.clear()
    assert files(there(server)) == ["manifest.json", "parts/a.jsonl", "raw/of-somebody-else", "stage.json"]
    assert json.loads((there(server) / LISTING).read_text()) == {
        "files": ["manifest.json", "parts/a.jsonl", "stage.json"],
        "begun": [],
    }
    assert not [request for request in server.requests if "upload" in request and "parts" in request]
    assert not pathlib.Path(folder).parent.exists()


def test_a_run_begins_with_what_was_there_at_one_moment_wherever_it_goes_on(server, monkeypatch, tmp_path):
    monkeypatch.setattr(mirror, "_PARTING", 0.2)
    upload = BucketFolder.upload

    def breaks(self, name, path):
        if name == "set/2":
            raise Unreachable("it is gone")
        upload(self, name, path)

    with writing() as (_, folder):
        put(folder, "stage.json", text="{}")
        put(folder, "parts/1")
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(BucketFolder, "upload", breaks)
        with writing() as (_, folder):
            assert files(folder) == ["parts/1", "stage.json"]
            put(folder, "set/1", "set/2", "set/3")
            raise KeyboardInterrupt
    assert "set/1" in files(there(server)) and "set/2" not in files(there(server))
    assert not (there(server) / CLAIM).exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with writing() as (_, folder):
        assert files(folder) == ["parts/1", "stage.json"]
        put(folder, "set/3")
    assert files(there(server)) == ["parts/1", "set/3", "stage.json"]  # what had arrived in vain is gone
    put(there(server), "../../outside", "x", text="planted")
    (there(server) / LISTING).write_text(
        json.dumps({"files": ["../../outside", "parts/1", CLAIM, "/etc/hosts", 3], "begun": ["x"]})
    )
    with writing() as (_, folder):
        assert files(folder) == ["parts/1"]
    assert files(there(server)) == ["parts/1", "set/3", "stage.json"] and (server.root / "bucket" / "outside").exists()


def test_files_that_are_still_here_are_not_fetched_again(server):
    with pytest.raises(KeyboardInterrupt), writing() as (_, folder):
        put(folder, "stage.json", text="{}")
        put(folder, "one", "two")
        raise KeyboardInterrupt
    put(folder, "two", "three", "empty/x", text="never arrived")
    pathlib.Path(folder, "empty/x").unlink()
    server.requests.clear()
    with writing() as (_, folder):
        assert files(folder) == ["one", "stage.json", "two"] and pathlib.Path(folder, "two").read_text() == "two"
        assert not pathlib.Path(folder, "empty").exists()
    fetched = [request for request in server.requests if "alt=media" in request and "json" not in request]
    assert len(fetched) == 1 and "two" in fetched[0]


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(server):
    with writing() as (_, folder):
        open_stage("eval", 1, folder, {"limit": 1}, {})
        put(folder, "parts/1")
    before = {name: (there(server) / name).read_bytes() for name in [*files(there(server)), LISTING]}
    for name, settings_ in (("answer", {"limit": 1}), ("eval", {"limit": 2})):
        with pytest.raises(UserError, match=f"^{URL} holds a 'eval' run made from other"):
            with writing(name) as (_, folder):
                assert ("parts/1" in files(folder)) == (name == "eval")
                open_stage(name, 1, folder, settings_, {})
    assert {name: (there(server) / name).read_bytes() for name in [*files(there(server)), LISTING]} == before


def test_a_finished_folder_that_was_copied_there_by_hand_counts(server):
    put(there(server), "stage.json", "manifest.json", text="{}")
    put(there(server), "parts/1")
    with writing() as (_, folder):
        assert files(folder) == ["manifest.json", "parts/1", "stage.json"]


def test_a_large_file_that_grows_is_not_copied_each_time(server, monkeypatch):
    monkeypatch.setattr(StageMirror, "every", 0.05)
    monkeypatch.setattr(stage_mirror, "SMALL", 4)
    with writing() as (_, folder):
        put(folder, "log", text="12345678")
        wait_for(there(server), "log")
        with open(f"{folder}/log", "a") as log:
            log.write("9")
        put(folder, "other")
        wait_for(there(server), "other")
        assert (there(server) / "log").read_text() == "12345678"
        with open(f"{folder}/log", "a") as log:
            log.write("0")
        until = time.monotonic() + 20
        while (there(server) / "log").read_text() != "1234567890" and time.monotonic() < until:
            time.sleep(0.02)
        with open(f"{folder}/log", "a") as log:
            log.write("x")
    assert (there(server) / "log").read_text() == "1234567890x"


def test_pieces_of_a_large_file_make_it_whole(server, monkeypatch, tmp_path):
    monkeypatch.setattr(bucket, "_PIECE", 1 << 18)
    content = bytes(range(256)) * 4000
    (tmp_path / "large").write_bytes(content)
    folder = BucketFolder(URL)
    folder.upload("a/large", tmp_path / "large")
    folder.download("a/large", tmp_path / "back")
    assert (there(server) / "a/large").read_bytes() == (tmp_path / "back").read_bytes() == content
    with pytest.raises(UserError, match=f"{URL}: .*No such object"):
        folder.download("a/none", tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "large"]


def test_names_that_lead_elsewhere_on_a_disk_are_not_of_the_folder(server):
    folder = BucketFolder(URL)
    names = ["a", "/etc/hosts", "../a", "a/../b", "a//b", "folder/", "./a"]
    found = [types.SimpleNamespace(name=f"deep/scores/{name}", size=1, crc32c="") for name in names]
    folder._bucket = types.SimpleNamespace(list_blobs=lambda **_: found)
    assert [*folder.contents()] == ["a"]


def test_what_does_not_arrive_in_the_end_is_said_and_the_job_may_be_taken_up(server, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "_PATIENCE", 0.5)
    monkeypatch.setattr(bucket, "_ANSWER", 0.3)
    with pytest.raises(SystemExit) as end:
        with writing() as (_, folder):
            put(folder, "scores.json")
            server.down = True
    assert end.value.code == EXIT_RESUME
    assert f"eval: {URL} lacks files of {folder}; the same command copies them" in capsys.readouterr().err


def test_a_process_that_is_asked_to_end_copies_what_it_has(server):
    with pytest.raises(SystemExit) as end, writing() as (_, folder):
        put(folder, "parts/1")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    assert end.value.code == EXIT_RESUME and files(there(server)) == ["parts/1"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_folders_that_a_verb_reads_from_a_disk_are_copied_there(server):
    put(server.root / "bucket" / "corpus", "manifest.json", "map_cc/en/1.0.0/ids.npy", LISTING, text="{}")

    @dataclasses.dataclass(frozen=True)
    class Inner:
        earlier: tuple[str, ...]

    @dataclasses.dataclass(frozen=True)
    class Outer:
        corpus: str
        tokenizer: str
        model: str | None
        dedup: Inner

    given = Outer("gs://bucket/corpus", "/here", None, Inner(("gs://bucket/corpus", "/there")))
    verb = dataclasses.replace(VERBS["tokenizer"], folders=("corpus", "tokenizer", "model", "dedup.earlier"))
    with at_hand("tokenizer", verb, given, "/work") as (config, folder):
        assert (folder, config.tokenizer, config.model, config.dedup.earlier[1]) == ("/work", "/here", None, "/there")
        for copy in (config.corpus, config.dedup.earlier[0]):
            assert files(copy) == ["manifest.json", "map_cc/en/1.0.0/ids.npy"] and place(copy) == "gs://bucket/corpus"
    for kind in (UserError, Unanswered):
        said = pytest.raises(kind, match="^gs://bucket/corpus is bad$")
        with said, at_hand("x", verb, given, None) as (config, _):
            raise kind(f"{config.corpus} is bad")
    with at_hand("sweep", VERBS["sweep"], Config(), "gs://bucket/corpus") as (_, folder):
        assert place(folder) == "gs://bucket/corpus"
    assert files(server.root / "bucket" / "corpus") == ["manifest.json", "map_cc/en/1.0.0/ids.npy"]
    with pytest.raises(UserError, match="gs://bucket/none: no such folder, or an empty one"):
        stage_mirror.copied("gs://bucket/none")


def test_workers_that_would_not_see_the_folder_are_refused(server):
    @dataclasses.dataclass(frozen=True)
    class Beam:
        runner: str

    @dataclasses.dataclass(frozen=True)
    class Job:
        beam: Beam

    verb = dataclasses.replace(VERBS["corpus"], folders=())
    with pytest.raises(UserError, match=f"corpus: --workdir={URL}: the workers of FlinkRunner would write"):
        with at_hand("corpus", verb, Job(Beam("FlinkRunner")), URL):
            pass
    assert not server.requests or not there(server).exists()


# ---- The real verbs


def command(*arguments: str, before: str = "pass") -> list[str]:
    """The command line of `ctllm`, after a statement of the test's."""
    program = (
        f"import sys; sys.path.insert(0, 'tests'); import conftest\n{before}\nfrom ctllm_jax import cli; cli.main()"
    )
    return [sys.executable, "-c", program, *arguments]


KILLED = """
import os, signal
import test_stage_mirror
from ctllm_jax.evaluate import run
from ctllm_jax.stage_mirror import StageMirror
StageMirror.every = 0.1
work, calls = run.answer, []
run.on_each_device = lambda model: [model]
def block(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        test_stage_mirror.wait_for({there!r}, "parts/toy_ppl/two-0000")
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*arguments)
run.answer = block
"""


@pytest.mark.slow
def test_an_evaluation_that_is_killed_goes_on_elsewhere_to_the_same_bytes(server, model, tmp_path, monkeypatch):
    config = config_of(tmp_path, model)
    shutil.copytree(tmp_path / "hf", server.root / "bucket" / "hf")
    shutil.copytree(tmp_path / "toy", server.root / "bucket" / "tasks" / "toy")
    assert find_model("gs://bucket/hf").digest == find_model(str(tmp_path / "hf")).digest
    flags = [
        f"--config.benchmarks={config.benchmarks!r}",
        "--config.sampling.max_tokens=4",
        "--config.prompts=('从前',)",
    ]
    far = ["eval", "--config.model=gs://bucket/hf", "--config.data=gs://bucket/tasks", *flags, f"--workdir={URL}"]
    near = ["eval", f"--config.model={tmp_path}/hf", f"--config.data={tmp_path}", *flags, f"--workdir={tmp_path}/near"]
    subprocess.run(command(*near), cwd=ROOT, check=True, timeout=300)
    killed = subprocess.run(command(*far, before=KILLED.format(there=str(there(server)))), cwd=ROOT, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    kept = {
        name: (there(server) / name).stat().st_mtime_ns for name in files(there(server)) if name.startswith("cache/")
    }
    assert len(kept) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    subprocess.run(command(*far), cwd=ROOT, check=True, timeout=300)
    for name in (names := [name for name in files(tmp_path / "near") if name not in ("manifest.json", ".lock")]):
        assert (there(server) / name).read_bytes() == (tmp_path / "near" / name).read_bytes(), name
    assert files(there(server)) == sorted([*names, "manifest.json"])
    assert {name: (there(server) / name).stat().st_mtime_ns for name in kept} == kept  # not asked again
    results = [
        json.loads((folder / "manifest.json").read_text())["result"] for folder in (there(server), tmp_path / "near")
    ]
    assert results[0] == results[1]
    ended = subprocess.run(command(*far), cwd=ROOT, check=True, timeout=300, capture_output=True, text=True)
    assert f"eval: already finished in {URL}" in ended.stderr
    compare = command("compare", URL, f"{tmp_path}/near", "--workdir=gs://bucket/deep/compared")
    subprocess.run(compare, cwd=ROOT, check=True, timeout=300)
    assert (server.root / "bucket" / "deep" / "compared" / "comparison.json").exists()
    assert not (ROOT / "gs:").exists()


STOPPED = """
import os, signal, threading
import test_stage_mirror
from ctllm_jax.stage_mirror import StageMirror
StageMirror.every = 0.1
def watch():
    test_stage_mirror.wait_for({there!r}, {name!r})
    os.kill(os.getpid(), signal.SIGKILL)
def begin(self, begin=StageMirror._begin):
    begin(self)
    threading.Thread(target=watch, daemon=True).start()
StageMirror._begin = begin
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["work/filtered/00000.json", "work/deduplicated/00001.json"])
def test_a_corpus_that_is_killed_goes_on_elsewhere_and_is_tokenized_and_read_there(
    server,
    tmp_path,
    monkeypatch,
    name,
):
    inputs = "--config.input=('sample/documents/en.jsonl','sample/documents/zh_books.jsonl')"
    store = ["--config.sequence_length=64", "--config.validation_share=0.1"]
    size = ["--config.vocab_size=2000", "--config.character_coverage=0.98"]

    def build(folder: str, before: str = "pass") -> int:
        made = subprocess.run(command("corpus", inputs, f"--workdir={folder}/corpus", before=before), cwd=ROOT)
        if made.returncode == 0:
            chain = [["tokenizer", f"--config.corpus={folder}/corpus", *size, f"--workdir={folder}/tokenizer"]]
            given = [f"--config.corpus={folder}/corpus", f"--config.tokenizer={folder}/tokenizer"]
            chain.append(["tokenize", *given, *store, f"--workdir={folder}/store"])
            for words in chain:
                subprocess.run(command(*words), cwd=ROOT, check=True, timeout=300)
        return made.returncode

    far = server.root / "bucket" / "deep"
    assert build("gs://bucket/deep", STOPPED.format(name=name, there=str(far / "corpus"))) == -signal.SIGKILL
    assert not (far / "corpus" / "manifest.json").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert build("gs://bucket/deep") == build(str(tmp_path)) == 0
    for part in ("corpus", "tokenizer", "store"):
        names = [name for name in files(tmp_path / part) if name != ".lock"]
        assert files(far / part) == names
        for name in names:
            if name not in ("manifest.json", "stage.json"):
                assert (far / part / name).read_bytes() == (tmp_path / part / name).read_bytes(), name
    count = (
        "import sys; from ctllm_jax.data.store import open_store; print(open_store(sys.argv[1]).size('train', 'en'))"
    )
    sizes = [
        subprocess.check_output([sys.executable, "-c", count, folder], cwd=ROOT, text=True)
        for folder in ("gs://bucket/deep/store", str(tmp_path / "store"))
    ]
    assert sizes[0] == sizes[1] and int(sizes[0])
