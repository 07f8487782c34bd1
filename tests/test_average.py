"""The moving average of the parameters: that of numpy, without what was skipped, and the model wherever one is read."""

# ruff: noqa: F811 (fixtures)
import dataclasses
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_lora import config_of as adapter_config
from test_lora import origin  # noqa: F401 (a fixture)
from test_optim import STEADY, assert_equal, clock, compiled_step, slope
from tiny_models import tiny_config
from tiny_objectives import dpo
from tiny_runs import (  # noqa: F401 (fixtures too)
    ROOT,
    STEPS,
    assert_close_entries,
    assert_same_run,
    compiled_once,
    config_of,
    entries,
    params_of,
    stopped,
    stores,
)
from tiny_stores import train_values

from configs import pretrain
from ctllm_jax import train
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.data.store import open_store
from ctllm_jax.evaluate.in_loop import HeldOut
from ctllm_jax.hardware import parse_slice
from ctllm_jax.lora import merged
from ctllm_jax.objectives import make_objective
from ctllm_jax.optim import OptimizerConfig, make_optimizer
from ctllm_jax.plan import arithmetic
from ctllm_jax.sharding import MeshConfig, make_mesh
from ctllm_jax.step import abstract_state, joined_state, state_shardings
from ctllm_jax.train_config import TrainConfig

HALF_LIFE = 3
CHANGE = {"optimizer__ema_half_life": f"{HALF_LIFE} steps"}


def average_of(history: list[dict]) -> dict:
    """The mean of parameters, oldest first, each weighing half of what the one HALF_LIFE updates later does; fp64."""
    weights = 2.0 ** (np.arange(len(history)) / HALF_LIFE)
    return jax.tree.map(
        lambda *leaves: np.average(np.stack(leaves).astype(np.float64), axis=0, weights=weights), *history
    )


def assert_is_average(average: dict, history: list[dict]) -> None:
    def same(ours, theirs):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-7)

    jax.tree.map(same, jax.device_get(average), average_of(history))


# ---- A step


def test_every_update_goes_in_and_no_skipped_step():
    step, state = compiled_step(6.0, f"{HALF_LIFE} steps")
    assert_equal(state.average, state.params)
    history = []
    for total in (np.nan, *STEADY, 300.0, 2.9, np.inf, 3.1):
        before = state
        state, _ = step(state, None, slope(total))
        if total in (np.nan, 300.0, np.inf):
            assert int(state.skipped) == int(before.skipped) + 1
            assert_equal(state.average, before.average)
        else:
            history.append(jax.device_get(state.params))
            assert_is_average(state.average, history)
    assert len(history) == 6


def test_an_average_lies_as_the_parameters_do_and_without_one_there_is_nothing():
    config, mesh = tiny_config(), make_mesh(MeshConfig(1, 2, 2, 2), jax.devices())
    for half_life in ("", "2 epochs"):
        settings = dataclasses.replace(build(OptimizerConfig, train_values("")["optimizer"]), ema_half_life=half_life)
        optimizer = make_optimizer(settings, config, clock(10))
        state, layout = abstract_state(config, optimizer, mesh), state_shardings(config, optimizer, mesh)
        assert optimizer.ema_half_life == (20 if half_life else 0)
        if half_life:
            assert state.average == state.params and layout.average == layout.params
            assert len({leaf.sharding.spec for leaf in jax.tree.leaves(state.average)}) > 2
        else:
            assert state.average is None and layout.average is None


@pytest.mark.parametrize("half_life", ["", "3 steps"])
def test_a_state_is_saved_as_a_model_and_what_going_on_takes(half_life):
    step, state = compiled_step(6.0, half_life)
    state, _ = step(state, None, slope(3))
    state, _ = step(state, None, slope(3))
    assert state.model is (state.average if half_life else state.params)
    again = joined_state(state.model, state.rest)
    assert_equal(again, state)
    assert jax.tree.structure(again) == jax.tree.structure(state)


def test_a_plan_counts_it():
    values = pretrain.get_config("ct_llm_2b@v5e:16x16")
    target, found = parse_slice("v5e:16x16"), {}
    for half_life in ("", "2000 steps"):
        values.optimizer.ema_half_life = half_life
        config = build(TrainConfig, values.to_dict())
        found[half_life] = arithmetic.arguments(config, target)
    assert "average" not in found[""]
    assert found["2000 steps"] == {**found[""], "average": found[""]["parameters"]}


# ---- A run


@pytest.fixture(scope="module")
def averaged(stores, tmp_path_factory):
    """(run directory, result) of an undisturbed run with an average, every step of which is saved."""
    workdir = tmp_path_factory.mktemp("runs") / "averaged"
    change = {"checkpoints__every": 1, "checkpoints__kept": STEPS}
    return workdir, train.run(config_of(stores["pretrain"], **CHANGE, **change), str(workdir))


def saved(workdir, step: int) -> tuple[dict, dict]:
    """(average, parameters) of a checkpoint."""
    items = []
    for item in ("params", "optimizer"):
        with ocp.PyTreeCheckpointer() as reader:
            folder = (workdir / "checkpoints" / str(step) / item).resolve()
            names = reader.metadata(folder).item_metadata.tree
            host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            items.append(reader.restore(folder, restore_args=host))
    return items[0], items[1][-1]


@pytest.mark.slow
def test_the_average_of_a_run_is_that_of_its_weights_and_is_what_readers_get(averaged, stores):
    workdir, result = averaged
    history = []
    for step in range(1, STEPS + 1):
        average, params = saved(workdir, step)
        history.append(params)
        assert_is_average(average, history)
    away = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (average, params)), strict=True)]
    assert max(away) > 1e-3
    loaded = params_of(workdir)
    assert_equal(loaded, average)
    config = config_of(stores["pretrain"])
    mesh, objective = make_mesh(config.mesh), make_objective(config.objective, config.model, 2)
    evaluate = HeldOut(config.eval, open_store(stores["pretrain"]), 8, 1, True, mesh, objective).evaluate
    with jax.set_mesh(mesh):
        held = {
            name: evaluate(jax.device_put(tree), None)["loss"] for name, tree in (("average", average), ("raw", params))
        }
    assert result["validation"]["loss"] == pytest.approx(held["average"], rel=1e-6)
    assert abs(held["raw"] / held["average"] - 1) > 1e-3


@pytest.mark.slow
def test_training_is_not_touched_by_it_and_a_half_life_in_tokens_is_one_in_steps(averaged, stores, tmp_path):
    train.run(config_of(stores["pretrain"]), str(tmp_path / "plain"))
    for ours, theirs in zip(entries(averaged[0], "train"), entries(tmp_path / "plain", "train"), strict=True):
        for name in ours.keys() - {"kind"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    again = config_of(stores["pretrain"], optimizer__ema_half_life=f"{8 * 32 * HALF_LIFE} tokens")
    assert train.run(again, str(averaged[0])) == averaged[1]  # no other run
    for other in ("", "4 steps"):
        with pytest.raises(UserError, match="ema_half_life"):
            train.run(config_of(stores["pretrain"], optimizer__ema_half_life=other), str(averaged[0]))


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(averaged, stores, tmp_path):
    workdir = tmp_path / "run"
    program = (
        "import sys; sys.path.insert(0, 'tests'); import conftest, tiny_runs; "
        f"tiny_runs.killed_run({str(stores['pretrain'])!r}, {str(workdir)!r}, **{CHANGE!r})"
    )
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    train.run(config_of(stores["pretrain"], **CHANGE), str(workdir))
    assert_same_run(workdir, averaged[0])
    for ours, theirs in zip(saved(workdir, STEPS), saved(averaged[0], STEPS), strict=True):
        assert_equal(ours, theirs)


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_average(averaged, stores, tmp_path, monkeypatch):
    stopped(monkeypatch, 5, config_of(stores["pretrain"], **CHANGE), tmp_path / "run")
    other = config_of(stores["pretrain"], **CHANGE, mesh__data=1, mesh__fsdp=2, mesh__tensor=2, mesh__context=2)
    train.run(other, str(tmp_path / "run"))
    assert_close_entries(tmp_path / "run", averaged[0], rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        params_of(tmp_path / "run"),
        params_of(averaged[0]),
    )


@pytest.mark.slow
def test_dpo_starts_from_the_average_and_its_reference_is_that(averaged, stores, tmp_path):
    config = config_of(
        stores["preference"],
        model=None,
        init_from=str(averaged[0]),
        objective=dataclasses.asdict(dpo(reference="live")),
        optimizer__learning_rate=1e-3,
        duration="6 steps",
        eval__every=3,
        **CHANGE,
    )
    train.run(config, str(tmp_path / "run"))
    first, *_, last = entries(tmp_path / "run", "eval")
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-6) and first["margin"] == 0
    assert last["loss"] < first["loss"]
    average, params = saved(tmp_path / "run", 6)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (average, params)), strict=True))
    assert_equal(params_of(tmp_path / "run"), average)


@pytest.mark.slow
def test_the_average_of_adapters_is_merged(stores, tmp_path, origin):
    values = dataclasses.asdict(adapter_config(open_store(stores["chat"]), origin))
    values["optimizer"]["ema_half_life"] = f"{HALF_LIFE} steps"
    values["checkpoints"] |= {"every": 1, "kept": 6}
    config = build(TrainConfig, values)
    train.run(config, str(tmp_path / "run"))
    parts = [saved(tmp_path / "run", step) for step in range(1, 7)]
    assert_is_average(parts[-1][0], [params for _, params in parts])
    expected = merged(config.lora, parts[-1][0], params_of(tmp_path / "run" / "base"))
    found = params_of(tmp_path / "run")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, expected)
