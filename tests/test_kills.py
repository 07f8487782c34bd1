"""Twenty steps are ten, a SIGKILL somewhere in a save, and the rest: to the last bit."""

import contextlib
import hashlib
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from kill_points import POINTS, arm
from tiny_runs import compiled_once, config_of, entries  # noqa: F401 (a fixture that applies here too)
from tiny_stores import tiny_store

from ctllm_jax import train
from ctllm_jax.common.files import read_json

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = {"duration": "20 steps", "checkpoints__every": 5, "checkpoints__kept": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("stores") / "store").folder


def with_batches(monkeypatch, workdir, store) -> dict[int, str]:
    """Trains; returns what was learned from at each step, as hashes."""
    seen, prefetched = {}, train.prefetched

    def watched(stream, start, stop, mesh):
        for step, batch in enumerate(prefetched(stream, start, stop, mesh), start + 1):
            seen[step] = hashlib.sha256(
                b"".join(np.asarray(batch[name]).tobytes() for name in sorted(batch))
            ).hexdigest()
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(train, "prefetched", watched)
        train.run(config_of(store, **SETTINGS), str(workdir))
    return seen


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    """(run directory, batches) of twenty steps in one go."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        return workdir, with_batches(patch, workdir, store)


def saved(workdir, step: int = 20) -> dict:
    """Everything in a checkpoint, whatever devices it was saved from."""
    folder = epath.Path(workdir).absolute() / "checkpoints" / str(step)
    arrays = {}
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        for item in ("params", "optimizer"):
            names = handler.metadata(folder / item).tree
            host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            arrays[item] = handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=host))
    return {**arrays, "record": read_json(folder / "record" / "metadata")}


def assert_same_bits(workdir, other) -> None:
    ours, theirs = saved(workdir), saved(other)
    assert ours.pop("record") == theirs.pop("record")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert entries(workdir) == entries(other)
    assert [entry["step"] for entry in entries(workdir, "train")] == list(range(1, 21))
    assert read_json(workdir / "manifest.json")["result"] == read_json(other / "manifest.json")["result"]


def killed_run(store: str, workdir: str, point: str) -> None:
    arm(point)
    train.run(config_of(store, **SETTINGS), workdir)


@pytest.mark.parametrize("point", [point for point in POINTS if "its" not in point.split()])
def test_a_run_killed_in_a_save_ends_in_the_same_bits(undisturbed, store, tmp_path, monkeypatch, capsys, point):
    workdir = tmp_path / "run"
    program = (
        "import sys; sys.path.insert(0, 'tests'); import conftest, test_kills; "
        f"test_kills.killed_run({str(store)!r}, {str(workdir)!r}, {point!r})"
    )
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False, timeout=600)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-3000:]
    assert not (workdir / "manifest.json").exists()
    batches = with_batches(monkeypatch, workdir, store)
    first = 10 if POINTS[point][2] else 5
    assert f"train: resumed at step {first}" in capsys.readouterr().err
    assert batches == {step: batch for step, batch in undisturbed[1].items() if step > first}
    assert_same_bits(workdir, undisturbed[0])
    assert [path.name for path in (workdir / "checkpoints").iterdir() if ".damaged" not in path.name] == ["20"]
