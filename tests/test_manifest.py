"""Stages: folders that are claimed, resumed, finished."""

import subprocess
import sys

import pytest

from ctllm_jax.common import manifest
from ctllm_jax.common.errors import UserError


def names(folder) -> list[str]:
    """Everything in a folder but a stage's lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_stage_is_claimed_resumed_and_done(tmp_path, capsys):
    folder = tmp_path / "stage"

    def open_it():
        return manifest.open_stage("build", 1, folder, {"seed": 1, "sizes": (1, 2)}, ["abc"])

    stage = open_it()
    assert not stage.done and names(folder) == ["stage.json"]
    (folder / "part").touch()
    (folder / ".half.tmp").touch()
    stage = open_it()  # cut short: taken up, without what a killed writer left
    assert not stage.done and names(folder) == ["part", "stage.json"]
    with pytest.raises(UserError, match="not a finished folder of `ctllm build`"):
        manifest.read_result(folder, "build")
    assert stage.finish({"rows": 3}) == {"rows": 3} and stage.done
    again = open_it()
    assert again.done and again.result == {"rows": 3} and "already finished" in capsys.readouterr().err
    assert manifest.read_result(folder, "build") == (stage.fingerprint, {"rows": 3})
    assert manifest.stage_fingerprint(folder, "build") == stage.fingerprint
    with pytest.raises(UserError, match="'?build'?"):
        manifest.read_result(folder, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"seed": 2, "deep": {"beta": 0.5}}}, r"settings\.seed: 1 there, 2 now"),
        ({"settings": {"seed": 1, "deep": {"beta": 0.1}}}, r"settings\.deep\.beta: 0\.5 there, 0\.1 now"),
        ({"settings": {"seed": 1}}, r"settings\.deep: .* there, null now"),
        ({"inputs": {"corpus": "def"}}, r'inputs\.corpus: "abc" there, "def" now'),
        ({"name": "other"}, "holds a 'build' run"),
        ({"version": 2}, "version: 1 there, 2 now"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_of_another_run_is_refused_and_the_difference_named(tmp_path, change, message, finished):
    claim = {
        "name": "build",
        "version": 1,
        "workdir": tmp_path,
        "settings": {"seed": 1, "deep": {"beta": 0.5}},
        "inputs": {"corpus": "abc"},
    }
    stage = manifest.open_stage(**claim)
    if finished:
        stage.finish({})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        manifest.open_stage(**claim | change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_stage_goes_on_where_only_what_is_asked_has_changed(tmp_path, capsys):
    def open_it(asked, seed=1):
        return manifest.open_stage("build", 1, tmp_path, {"seed": seed}, {"fingerprint": "abc"}, asked=asked)

    first = open_it({"rows": 3})
    first.finish({})
    assert open_it({"rows": 3}).done and "goes on" not in capsys.readouterr().err
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="settings.seed: 1 there, 2 now\\)"):
        open_it({"rows": 4}, seed=2)
    with pytest.raises(UserError, match="made from other inputs"):
        manifest.open_stage("build", 1, tmp_path, {"seed": 1}, {"fingerprint": "def"}, asked={"rows": 4})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    again = open_it({"rows": 4})
    assert not again.done and again.fingerprint != first.fingerprint and names(tmp_path) == ["stage.json"]
    assert f"build: {tmp_path} goes on with other settings (rows: 3 there, 4 now)" in capsys.readouterr().err
    again.finish({"rows": 4})
    assert open_it({"rows": 4}).done and not open_it({"rows": 3}).done


def test_a_stage_that_another_process_works_on_does_not_change(tmp_path):
    asked = "manifest.open_stage('build', 1, {!r}, {{}}, {{}}, asked={})".format
    program = f"import sys; from ctllm_jax.common import manifest; {asked(str(tmp_path), 1)}; print(flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{program}; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    claim = (tmp_path / "stage.json").read_bytes()
    with pytest.raises(UserError, match="another process is working here"):
        manifest.open_stage("build", 1, tmp_path, {}, {}, asked=2)
    assert (tmp_path / "stage.json").read_bytes() == claim
    holder.communicate()


def test_a_folder_is_worked_on_by_one_process_at_a_time(tmp_path):
    def program(then: str) -> list[str]:
        claim = f"manifest.open_stage('build', 1, {str(tmp_path)!r}, {{}}, {{}})"
        return [sys.executable, "-c", f"import sys; from ctllm_jax.common import manifest; {claim}; {then}"]

    holder = subprocess.Popen(
        program("print(flush=True); sys.stdin.read()"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    with pytest.raises(UserError, match="another process is working here"):
        manifest.open_stage("build", 1, tmp_path, {}, {})
    holder.kill()  # however it ends, the folder is free again
    holder.communicate()
    stage = manifest.open_stage("build", 1, tmp_path, {}, {})
    assert not stage.done
    assert subprocess.run(program(""), capture_output=True, check=False).returncode == 1
    stage.finish({})
    assert subprocess.run(program(""), capture_output=True, check=False).returncode == 0  # reading is for all


def test_fingerprints_do_not_depend_on_key_order_or_on_list_type():
    assert manifest.fingerprint({"a": 1, "b": (2, 3)}) == manifest.fingerprint({"b": [2, 3], "a": 1})
    assert manifest.fingerprint({"a": 1}) != manifest.fingerprint({"a": 1.5})


def test_a_second_process_is_kept_out_of_an_unfinished_folder(tmp_path):
    manifest.open_stage("build", 1, tmp_path, {}, [])
    second = (
        "from ctllm_jax.common import errors, manifest\n"
        "try:\n"
        f"    manifest.open_stage('build', 1, {str(tmp_path)!r}, {{}}, [])\n"
        "except errors.UserError as error:\n"
        "    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True, check=True).stdout
    assert "another process is working here" in said
