"""AdamW as CT-LLM trained: what decays, how the rate runs, and that a bad gradient changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align_reference import ALIGN, golden, preference_pairs, sft_rows
from tiny_models import NO_REFERENCE, REFERENCE, tiny_config
from tiny_stores import batch_of

from ctllm_jax import hf
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.loading import load_model
from ctllm_jax.model import abstract_params
from ctllm_jax.objectives import ObjectiveConfig, make_objective
from ctllm_jax.optim import OptimizerConfig, decay_mask, make_optimizer, schedule
from ctllm_jax.step import TrainState, train_step

BASE = OptimizerConfig(
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=10,
    decay_fraction=0.0,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
)


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


def test_with_gradients_of_zero_matrices_shrink_by_rate_times_decay_and_norms_stay():
    config = tiny_config(qk_norm=True)
    params = random_params(config)
    optimizer = make_optimizer(dataclasses.replace(BASE, schedule="constant", warmup_steps=0), config, 100)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for name, update in by_path(updates).items():
        expected = 0 if name.endswith("norm") else -1e-2 * 0.1 * by_path(params)[name]
        np.testing.assert_allclose(update, expected, rtol=1e-6, atol=0, err_msg=name)


# ---- The learning rate


def rates(config: OptimizerConfig, steps: int, at: list[int]) -> list[float]:
    return [float(schedule(config, steps)(step)) for step in at]


def test_the_cosine_rises_to_its_peak_and_falls_to_its_end():
    found = rates(BASE, 110, [0, 5, 10, 35, 60, 110, 200])
    middle = 1e-3 + 9e-3 * 0.5 * (1 + np.cos(np.pi * 0.25))
    np.testing.assert_allclose(found, [0, 5e-3, 1e-2, middle, 5.5e-3, 1e-3, 1e-3], rtol=1e-5, atol=1e-9)


def test_warm_up_stable_decay_falls_at_the_end_only():
    config = dataclasses.replace(BASE, schedule="wsd", decay_fraction=0.2)
    found = rates(config, 100, [0, 5, 10, 50, 80, 90, 100, 150])
    np.testing.assert_allclose(found, [0, 5e-3, 1e-2, 1e-2, 1e-2, 5.5e-3, 1e-3, 1e-3], rtol=1e-5, atol=1e-9)


def test_a_constant_rate_stays_at_its_peak():
    config = dataclasses.replace(BASE, schedule="constant")
    np.testing.assert_allclose(rates(config, 100, [0, 5, 10, 99]), [0, 5e-3, 1e-2, 1e-2], rtol=1e-5)


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_without_warm_up_the_first_update_has_the_peak_rate(name):
    config = dataclasses.replace(BASE, schedule=name, warmup_steps=0, decay_fraction=0.5)
    np.testing.assert_allclose(rates(config, 20, [0]), [1e-2], rtol=1e-6)


def test_ct_llms_schedule_has_its_published_values():
    config = dataclasses.replace(BASE, learning_rate=2e-4, final_learning_rate=2e-5, warmup_steps=2000)
    found = rates(config, 598_278, [1000, 2000, 598_278])
    np.testing.assert_allclose(found, [1e-4, 2e-4, 2e-5], rtol=1e-4)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="schedule 'linear' is unknown; there are: constant, cosine, wsd"):
        build(OptimizerConfig, dataclasses.asdict(BASE) | {"schedule": "linear"})


# ---- The update


def test_updates_equal_adamw_with_clipping_in_float64():
    config = tiny_config()
    params = random_params(config)
    optimizer = make_optimizer(BASE, config, 50)
    state, mask = optimizer.init(params), by_path(decay_mask(config))
    exact = {name: np.asarray(leaf, np.float64) for name, leaf in by_path(params).items()}
    first, second = ({name: np.zeros_like(value) for name, value in exact.items()} for _ in range(2))
    update = jax.jit(optimizer.update)
    for step in range(4):
        grads = jax.tree.map(lambda p, s=step: (s + 0.5) * np.cos(100 * np.asarray(p) + s), params)
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: np.asarray(p) + np.asarray(u), params, updates)
        flat = {name: np.asarray(leaf, np.float64) for name, leaf in by_path(grads).items()}
        norm = np.sqrt(sum((leaf**2).sum() for leaf in flat.values()))
        rate = 1e-2 * step / 10
        for name, grad in flat.items():
            grad = grad * min(1.0, 1.0 / norm)
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            ratio = first[name] / (1 - 0.9 ** (step + 1)) / (np.sqrt(second[name] / (1 - 0.95 ** (step + 1))) + 1e-8)
            exact[name] -= rate * (ratio + 0.1 * mask[name] * exact[name])
    for name, value in by_path(params).items():
        np.testing.assert_allclose(value, exact[name], rtol=0, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def step():
    """A compiled step of an objective whose gradient the batch decides: the sum over parameters times `slope`."""
    config = tiny_config()
    optimizer = make_optimizer(dataclasses.replace(BASE, schedule="constant", warmup_steps=0), config, 10)

    def objective(params, _, batch):
        slope = jnp.sum(batch["slope"])
        total = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(params)) * slope
        return total, {"count": jnp.sum(jnp.ones_like(batch["slope"])), "loss": total}

    compiled = jax.jit(functools.partial(train_step, objective=objective, optimizer=optimizer, microbatches=2))
    params = random_params(config)
    start = TrainState(params, optimizer.init(params), jnp.int32(0), jnp.int32(0))
    return compiled, start


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(step, bad):
    compiled, start = step
    good = {"slope": jnp.array([1.0, 2.0])}
    before, _ = compiled(start, None, good)
    after, metrics = compiled(before, None, {"slope": jnp.array([1.0, bad])})
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, before.optimizer)
    assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (2, 1, 1)
    assert not np.isfinite(metrics["grad_norm"])

    direct, _ = compiled(before, None, good)
    later, metrics = compiled(after, None, good)
    jax.tree.map(np.testing.assert_array_equal, later.params, direct.params)
    jax.tree.map(np.testing.assert_array_equal, later.optimizer, direct.optimizer)
    assert (int(later.step), int(later.skipped), int(metrics["skipped"])) == (3, 1, 1)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (later.params, before.params)), strict=True))


# ---- Other tools' trajectories


@pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_six_steps_equal_those_of_torch(kind):
    expected, model = golden(f"{kind}_train"), load_model(str(REFERENCE / "tiny_gqa"))
    if kind == "sft":
        rows, reference, length = sft_rows(golden("sft_golden")["completion_only"]), None, 300
        objective = make_objective(ObjectiveConfig("lm", 0.0, 0.0, "auto"), model.config, 2)
    else:
        rows, reference, length = preference_pairs(), load_model(str(REFERENCE / "tiny_gqa_ref")).params, 473
        objective = make_objective(ObjectiveConfig("dpo", 0.0, expected["beta"], "auto"), model.config, 2)
    config = dataclasses.replace(BASE, learning_rate=expected["lr"], schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(config, model.config, 6)
    compiled = jax.jit(functools.partial(train_step, objective=objective, optimizer=optimizer, microbatches=1))
    state = TrainState(model.params, optimizer.init(model.params), jnp.int32(0), jnp.int32(0))
    batches = [batch_of(part, length, "chat" if kind == "sft" else "preference") for part in (rows[:4], rows[4:])]
    for number, entry in enumerate(expected["log"]):
        state, metrics = compiled(state, reference, batches[number % 2])
        np.testing.assert_allclose(metrics["loss"] / metrics["count"], entry["loss"], rtol=1e-3, err_msg=str(number))
        np.testing.assert_allclose(metrics["grad_norm"], entry["grad_norm"], rtol=2e-3, err_msg=str(number))
    final = np.load(ALIGN / f"{kind}_train_final.npz")
    before, after = torch_names(model.config, model.params), torch_names(model.config, state.params)
    for name, theirs in final.items():
        # Where a gradient is little but rounding, Adam makes a whole step of it: so not element by element.
        away, moved = (np.linalg.norm(theirs - ours[name]) for ours in (after, before))
        assert away < 5e-3 * moved, name


def torch_names(config, params) -> dict[str, np.ndarray]:
    """Our parameters under transformers' names and in its shapes."""
    found = {}
    for path, names in hf.names_by_path(config).items():
        leaf = np.asarray(by_path(params)[path])
        for layer, name in enumerate(names):
            own = leaf[layer] if path.startswith("layers/") else leaf
            found[name] = own.reshape(hf.their_shape(own.shape, name, True)[::-1]).T if hf.TABLE[path][1] else own
    return found
