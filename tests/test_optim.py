"""AdamW as CT-LLM trained: what decays, how the rate runs, and that a bad gradient changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_reference import ALIGN, assert_diagnostics, golden, preference_pairs, sft_rows, torch_names
from tiny_models import NO_REFERENCE, REFERENCE, tiny_config
from tiny_objectives import dpo, lm
from tiny_stores import batch_of

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.duration import Clock
from ctllm_jax.loading import load_model
from ctllm_jax.model import abstract_params
from ctllm_jax.objectives import make_objective
from ctllm_jax.optim import OptimizerConfig, decay_mask, make_optimizer, schedule
from ctllm_jax.sharding import MeshConfig, make_mesh
from ctllm_jax.step import start_state, state_shardings, train_step

BASE = OptimizerConfig(
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    schedule="cosine",
    warmup="10 steps",
    decay="",
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    spike_window=4,
    spike_deviations=0.0,
)


CONSTANT = dataclasses.replace(BASE, schedule="constant", warmup="0 steps")


def clock(steps: int) -> Clock:
    """A run of so many steps of 1,000 tokens, ten to an epoch."""
    return Clock(tokens=1000, epoch=10.0, run=steps)


def by_path(tree) -> dict:
    return {"/".join(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def random_params(config) -> dict:
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(config))


# ---- What decays


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"tie_embeddings": True}])
def test_every_parameter_decays_but_norm_scales(changes):
    config = tiny_config(**changes)
    mask, params = by_path(decay_mask(config)), by_path(abstract_params(config))
    assert mask.keys() == params.keys()
    assert {name for name, decays in mask.items() if not decays} == {n for n in params if n.endswith("norm")}
    assert all(isinstance(decays, bool) for decays in mask.values())


def test_with_gradients_of_zero_matrices_shrink_by_their_decay_and_norms_stay():
    config = tiny_config(qk_norm=True)
    params = random_params(config)
    optimizer = make_optimizer(CONSTANT, config, clock(100))
    update = jax.jit(optimizer.direction.update)
    found, _ = update(jax.tree.map(jnp.zeros_like, params), optimizer.direction.init(params), params)
    for name, direction in by_path(found).items():
        expected = 0 if name.endswith("norm") else 0.1 * by_path(params)[name]
        np.testing.assert_allclose(direction, expected, rtol=1e-6, atol=0, err_msg=name)


# ---- The learning rate


def rates(config: OptimizerConfig, steps: int, at: list[int]) -> list[float]:
    return [float(schedule(config, clock(steps))(step)) for step in at]


def test_the_cosine_rises_to_its_peak_and_falls_to_its_end():
    found = rates(BASE, 110, [0, 5, 10, 35, 60, 110, 200])
    middle = 1e-3 + 9e-3 * 0.5 * (1 + np.cos(np.pi * 0.25))
    np.testing.assert_allclose(found, [0, 5e-3, 1e-2, middle, 5.5e-3, 1e-3, 1e-3], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("decay", ["20%", "20 steps", "20_000 tokens", "2 epochs"])
def test_warm_up_stable_decay_falls_at_the_end_only(decay):
    config = dataclasses.replace(BASE, schedule="wsd", decay=decay)
    found = rates(config, 100, [0, 5, 10, 50, 80, 90, 100, 150])
    np.testing.assert_allclose(found, [0, 5e-3, 1e-2, 1e-2, 1e-2, 5.5e-3, 1e-3, 1e-3], rtol=1e-5, atol=1e-9)


def test_a_constant_rate_stays_at_its_peak():
    config = dataclasses.replace(BASE, schedule="constant")
    np.testing.assert_allclose(rates(config, 100, [0, 5, 10, 99]), [0, 5e-3, 1e-2, 1e-2], rtol=1e-5)


def test_a_linear_rate_falls_from_warm_up_to_end():
    config = dataclasses.replace(BASE, schedule="linear")
    found = rates(config, 110, [0, 5, 10, 60, 110, 150])
    np.testing.assert_allclose(found, [0, 5e-3, 1e-2, 5.5e-3, 1e-3, 1e-3], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_without_warm_up_the_first_update_has_the_peak_rate(name):
    config = dataclasses.replace(BASE, schedule=name, warmup="0%", decay="50%" if name == "wsd" else "")
    np.testing.assert_allclose(rates(config, 20, [0]), [1e-2], rtol=1e-6)


def test_ct_llms_schedule_has_its_published_values():
    config = dataclasses.replace(BASE, learning_rate=2e-4, final_learning_rate=2e-5, warmup="2000 steps")
    found = rates(config, 598_278, [1000, 2000, 598_278])
    np.testing.assert_allclose(found, [1e-4, 2e-4, 2e-5], rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({}, 9, "a run of 9 steps is too short for optimizer.warmup '10 steps', 10 steps: shorten them"),
        (
            {"schedule": "wsd", "decay": "60%", "warmup": "50%"},
            10,
            r"5 steps and 6 steps of decay \('60%'",
        ),
    ],
)
def test_a_schedule_longer_than_its_run_is_refused(changes, steps, message):
    with pytest.raises(UserError, match=message):
        rates(dataclasses.replace(BASE, **changes), steps, [0])


@pytest.mark.parametrize("norm", [0.0, 1e9])
def test_a_clip_norm_of_0_clips_nothing(norm):
    model = tiny_config()
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 3.0), abstract_params(model))
    optimizer = make_optimizer(dataclasses.replace(CONSTANT, clip_norm=norm), model, clock(10))
    state = optimizer.direction.init(grads)
    _, (_, moments, _) = optimizer.direction.update(grads, state, grads)
    for leaf in jax.tree.leaves(moments.mu):
        np.testing.assert_allclose(leaf, 3.0 * (1 - BASE.beta1), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, "schedule 'step' is unknown; there are: constant, cosine, linear, wsd"),
        ({"schedule": "wsd"}, "decay is for schedule wsd, which needs it"),
        ({"decay": "10%"}, "decay is for schedule wsd, which needs it; for the others leave it empty"),
        ({"warmup": "10"}, "'10' is not a duration: give a number of steps, tokens, epochs or %"),
        ({"warmup": "-1 steps"}, "is not a duration"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 must be above 0"),
        ({"final_learning_rate": -1.0}, "final_learning_rate -1.0 must not be negative"),
        ({"beta1": 1.0}, "beta1 1.0 and beta2 .* from 0 to below 1"),
        ({"epsilon": 0.0}, "epsilon 0.0 above 0"),
        ({"clip_norm": -1.0}, "0 turns each of them off"),
        ({"spike_window": 0}, "spike_window must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        build(OptimizerConfig, dataclasses.asdict(BASE) | changes)


# ---- The update


def test_updates_equal_adamw_with_clipping_in_float64():
    config = tiny_config()
    params = random_params(config)
    optimizer = make_optimizer(BASE, config, clock(50))
    state, mask = optimizer.direction.init(params), by_path(decay_mask(config))
    exact = {name: np.asarray(leaf, np.float64) for name, leaf in by_path(params).items()}
    first, second = ({name: np.zeros_like(value) for name, value in exact.items()} for _ in range(2))
    update = jax.jit(optimizer.direction.update)
    for step in range(4):
        grads = jax.tree.map(lambda p, s=step: (s + 0.5) * np.cos(100 * np.asarray(p) + s), params)
        direction, state = update(grads, state, params)
        rate = float(optimizer.rate(step))
        assert rate == pytest.approx(1e-2 * step / 10)
        params = jax.tree.map(lambda p, d, r=rate: np.asarray(p) - r * np.asarray(d), params, direction)
        flat = {name: np.asarray(leaf, np.float64) for name, leaf in by_path(grads).items()}
        norm = np.sqrt(sum((leaf**2).sum() for leaf in flat.values()))
        for name, grad in flat.items():
            grad = grad * min(1.0, 1.0 / norm)
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            ratio = first[name] / (1 - 0.9 ** (step + 1)) / (np.sqrt(second[name] / (1 - 0.95 ** (step + 1))) + 1e-8)
            exact[name] -= rate * (ratio + 0.1 * mask[name] * exact[name])
    for name, value in by_path(params).items():
        np.testing.assert_allclose(value, exact[name], rtol=0, atol=2e-6, err_msg=name)


@functools.cache
def compiled_step(deviations: float, half_life: str = ""):
    """(a step of an objective whose gradient the batch decides: the sum over parameters times `slope`, its start)."""
    config = tiny_config()
    settings = dataclasses.replace(CONSTANT, spike_deviations=deviations, ema_half_life=half_life)
    optimizer = make_optimizer(settings, config, clock(10))

    def objective(params, _, batch):
        slope = jnp.sum(batch["slope"])
        total = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(params)) * slope
        return total, {"count": jnp.sum(jnp.ones_like(batch["slope"])), "loss": total}

    compiled = jax.jit(functools.partial(train_step, objective=objective, optimizer=optimizer, microbatches=2))
    layout = state_shardings(config, optimizer, make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]))
    return compiled, start_state(jax.device_put(random_params(config), layout.params), optimizer, layout)


def slope(total: float) -> dict:
    return {"slope": jnp.array([1.0, total - 1.0])}


def assert_equal(tree, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad):
    step, start = compiled_step(0.0)
    before, _ = step(start, None, slope(3))
    after, metrics = step(before, None, slope(bad))
    assert_equal((after.params, after.moments, after.norms_W), (before.params, before.moments, before.norms_W))
    assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (2, 1, 1)
    assert not np.isfinite(metrics["grad_norm"])

    direct, _ = step(before, None, slope(3))
    later, metrics = step(after, None, slope(3))
    assert_equal((later.params, later.moments), (direct.params, direct.moments))
    assert (int(later.step), int(later.skipped), int(metrics["skipped"])) == (3, 1, 1)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (later.params, before.params)), strict=True))


def run_of(step, state, totals: list[float]) -> tuple:
    """(state after the steps, whether each was skipped, the norm of each gradient)."""
    skipped, norms = [], []
    for total in totals:
        before = state
        state, metrics = step(state, None, slope(total))
        skipped.append(int(state.skipped) - int(before.skipped))
        norms.append(float(metrics["grad_norm"]))
        if skipped[-1]:
            assert_equal((state.params, state.moments), (before.params, before.moments))
    return state, skipped, norms


STEADY = [3.0, 3.3, 2.7, 3.0]


def test_a_spike_is_skipped_once_enough_norms_are_known():
    step, start = compiled_step(6.0)
    _, skipped, _ = run_of(step, start, [3.0, 300.0, 3.0, 3.0])
    assert skipped == [0, 0, 0, 0]  # four are compared with; the first four have too few before them
    state, skipped, norms = run_of(step, start, [*STEADY, 30.0, 3.0])
    assert skipped == [0, 0, 0, 0, 1, 0]
    assert sorted(np.asarray(state.norms_W)) == sorted(np.float32(norms[2:]))
    limit = np.mean(norms[:4]) + 6 * np.std(norms[:4])
    per_slope = norms[3] / 3.0  # a little less at other parameters: the gradient is the cosine of each
    _, skipped, (*_, last) = run_of(step, start, [*STEADY, limit / per_slope * 1.02])
    assert skipped[-1] == 1 and last > limit
    _, skipped, (*_, last) = run_of(step, start, [*STEADY, limit / per_slope * 0.98])
    assert skipped[-1] == 0 and last < limit


def test_norms_that_stay_high_are_taken_for_normal_before_long():
    _, skipped, _ = run_of(*compiled_step(6.0), [*STEADY, *[300.0] * 5])
    assert skipped[4] == 1 and skipped[-1] == 0 and sum(skipped) <= 4


def test_without_deviations_no_spike_is_skipped():
    assert run_of(*compiled_step(0.0), [*STEADY, 3e4])[1] == [0] * 5


def test_norms_of_gradient_update_and_parameters_are_told_for_all_and_by_layer():
    step, start = compiled_step(0.0)
    after, metrics = step(start, None, slope(3))
    before, after = (by_path(jax.device_get(state.params)) for state in (start, after))
    update = {name: after[name].astype(np.float64) - before[name] for name in before}
    grads = {name: 3 / 2 * np.cos(value.astype(np.float64)) for name, value in before.items()}

    def norm(tree, layer=None):
        parts = tree.values() if layer is None else [v[layer] for n, v in tree.items() if n.startswith("layers/")]
        return np.sqrt(sum(np.sum(part.astype(np.float64) ** 2) for part in parts))

    np.testing.assert_allclose(metrics["grad_norm"], norm(grads), rtol=1e-5)
    np.testing.assert_allclose(metrics["update_norm"], norm(update), rtol=1e-4)
    np.testing.assert_allclose(metrics["param_norm"], norm(before), rtol=1e-5)
    for layer in range(2):
        np.testing.assert_allclose(metrics["layers/grad_norm"][layer], norm(grads, layer), rtol=1e-5)
        ratio = norm(update, layer) / norm(before, layer)
        np.testing.assert_allclose(metrics["layers/update_ratio"][layer], ratio, rtol=1e-4)
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)


# ---- Other tools' trajectories


@pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_six_steps_equal_those_of_torch(kind):
    expected, model = golden(f"{kind}_train"), load_model(str(REFERENCE / "tiny_gqa"))
    if kind == "sft":
        rows, reference, length = sft_rows(golden("sft_golden")["completion_only"]), None, 300
        objective = make_objective(lm(), model.config, 2)
    else:
        rows, reference, length = preference_pairs(), load_model(str(REFERENCE / "tiny_gqa_ref")).params, 473
        objective = make_objective(dpo(beta=expected["beta"]), model.config, 2)
    config = dataclasses.replace(CONSTANT, learning_rate=expected["lr"])
    optimizer = make_optimizer(config, model.config, clock(6))
    compiled = jax.jit(functools.partial(train_step, objective=objective, optimizer=optimizer, microbatches=1))
    layout = state_shardings(model.config, optimizer, make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]))
    state = start_state(model.params, optimizer, layout)
    batches = [batch_of(part, length, "chat" if kind == "sft" else "preference") for part in (rows[:4], rows[4:])]
    for number, entry in enumerate(expected["log"]):
        state, metrics = compiled(state, reference, batches[number % 2])
        loss = metrics["loss"] / metrics["count"]  # of a few 1e-4 it hangs on the last bit of sums of 1,000 nats
        np.testing.assert_allclose(loss, entry["loss"], rtol=1e-4, atol=1e-6, err_msg=str(number))
        np.testing.assert_allclose(metrics["grad_norm"], entry["grad_norm"], rtol=1e-3, err_msg=str(number))
        if kind == "dpo":
            assert_diagnostics(metrics, entry, atol=2e-4)
    final = np.load(ALIGN / f"{kind}_train_final.npz")
    before, after = torch_names(model.config, model.params), torch_names(model.config, state.params)
    for name, theirs in final.items():
        # Where a gradient is little but rounding, Adam makes a whole step of it: so not element by element.
        away, moved = (np.linalg.norm(theirs - ours[name]) for ours in (after, before))
        assert away < 5e-3 * moved, name
