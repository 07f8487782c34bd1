"""Checkpoints on their own, without a training run: what is kept, what is damaged, what a full disk does."""

import builtins
import dataclasses
import errno
import itertools
import json
import pathlib
import shutil
import subprocess
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax import checkpoint, processes
from ctllm_jax.checkpoint import CheckpointConfig, Checkpoints, checksums
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.status import status_of
from ctllm_jax.restore import find_step, load_params, restore_newest

POLICY = CheckpointConfig(every=1, minutes=0.0, kept=100, keep_every=0, keep_best=0)
RECORD = {"ledger": {"zh": 7}, "rates": []}


def mesh(*shape: int) -> Mesh:
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("a", "b"), auto, devices=jax.devices()[: int(np.prod(shape))])


def state(step: int, layout: Mesh, rows: int = 64) -> tuple[dict, tuple]:
    """(params, optimizer) that differ from step to step, spread over both axes."""
    random = np.random.default_rng(step)

    def put(shape, spec, dtype):
        array = (100 * random.normal(size=shape)).astype(dtype)
        return jax.device_put(jnp.asarray(array), NamedSharding(layout, PartitionSpec(*spec)))

    params = {"embed": put((rows, 128), ("a", "b"), np.float32), "norm": put((16,), (), np.float32)}
    moments = {"mu": put((rows, 128), ("b", "a"), np.float32), "half": put((8, 8), ("a",), jnp.bfloat16)}
    return params, (moments, put((), (), np.int32))


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(run, steps, losses=None, **policy) -> None:
    layout = mesh(4, 2)
    checkpoints = Checkpoints(run, dataclasses.replace(POLICY, **policy), ask_every=1)
    for step in steps:
        held_out = {"loss": losses[step], "accuracy": 1 / losses[step]} if step in (losses or {}) else None
        checkpoints.save(step, *state(step, layout), {**RECORD, "step": step}, held_out)
    checkpoints.close()


def newest(run, layout: Mesh | None = None):
    return restore_newest(run, *like(state(0, layout or mesh(4, 2))))


def assert_is_step(restored, step: int) -> None:
    assert restored.step == restored.record["step"] == step
    expected = state(step, mesh(4, 2))
    jax.tree.map(np.testing.assert_array_equal, (restored.params, restored.optimizer), expected)


def steps_in(run) -> list[int]:
    return sorted(ocp.utils.checkpoint_steps((pathlib.Path(run) / "checkpoints").absolute()))


# ---- What is saved and kept


@pytest.mark.parametrize("layout", [(4, 2), (1, 1), (2, 4), (8, 1)])
def test_what_was_saved_is_read_back_on_any_mesh(tmp_path, layout):
    save(tmp_path, [3])
    restored = newest(tmp_path, mesh(*layout))
    assert_is_step(restored, 3)
    assert restored.params["embed"].sharding.mesh.devices.shape == layout


def test_a_record_says_what_was_when_it_was_saved(tmp_path, monkeypatch):
    write, learned = ocp.JsonCheckpointHandler._save_fn, threading.Event()

    async def late(*arguments):  # as on a slow storage
        learned.wait(20)
        await write(*arguments)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", late)
    checkpoints = Checkpoints(tmp_path, POLICY, ask_every=1)
    ledger = {"zh": 7}
    checkpoints.save(1, *state(1, mesh(4, 2)), {**RECORD, "ledger": ledger, "step": 1})
    ledger["zh"] = 8  # the next step, while the background writes
    learned.set()
    checkpoints.close()
    assert newest(tmp_path).record["ledger"] == {"zh": 7}


def test_parameters_are_read_as_another_dtype(tmp_path):
    save(tmp_path, [3])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), state(3, mesh(2, 4))[0]
    )
    assert find_step(tmp_path, None) == 3
    params = load_params(tmp_path, wanted, 3)
    expected = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), state(3, mesh(4, 2))[0])
    jax.tree.map(np.testing.assert_array_equal, params, expected)


LOSSES = {step: loss for step, loss in zip(range(1, 11), (9, 2, 8, 7, 3, 6, 5, 5.5, float("nan"), 4), strict=True)}


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"kept": 2}, [9, 10]),
        ({"kept": 1, "keep_every": 4}, [4, 8, 10]),
        ({"kept": 1, "keep_best": 2}, [2, 5, 10]),
        ({"kept": 2, "keep_every": 3, "keep_best": 1}, [2, 3, 6, 9, 10]),
        ({"kept": 1, "keep_best": 2, "best": "highest loss"}, [1, 3, 10]),
        ({"kept": 1, "keep_best": 2, "best": "highest accuracy"}, [2, 5, 10]),
    ],
)
def test_kept_are_the_newest_and_every_nth_and_the_best(tmp_path, policy, kept):
    save(tmp_path, range(1, 7), LOSSES, **policy)
    save(tmp_path, range(7, 11), LOSSES, **policy)  # the figures of the first part are read from the disk
    assert steps_in(tmp_path) == kept


def test_a_step_that_was_not_evaluated_is_not_among_the_best(tmp_path):
    save(tmp_path, range(1, 7), {1: 3.0, 3: 1.0, 4: 2.0}, kept=1, keep_best=2)
    assert steps_in(tmp_path) == [3, 4, 6]


def test_a_step_that_was_not_evaluated_is_no_cause_for_a_warning(tmp_path, caplog):
    save(tmp_path, (1, 2), {1: 2.0}, keep_best=1)
    assert not [message for message in caplog.messages if "metric" in message]  # others may be of a slow disk


def test_of_equally_good_ones_the_newer_stay(tmp_path):
    save(tmp_path, range(1, 7), {1: 2.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 3.0, 6: 3.0}, kept=1, keep_best=2)
    assert steps_in(tmp_path) == [3, 4, 6]


def test_the_metric_of_the_best_may_change_on_resume_and_the_best_is_told(tmp_path):
    save(tmp_path, range(1, 6), {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0})  # 1/loss is the accuracy
    checkpoints = Checkpoints(
        tmp_path, dataclasses.replace(POLICY, kept=1, keep_best=1, best="lowest accuracy"), ask_every=1
    )
    checkpoints.save(6, *state(6, mesh(4, 2)), RECORD, {"loss": 2.5, "accuracy": 0.4}, wait=True)
    assert checkpoints.best() == (1, 0.2)
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 6]
    for step, loss in ((1, 5.0), (6, 2.5)):
        figures = json.loads((tmp_path / "checkpoints" / str(step) / "metrics" / "metrics").read_text())
        assert figures == {"loss": loss, "accuracy": 1 / loss}


@pytest.mark.parametrize(
    "best", ["loss", "least loss", "lowest los", "highest evaluation_seconds", "lowest grad_norm", ""]
)
def test_a_metric_that_is_not_told_of_held_out_data_is_refused(best):
    with pytest.raises(ValueError, match="is neither 'lowest METRIC' nor 'highest METRIC' with a metric of held-out"):
        dataclasses.replace(POLICY, best=best)


def test_a_metric_that_this_runs_looks_do_not_give_is_refused_where_the_best_are_kept():
    policy = dataclasses.replace(POLICY, keep_best=1, best="lowest loss/code")
    policy.check_known({"loss": 1.0, "loss/code": 1.0})
    with pytest.raises(UserError, match=r"keep_best goes by 'loss/code', which .*; they have: loss, loss/zh\. Set"):
        policy.check_known({"loss/zh": 1.0, "loss": 1.0})
    with pytest.raises(UserError, match="they have: nothing"):
        policy.check_known({})
    dataclasses.replace(policy, keep_best=0).check_known({})


def test_a_checkpoint_is_due_by_steps_or_by_the_clock(tmp_path, monkeypatch):
    clock = itertools.count(0, 25)  # seconds; one look at the clock a step, one at each save
    monkeypatch.setattr(checkpoint, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    checkpoints = Checkpoints(tmp_path, dataclasses.replace(POLICY, every=4, minutes=1.0), ask_every=1)
    saved = []
    for step in range(1, 13):
        if checkpoints.due(step):
            saved.append(step)
            checkpoints.save(step, *state(step, mesh(1, 1)), RECORD, wait=True)
    checkpoints.close()
    # 60 s are over at the third look after a save; steps 4, 8 and 12 are due anyway.
    assert saved == [3, 4, 7, 8, 11, 12]


def test_the_clock_is_process_0s(tmp_path, monkeypatch):
    """Of two processes only this one is here; what the other says is given."""
    checkpoints = Checkpoints(tmp_path, dataclasses.replace(POLICY, every=100, minutes=1e-9), ask_every=1)
    others = {"late": [False, False, True], "due": [False, True, True], "writing": [True, True, True]}
    for other, (first, second) in {"late": (False, True), "due": (True, True), "writing": (False, False)}.items():
        monkeypatch.setattr(checkpoint, "votes", lambda *own, said=others[other]: np.array([said, own]))
        assert checkpoints.due(1) is first
        monkeypatch.setattr(checkpoint, "votes", lambda *own, said=others[other]: np.array([own, said]))
        assert checkpoints.due(1) is second
    checkpoints.close()


def test_checksums_do_not_depend_on_the_layout_and_tell_a_bit():
    sums = checksums(state(1, mesh(4, 2)))
    assert sums == checksums(state(1, mesh(1, 8))) and set(sums) == {"0/embed", "0/norm", "1/0/mu", "1/0/half", "1/1"}
    params, rest = state(1, mesh(4, 2))
    params["embed"] = params["embed"].at[3, 5].set(jnp.nextafter(params["embed"][3, 5], jnp.inf))
    changed = checksums((params, rest))
    assert {name for name in sums if sums[name] != changed[name]} == {"0/embed"}


# ---- Damage


def largest(folder: pathlib.Path) -> pathlib.Path:
    """The file of an item that holds most of its arrays."""
    return max((file for file in folder.glob("**/d/*") if file.is_file()), key=lambda file: file.stat().st_size)


def cut(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: pathlib.Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def half_deleted(folder: pathlib.Path) -> None:
    for file in sorted(file for file in folder.rglob("*") if file.is_file())[::2]:
        file.unlink()


DAMAGE = {
    "array file truncated": (lambda step: cut(largest(step / "params")), "params"),
    "array file emptied": (lambda step: largest(step / "optimizer").write_bytes(b""), "optimizer"),
    "array file gone": (lambda step: largest(step / "params").unlink(), "params"),
    "one bit of an array file": (lambda step: flip(largest(step / "params")), "params"),
    "manifest truncated": (lambda step: cut(step / "params" / "manifest.ocdbt"), "params"),
    "manifest gone": (lambda step: (step / "optimizer" / "manifest.ocdbt").unlink(), "optimizer"),
    "names of arrays gone": (lambda step: (step / "params" / "_METADATA").unlink(), "params/_METADATA is missing"),
    "names of arrays truncated": (lambda step: cut(step / "params" / "_METADATA"), "params/_METADATA is not valid"),
    "an item gone": (lambda step: shutil.rmtree(step / "optimizer"), "optimizer/_METADATA is missing"),
    "commit marker gone": (lambda step: (step / "commit_success.txt").unlink(), "commit_success.txt"),
    "metadata gone": (lambda step: (step / "_CHECKPOINT_METADATA").unlink(), "_CHECKPOINT_METADATA is missing"),
    "metadata truncated": (lambda step: cut(step / "_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA is not valid JSON"),
    "record gone": (lambda step: (step / "record" / "metadata").unlink(), "record/metadata is missing"),
    "record emptied": (lambda step: (step / "record" / "metadata").write_text(""), "record/metadata is not valid"),
    "record of nothing": (
        lambda step: (step / "record" / "metadata").write_text("{}"),
        "lacks checksums, ledger, rates",
    ),
    "loss truncated": (lambda step: cut(step / "metrics" / "metrics"), "metrics/metrics is not valid JSON"),
    "half deleted": (half_deleted, ""),
    "an empty folder": (lambda step: (shutil.rmtree(step), step.mkdir()), "commit_success.txt"),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run directory with checkpoints of steps 1, 2 and 3."""
    run = tmp_path_factory.mktemp("three")
    save(run, [1, 2, 3], {1: 1.0, 2: 2.0, 3: 3.0}, keep_best=100)
    return run


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_moved_aside_loudly_and_the_one_before_taken(three, tmp_path, capsys, damage):
    harm, where = DAMAGE[damage]
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    harm(folder / "3")
    assert_is_step(newest(tmp_path), 2)
    said = capsys.readouterr().err
    assert said.count("IS DAMAGED") == 1 and f"THE CHECKPOINT OF STEP 3 IS DAMAGED: {folder / '3'}" in said
    assert where in said and f"Moved to {folder / '3.damaged'}" in said
    # It is still there, is met once only, and the step can be saved again.
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3.damaged"]
    assert_is_step(newest(tmp_path), 2)
    assert "DAMAGED" not in capsys.readouterr().err
    save(tmp_path, [3], {3: 3.0}, keep_best=100)
    assert_is_step(newest(tmp_path), 3)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "3.damaged"]
    harm(folder / "3")
    assert_is_step(newest(tmp_path), 2)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3.damaged", "3.damaged-2"]


def test_two_damaged_checkpoints_cost_two_steps_back(three, tmp_path, capsys):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    cut(largest(tmp_path / "checkpoints" / "3" / "params"))
    (tmp_path / "checkpoints" / "2" / "commit_success.txt").unlink()
    assert_is_step(newest(tmp_path), 1)
    assert capsys.readouterr().err.count("IS DAMAGED") == 2


def test_where_none_is_whole_the_run_does_not_start_over(three, tmp_path):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    for step in "123":
        cut(largest(tmp_path / "checkpoints" / step / "params"))
    for _ in range(2):  # nor does it when it is started again
        with pytest.raises(UserError, match=r"no whole checkpoint is left; damaged: 1.damaged, 2.damaged, 3.damaged"):
            newest(tmp_path)


def test_a_run_without_checkpoints_starts(tmp_path):
    assert newest(tmp_path) is None


def test_another_models_checkpoint_is_not_damaged(three, tmp_path, capsys):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"3/params holds other arrays .*embed: \(64, 128\) there, \(32, 128\) wanted"):
        restore_newest(tmp_path, *like(state(0, mesh(4, 2), rows=32)))
    params, rest = like(state(0, mesh(4, 2)))
    with pytest.raises(UserError, match=r"1 differ: bias: not there, \(16,\) wanted.*not damaged"):
        restore_newest(tmp_path, {**params, "bias": params["norm"]}, rest)
    assert steps_in(tmp_path) == [1, 2, 3] and "DAMAGED" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PermissionError(errno.EACCES, "no"), 2),
        (ValueError("PERMISSION_DENIED: no"), 2),
        (OSError(errno.EIO, "no"), 69),
        (ValueError("UNAVAILABLE: no"), 69),
        (MemoryError("no"), 69),
    ],
)
def test_storage_that_does_not_answer_is_not_damage(three, tmp_path, monkeypatch, error, status):
    """The error is raised in place of reading."""
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
    with pytest.raises(UserError, match="3/params cannot be read now .*no.*nothing was changed") as raised:
        newest(tmp_path)
    assert status_of(raised.value) == status
    assert steps_in(tmp_path) == [1, 2, 3]


def test_a_reader_says_what_is_damaged_and_moves_nothing(three, tmp_path):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    cut(largest(tmp_path / "checkpoints" / "3" / "params"))
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(3, mesh(4, 2))[0]
    )
    with pytest.raises(UserError, match=r"the checkpoint of step 3 is damaged: .*step: \[1, 2\]"):
        load_params(tmp_path, wanted, find_step(tmp_path, None))
    assert steps_in(tmp_path) == [1, 2, 3]
    expected = state(2, mesh(4, 2))[0]
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, wanted, 2), expected)


# ---- A disk that fails


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB in memory: mounting it needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, capture_output=True)
    if made.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(disk: pathlib.Path) -> pathlib.Path:
    ballast = disk / "ballast"
    room = shutil.disk_usage(disk).free
    ballast.write_bytes(b"x" * (room - 16 * 1024))
    return ballast


def test_a_full_disk_is_waited_for_and_what_is_there_stays(small_disk, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "PAUSES", (0, 0, 0, 0))
    layout = mesh(4, 2)
    checkpoints = Checkpoints(small_disk, dataclasses.replace(POLICY, kept=1), ask_every=1)
    checkpoints.save(1, *state(1, layout), {**RECORD, "step": 1}, wait=True)
    ballast = fill(small_disk)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: ballast.unlink() if failures() == 2 else None)

    def failures() -> int:
        return checkpoints._failures

    checkpoints.save(2, *state(2, layout), {**RECORD, "step": 2}, wait=True)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert len(said) == 2 and all("step 2 could not be written (" in line and "No space left" in line for line in said)
    assert "attempt 2 in 0 s" in said[0] and "attempt 3 in 0 s" in said[1]
    checkpoints.close()
    assert sorted(path.name for path in (small_disk / "checkpoints").iterdir()) == ["2"]
    assert_is_step(newest(small_disk), 2)


def test_a_disk_that_stays_full_ends_the_run_with_its_checkpoints(small_disk, monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSES", (0, 0))
    layout = mesh(4, 2)
    checkpoints = Checkpoints(small_disk, dataclasses.replace(POLICY, kept=1), ask_every=1)
    checkpoints.save(1, *state(1, layout), {**RECORD, "step": 1}, wait=True)
    fill(small_disk)
    with pytest.raises(UserError, match=r"the checkpoint of step 2 .*No space left.*there: \[1\]\. Make room"):
        checkpoints.save(2, *state(2, layout), RECORD, wait=True)
    assert steps_in(small_disk) == [1]
    assert_is_step(newest(small_disk), 1)
    Checkpoints(small_disk, POLICY, ask_every=1)  # what threads of the failed save wrote after all is cleared away
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["1"]


def test_a_save_that_failed_in_the_background_is_made_up_for_at_a_later_step(tmp_path, monkeypatch, capsys):
    """Writing the record raises ENOSPC once, in place of the disk."""
    monkeypatch.setattr(checkpoint, "PAUSES", (0,))
    opened, broken = builtins.open, ["once"]

    def open_unless_full(path, *args, **kwargs):
        if broken and str(path).endswith("record.orbax-checkpoint-tmp/metadata"):
            broken.pop()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_unless_full)
    layout, saved = mesh(4, 2), []
    checkpoints = Checkpoints(tmp_path, dataclasses.replace(POLICY, every=4), ask_every=1)
    for step in range(1, 8):
        if checkpoints.due(step):
            saved.append(step)
            checkpoints.save(step, *state(step, layout), {**RECORD, "step": step})
        while checkpoints._manager and checkpoints._manager.is_saving_in_progress():
            time.sleep(0.01)
    checkpoints.close()
    assert not broken
    assert saved == [4, 6]  # noticed at step 5, due at the next look
    assert "the checkpoint of step 4 could not be written" in capsys.readouterr().err
    assert steps_in(tmp_path) == [6]
    assert_is_step(newest(tmp_path), 6)


def test_messages_of_the_storage_are_a_line():
    try:
        try:
            raise ValueError("RESOURCE_EXHAUSTED: full [tensorstore_spec='{pages of it}']\nmore")
        except ValueError as cause:
            raise RuntimeError("Encountered an error") from cause
    except RuntimeError as error:
        assert checkpoint.message(error) == "RESOURCE_EXHAUSTED: full"


@pytest.mark.parametrize(("mistaken", "status"), [(True, 2), (False, 69)])
def test_an_error_of_one_is_an_error_of_all(monkeypatch, mistaken, status):
    """Of two processes only this one is here; what the other says is given."""
    monkeypatch.setattr(processes, "votes", lambda *own: np.array([own, [True, mistaken]]))
    with pytest.raises(UserError, match="process 1 failed, and says why") as raised:
        processes.together(lambda: 1)
    assert status_of(raised.value) == status
    with pytest.raises(KeyError):
        processes.together(lambda: {}["mine"])
