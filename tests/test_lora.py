"""LoRA: adapters beside frozen parameters, in the model, in a step and in a run."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_invariance import LENGTH, batch_for, random_params
from tiny_models import tiny_config, tiny_model
from tiny_objectives import dpo, lm
from tiny_runs import assert_same_run, compiled_once, entries, stopped  # noqa: F401 (compiled_once is a fixture)
from tiny_stores import tiny_store, train_values

from ctllm_jax import convert, train
from ctllm_jax.checkpoint import save_params
from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json
from ctllm_jax.convert import ConvertConfig
from ctllm_jax.duration import Clock
from ctllm_jax.evaluate.perplexity import PerplexityConfig, perplexity
from ctllm_jax.loading import load_stored
from ctllm_jax.lora import NO_ADAPTERS, NO_LORA, TARGETS, LoraConfig, adapted, joined, merged, trained
from ctllm_jax.model import abstract_params, count_params, flops_per_token, forward, init_params, logical_axes
from ctllm_jax.objectives import make_objective
from ctllm_jax.optim import OptimizerConfig, make_optimizer
from ctllm_jax.restore import load_params
from ctllm_jax.sharding import MeshConfig, make_mesh, shardings
from ctllm_jax.step import abstract_batch, gradient, jit_step, start_state, state_shardings
from ctllm_jax.train_config import TrainConfig

DOUBLE = tiny_config(dtype="float64", param_dtype="float64", d_ff=64)
CLOCK = Clock(tokens=16, run=10)
LORA = LoraConfig(rank=4, alpha=8.0, targets=tuple(TARGETS))


def random_adapters(config, seed: int = 2) -> dict:
    """Adapters that add something, of the size of what they are added to."""
    random = np.random.default_rng(seed)
    abstract = trained(abstract_params(config, LORA.ranks))
    return jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(leaf.dtype), abstract)


def drawn(ranks=NO_ADAPTERS) -> dict:
    """What a run draws."""
    config = tiny_config()
    return jax.jit(lambda key: init_params(config, key, ranks))(jax.random.key(5))


# ---- In the model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": -1}, "rank -1 must not be negative"),
        ({"alpha": 0.0}, "alpha 0.0 must be positive"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("q", "embed")}, "'embed' is unknown; there are: q, k, v, out, gate, up, down"),
    ],
)
def test_adapters_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LORA, **change)


def test_new_adapters_change_no_bit_and_merged_ones_compute_the_same():
    config, random = tiny_config(), np.random.default_rng(0)
    params, adapters = random_params(config, 0), random_adapters(config)
    tokens_BL = random.integers(0, config.vocab_size, (2, 16), dtype=np.int32)
    inputs = tokens_BL, np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16)), np.ones_like(tokens_BL)
    run = jax.jit(functools.partial(forward, config))

    def logits(params):
        return np.asarray(run(params, *inputs)[0])[..., : config.vocab_size]

    new = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * (path[-1].key == "a"), adapters)
    before = logits(params)
    np.testing.assert_array_equal(logits(joined(LORA, new, params)), before)
    beside = logits(joined(LORA, adapters, params))
    into = logits(merged(LORA, adapters, params))
    np.testing.assert_allclose(into, beside, rtol=0, atol=2e-5 * np.abs(beside).max())
    assert np.abs(beside - before).max() > 0.1 * np.abs(before).max()


@pytest.mark.slow
def test_what_is_drawn_for_the_model_does_not_depend_on_adapters():
    with_adapters = drawn(LORA.ranks)
    new = with_adapters["layers"].pop("adapters")
    jax.tree.map(np.testing.assert_array_equal, with_adapters, drawn())
    assert not any(adapter["b"].any() for adapter in new.values())
    assert np.std(new["out"]["a"]) == pytest.approx(32**-0.5, rel=0.1)  # 4 heads of 8 go in


# ---- In a step


def adapter_gradient(axes: tuple[int, ...], microbatches: int = 1) -> tuple[dict, dict]:
    """(gradient of the adapters, sums) in fp64, over a mesh of as many devices as the axes take."""
    config = DOUBLE
    batch, mesh = batch_for("chat"), make_mesh(MeshConfig(*axes), jax.devices()[: np.prod(axes)])
    objective = adapted(LORA, make_objective(lm(1e-4), config, 2))
    with jax.enable_x64(True), jax.set_mesh(mesh):
        abstract, logical = abstract_params(config, LORA.ranks), logical_axes(config, LORA.ranks)
        params = jax.device_put(random_adapters(config), shardings(mesh, trained(abstract), trained(logical)))
        frozen = jax.device_put(
            random_params(config, 0), shardings(mesh, abstract_params(config), logical_axes(config))
        )
        places = jax.tree.map(lambda x: x.sharding, abstract_batch(8, LENGTH, (), mesh))
        step = jax.jit(functools.partial(gradient, objective=objective, microbatches=microbatches))
        return jax.device_get(step(params, frozen, jax.device_put(batch, places)))


def test_the_gradient_is_that_of_the_merged_matrix_through_both_factors():
    """dA = scale * dW B^T and dB = scale * A^T dW, layer by layer."""
    config = DOUBLE
    grads, sums = adapter_gradient((1, 1, 1, 1))
    with jax.enable_x64(True):
        adapters = random_adapters(config)
        whole = merged(LORA, adapters, random_params(config, 0))
        objective = make_objective(lm(1e-4), config, 2)
        step = jax.jit(functools.partial(gradient, objective=objective, microbatches=1))
        plain, plain_sums = jax.device_get(step(whole, None, batch_for("chat")))
    np.testing.assert_allclose(sums["loss"], plain_sums["loss"], rtol=1e-10)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    for name, inputs in TARGETS.items():
        for layer in range(config.num_layers):
            a, b = (adapters["layers"]["adapters"][name][side][layer] for side in "ab")
            dw = plain["layers"][name][layer].reshape(-1, np.prod(b.shape[1:], dtype=int))
            flat_a, flat_b = a.reshape(-1, LORA.rank), b.reshape(LORA.rank, -1)
            assert a.ndim == inputs + 1
            own = {side: grads["layers"]["adapters"][name][side][layer] for side in "ab"}
            for side, expected in (("a", dw @ flat_b.T), ("b", flat_a.T @ dw)):
                np.testing.assert_allclose(own[side].ravel(), 2.0 * expected.ravel(), rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_eight_devices_and_microbatches_give_the_gradient_of_one():
    grads, sums = adapter_gradient((1, 1, 1, 1))
    sharded, sharded_sums = adapter_gradient((1, 2, 2, 2), microbatches=2)
    np.testing.assert_allclose(sharded_sums["loss"], sums["loss"], rtol=1e-10)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-12), sharded, grads)


@pytest.mark.slow
def test_the_compiled_step_holds_neither_gradient_nor_moments_of_what_is_frozen():
    config, memory = tiny_config(d_model=256, d_ff=1024, padded_vocab_size=4096), {}
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    for lora in (NO_LORA, LORA):
        optimizer = make_optimizer(build(OptimizerConfig, train_values("")["optimizer"]), config, CLOCK, lora.ranks)
        layout = state_shardings(config, optimizer, mesh, lora.ranks)
        step = jit_step(adapted(lora, make_objective(lm(), config, 1)), optimizer, 1, layout)
        zeros = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype), trained(abstract_params(config, lora.ranks))
        )
        with jax.set_mesh(mesh):
            state = start_state(jax.device_put(zeros, layout.params), optimizer, layout)
            frozen = abstract_params(config) if lora.rank else None
            analysis = step.lower(state, frozen, abstract_batch(1, 16, (), mesh)).compile().memory_analysis()
        memory[lora.rank] = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    size = 4 * count_params(config)
    (whole_arguments, whole_temporary), (arguments, temporary) = memory[0], memory[LORA.rank]
    assert whole_arguments > 3 * size and arguments < 1.1 * size  # parameters and two moments; parameters
    assert whole_temporary - temporary > 0.9 * size  # the gradient


def test_frozen_parameters_cost_no_gradient():
    config = tiny_config()
    whole, adapters = (flops_per_token(config, 32, True, count) for count in (0, 1000))
    products = 6 * (2 * (32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48) + 32 * 384)
    assert whole - adapters == products / 3 - 6 * 1000


# ---- In a run


def config_of(store, origin, **changes) -> TrainConfig:
    values = train_values(store.folder)
    values["lora"]["rank"] = 4
    values["optimizer"]["learning_rate"] = 1e-2
    values |= {"model": None, "init_from": str(origin), "duration": "6 steps", **changes}
    return build(TrainConfig, values)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A run directory to start from."""
    folder = tmp_path_factory.mktemp("origin") / "run"
    convert.write_run(tiny_model(max_length=32), folder, "float32")
    return folder


@pytest.mark.slow
def test_a_run_trains_adapters_beside_a_base_and_a_stop_leaves_no_trace(tmp_path, origin, monkeypatch):
    store = tiny_store(tmp_path / "store", "chat")
    config = config_of(store, origin)
    result = train.run(config, str(tmp_path / "run"))
    first, *_, last = entries(tmp_path / "run", "eval")
    assert last["loss"] < first["loss"] - 0.05
    jax.tree.map(
        np.testing.assert_array_equal,
        load_stored(str(tmp_path / "run" / "base")).params,
        load_stored(str(origin)).params,
    )

    about = read_json(tmp_path / "run" / "run.json")
    model = load_stored(str(tmp_path / "run"))
    abstract = trained(abstract_params(model.config, config.lora.ranks))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    adapters = load_params(tmp_path / "run", jax.tree.map(lambda leaf: leaf.update(sharding=here), abstract), 6)
    assert model.step == 6 and set(adapters["layers"]["adapters"]) == {"q", "v", "out", "gate", "down"}
    assert about["trained_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert about["parameters"] == result["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(model.params))
    saved = read_json(tmp_path / "run" / "checkpoints" / "6" / "record" / "metadata")["checksums"]
    of_arrays = [name for name in saved if "/layers/" in name]
    assert len(of_arrays) == 3 * 2 * 5 and all("/layers/adapters/" in name for name in of_arrays)  # with two moments

    jax.tree.map(
        np.testing.assert_array_equal, model.params, merged(config.lora, adapters, load_stored(str(origin)).params)
    )
    found = perplexity([model], store, PerplexityConfig(str(store.folder), "validation", 8, 8), 1024)
    assert found["total"]["tokens"] == last["count"]
    assert found["total"]["nats_per_token"] == pytest.approx(last["loss"], rel=1e-5)

    stopped(monkeypatch, 3, config, tmp_path / "parts")
    train.run(config, str(tmp_path / "parts"))
    assert_same_run(tmp_path / "parts", tmp_path / "run")
    with pytest.raises(UserError, match=r"settings\.lora\.rank: 4 there, 2 now"):
        train.run(dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=2)), str(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["live", "cached"])
def test_dpo_has_the_model_without_adapters_as_its_reference(tmp_path, origin, reference):
    store = tiny_store(tmp_path / "store", "preference")
    config = config_of(store, origin, objective=dataclasses.asdict(dpo(reference=reference)))
    train.run(config, str(tmp_path / "run"))
    first, *_, last = entries(tmp_path / "run", "eval")
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-6) and abs(first["margin"]) < 1e-5
    assert last["loss"] < first["loss"] and last["margin"] > 0
    assert (tmp_path / "run" / "reference").exists() == (reference == "cached")
    # What is exported has the adapters in it, and so has what goes on from there.
    export = ConvertConfig(source=str(tmp_path / "run"), step=None, all_steps=False, to="huggingface", dtype="float32")
    folder = convert.run(export, str(tmp_path / "export"))["model"]
    jax.tree.map(np.testing.assert_array_equal, load_stored(folder).params, load_stored(str(tmp_path / "run")).params)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_stored(str(tmp_path / "run" / "base")).params,
        load_stored(str(origin)).params,
    )


def test_adapters_need_a_model_to_be_beside(tmp_path):
    values = train_values(tmp_path)
    values["lora"]["rank"] = 4
    with pytest.raises(UserError, match="give init_from"):
        build(TrainConfig, values)


def test_a_base_that_is_there_is_not_written_again(tmp_path):
    params = {"x": jax.numpy.ones(3)}
    save_params(tmp_path, params, 0)
    file = next((tmp_path / "checkpoints" / "0" / "params").rglob("*"))
    stamp = file.stat().st_mtime_ns
    save_params(tmp_path, params, 0)
    assert file.stat().st_mtime_ns == stamp
