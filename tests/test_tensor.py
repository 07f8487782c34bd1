"""A model split over devices computes what it computes on one, up to the order of sums, in a share of the memory."""

import jax
import numpy as np
import pytest
from test_evaluate import store_of_text
from tiny_models import tiny_model

from ctllm_jax import convert
from ctllm_jax.common.errors import UserError
from ctllm_jax.evaluate.cache import model_mark
from ctllm_jax.evaluate.devices import on_each_device, spread
from ctllm_jax.evaluate.engine import Request, score_groups
from ctllm_jax.evaluate.perplexity import PerplexityConfig, perplexity
from ctllm_jax.generate import generate
from ctllm_jax.loading import load_model, load_stored
from ctllm_jax.model import forward
from ctllm_jax.samples import sample
from ctllm_jax.sampling import SamplingConfig


@pytest.fixture(scope="module")
def location(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor") / "run"
    convert.write_run(tiny_model(max_length=128), folder, "float32")
    return str(folder)


@pytest.fixture(scope="module")
def whole(location):
    return load_model(location)


@pytest.fixture(scope="module")
def split(location):
    return load_model(location, tensor=2)


def groups_of(random: np.random.Generator) -> list[list[Request]]:
    """Options that share a beginning, of which there are several."""
    ids = lambda n: random.integers(4, 370, n).tolist()  # noqa: E731
    common = ids(40)
    return [[Request([*common, *ids(4), *ids(n)], 44, 0) for n in (1, 1, 3)] for _ in range(3)]


def test_each_device_holds_its_share(whole, split):
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(split.params))
    assert split.mesh.size == 2 and held < 0.52 * sum(leaf.nbytes for leaf in jax.tree.leaves(whole.params))
    jax.tree.map(np.testing.assert_array_equal, whole.params, split.params)
    assert model_mark(split) != model_mark(whole)  # answers differ in their last bits


def test_scores_are_those_of_one_device(whole, split):
    groups = groups_of(np.random.default_rng(0))
    for one, two in zip(*(sum(score_groups(m, groups, 128, "test"), []) for m in (whole, split)), strict=True):
        np.testing.assert_allclose(two.whole_logprob, one.whole_logprob, rtol=1e-5)
        np.testing.assert_allclose(two.sum_logprob, one.sum_logprob, rtol=1e-5)


@pytest.mark.slow
def test_texts_and_perplexity_are_those_of_one_device(whole, split, tmp_path):
    prompts = [request.ids[:9] for [request, *_] in groups_of(np.random.default_rng(0))]
    texts = [generate(model, prompts, max_tokens=8, stop_ids=[2]) for model in (whole, split)]
    assert texts[0] == texts[1]
    greedy = SamplingConfig(8, temperature=0.0, top_k=0, top_p=1.0, seed=0)
    texts = [sample(model, ["从前有座山，", "The"], False, greedy) for model in (whole, split)]
    assert texts[0] == texts[1] and texts[0][0]["text"]

    store = store_of_text(tmp_path, whole.tokenizer)
    config = PerplexityConfig(store=str(tmp_path), split="validation", rows=9, baseline_rows=9)
    one, two = (perplexity([model], store, config, 256)["total"] for model in (whole, split))
    np.testing.assert_allclose(two["nats_per_token"], one["nats_per_token"], rtol=1e-6)


@pytest.mark.slow  # each group compiles all of it
def test_every_group_of_devices_takes_jobs_and_gives_the_same_bits(split):
    models = on_each_device(split)
    owned = [set(model.mesh.devices.flat) for model in models]
    assert [len(own) for own in owned] == [2] * 4 and set.union(*owned) == set(jax.local_devices())
    groups = groups_of(np.random.default_rng(1))
    found = list(spread(models, lambda model, _: (model.mesh, score_groups(model, groups, 128, "test")), range(16)))
    assert len({mesh for mesh, _ in found}) > 1 and all(scores == found[0][1] for _, scores in found)


def test_what_cannot_be_split_so_is_said(location):
    with pytest.raises(UserError, match=r"layers/k .*: size 2 does not divide over 3 devices of axis tensor"):
        load_model(location, tensor=3)
    for wrong in (0, 9):
        with pytest.raises(UserError, match=f"tensor {wrong}: a model can be split over 1 to 8 devices here"):
            load_model(location, tensor=wrong)


def test_matrices_held_in_the_compute_dtype_give_the_bits_of_stored_ones(location):
    held, stored = load_model(location, dtype="bfloat16"), load_stored(location)
    assert held.params["layers"]["q"].dtype == "bfloat16" and stored.params["layers"]["q"].dtype == "float32"
    assert held.params["layers"]["mlp_norm"].dtype == held.params["final_norm"].dtype == "float32"
    tokens_BL = np.random.default_rng(0).integers(4, 370, (2, 64), dtype=np.int32)
    inputs = tokens_BL, np.broadcast_to(np.arange(64, dtype=np.int32), (2, 64)), np.ones_like(tokens_BL)
    run = jax.jit(forward, static_argnums=0)
    np.testing.assert_array_equal(*(run(held.config, model.params, *inputs)[0] for model in (held, stored)))
