"""The loss without logits: the dense form's value and gradient, on every mesh, in a fraction of its memory."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_models import tiny_model
from tiny_objectives import dpo, lm
from tiny_stores import batch_of, packed_row, preference_row

from ctllm_jax.common.errors import UserError
from ctllm_jax.cross_entropy import DENSE_SHARE, UNKNOWN_MEMORY, choose_form, dense_bytes, label_logprobs
from ctllm_jax.hardware import CHIPS
from ctllm_jax.losses import lm_loss, token_logprobs
from ctllm_jax.model import abstract_params, logical_axes
from ctllm_jax.objectives import make_objective
from ctllm_jax.products import head_logits
from ctllm_jax.sharding import MeshConfig, make_mesh, shardings, spec

B, L, D, V = 8, 16, 24, 48  # V is padded
IDS = 41  # over eight devices, the last one's part of the vocabulary is padding alone


def dense_logprobs(x_BLD, head_DV, labels_BL, ids, chunk=None):
    """As the model computes logits."""
    logits_BLV = head_logits(x_BLD, head_DV)
    return token_logprobs(jnp.where(jnp.arange(head_DV.shape[1]) < ids, logits_BLV, -jnp.inf), labels_BL)


def step(logprobs, z_loss, ids=IDS, **options):
    """(x, head, labels, weights) -> (loss, nll by row), (dx, dhead)."""

    def loss(x_BLD, head_DV, labels_BL, weights_BL):
        return lm_loss(*logprobs(x_BLD, head_DV, labels_BL, ids, **options), weights_BL, z_loss)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def inputs(seed=0, dtype="float32", scale=1.0, vocab=V, ids=IDS):
    """Hidden states, head, labels, and weights of which some rows have none."""
    random = np.random.default_rng(seed)
    x_BLD = jnp.asarray(random.normal(size=(B, L, D)), dtype)
    head_DV = (scale * random.normal(size=(D, vocab))).astype(np.float32)
    weights_BL = (random.random((B, L)) < 0.7).astype(np.float32)
    weights_BL[2:4] = 0
    return x_BLD, head_DV, random.integers(0, ids, (B, L)).astype(np.int32), weights_BL


def exact(x_BLD, head_DV, labels_BL, weights_BL, z_loss):
    """(loss, dx, dhead) by the formulas in float64."""
    x_BLD, head_DV = np.asarray(x_BLD, np.float64), head_DV.astype(np.float64)
    logits_BLV = np.where(np.arange(V) < IDS, x_BLD @ head_DV, -np.inf)
    lse_BL = np.logaddexp.reduce(logits_BLV, axis=-1)
    onehot_BLV = labels_BL[..., None] == np.arange(V)
    nll_BL = lse_BL - np.sum(np.where(onehot_BLV, logits_BLV, 0), axis=-1)
    loss = np.sum(weights_BL * (nll_BL + z_loss * lse_BL**2))
    softmax_BLV = np.exp(logits_BLV - lse_BL[..., None])
    dlogits_BLV = weights_BL[..., None] * (softmax_BLV * (1 + 2 * z_loss * lse_BL[..., None]) - onehot_BLV)
    return loss, dlogits_BLV @ head_DV.T, np.einsum("BLD,BLV->DV", x_BLD, dlogits_BLV)


def assert_equal(found, expected, tolerance=1e-6):
    """Every leaf within `tolerance` of the expected leaf's largest value."""

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    jax.tree.map(compare, jax.device_get(found), jax.device_get(expected))


# ---- Value and gradient


@pytest.mark.parametrize(("chunk", "z_loss"), [(1, 1e-2), (7, 0.0), (7, 1e-2), (16, 1e-2), (48, 0.0), (100, 1e-2)])
def test_chunks_give_the_value_and_gradient_of_the_dense_form(chunk, z_loss):
    arguments = inputs()
    found = step(label_logprobs, z_loss, chunk=chunk)(*arguments)
    assert_equal(found, step(dense_logprobs, z_loss)(*arguments))
    (loss, _), (dx_BLD, dhead_DV) = found
    assert_equal((loss, dx_BLD, dhead_DV), exact(*arguments, z_loss))
    assert not np.any(dx_BLD[2:4]) and not np.any(dhead_DV[:, IDS:])


def test_large_logits_overflow_nothing():
    arguments = inputs(scale=300.0)
    found, expected = (
        step(form, 0.0)(*arguments) for form in (functools.partial(label_logprobs, chunk=7), dense_logprobs)
    )
    assert np.isfinite(found[0][0]) and float(found[0][0]) > 1e5
    assert_equal(found, expected)


@pytest.mark.parametrize("seed", range(2))
def test_bfloat16_rounds_no_worse_than_the_dense_form(seed):
    """Distances from float64 of the unrounded head. `whole` rounds the head's gradient, not the logits' cotangent."""
    arguments = inputs(seed, "bfloat16")
    expected = exact(*arguments, 1e-2)

    def errors(form):
        (loss, _), grads = step(form, 1e-2)(*arguments)
        found = (loss, *grads)
        assert [array.dtype for array in grads] == [jnp.bfloat16, jnp.float32]
        return [np.linalg.norm(np.asarray(a, np.float64) - b) for a, b in zip(found, expected, strict=True)]

    def whole(x_BLD, head_DV, labels_BL, ids):
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        logits_BLV = product("BLD,DV->BLV", x_BLD, head_DV.astype(x_BLD.dtype))
        return token_logprobs(jnp.where(jnp.arange(head_DV.shape[1]) < ids, logits_BLV, -jnp.inf), labels_BL)

    chunked, dense = errors(functools.partial(label_logprobs, chunk=7)), errors(dense_logprobs)
    _, whole_dx, whole_dhead = errors(whole)
    (loss, dx, dhead), (dense_loss, dense_dx, dense_dhead) = chunked, dense
    assert abs(loss - dense_loss) < 1e-6 * expected[0]  # the same rounding of the same logits
    assert dx < 1.001 * dense_dx and dhead < 1.001 * dense_dhead
    assert dense_dx < 1.1 * whole_dx and dense_dhead < whole_dhead


@pytest.mark.parametrize("part", [0, 1])
def test_either_result_can_be_used_alone(part):
    x_BLD, head_DV, labels_BL, _ = inputs()

    def gradient(form):
        return jax.jit(jax.grad(lambda x, head: jnp.sum(form(x, head, labels_BL, IDS)[part] ** 2), (0, 1)))

    assert_equal(
        gradient(functools.partial(label_logprobs, chunk=7))(x_BLD, head_DV), gradient(dense_logprobs)(x_BLD, head_DV)
    )


# ---- Over a mesh

MESHES = [
    (8, 1, 1, 1),
    (1, 8, 1, 1),
    (1, 1, 8, 1),
    (1, 1, 1, 8),
    (4, 1, 1, 2),
    (2, 2, 2, 1),
    (1, 2, 2, 2),
    (2, 1, 2, 2),
]


@pytest.mark.parametrize("axes", MESHES)
def test_any_mesh_gives_the_value_and_gradient_of_one_device(axes):
    arguments = inputs()
    mesh = make_mesh(MeshConfig(*axes))
    places = [
        spec(a) for a in (("batch", "length", None), ("embed", "vocab"), ("batch", "length"), ("batch", "length"))
    ]
    with jax.set_mesh(mesh):
        laid = [jax.device_put(a, NamedSharding(mesh, place)) for a, place in zip(arguments, places, strict=True)]
        found = step(label_logprobs, 1e-2, chunk=4)(*laid)  # the last chunk of six or more ids is smaller
    assert_equal(found, step(dense_logprobs, 1e-2)(*arguments))
    for grad, place in zip(found[1], places, strict=False):
        assert grad.sharding.is_equivalent_to(NamedSharding(mesh, place), grad.ndim)


def test_the_head_is_gathered_once_and_its_gradient_reduced_once():
    """Under FSDP, counting a collective inside a loop as often as the loop runs; whole chunks and one that is left."""
    mesh = make_mesh(MeshConfig(1, 8, 1, 1))
    with jax.set_mesh(mesh):
        jaxpr = str(jax.make_jaxpr(step(label_logprobs, 0.0, chunk=10))(*inputs()))
    assert jaxpr.count("all_gather[") == 1
    assert jaxpr.count("reduce_scatter[") == 2  # of [D, 10] in the loop, of [D, 8] behind it
    assert jaxpr.count("psum") == 0


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [((4, 16), (2, 4, 1, 1), "4 rows .* over 8 devices .*data x fsdp"), ((8, 6), (1, 2, 1, 4), "6 positions .* 4 dev")],
)
def test_rows_that_do_not_divide_are_refused(shape, axes, message):
    with jax.set_mesh(make_mesh(MeshConfig(*axes))), pytest.raises(UserError, match=message):
        label_logprobs(jnp.zeros((*shape, D)), jnp.zeros((D, V)), jnp.zeros(shape, jnp.int32), IDS)


# ---- In the objectives


def pair(name: str):
    """(batch, reference parameters) of an objective."""
    random = np.random.default_rng(5)
    if name == "dpo":
        rows = [preference_row(random, 32, str(n)) for n in range(6)]
        return batch_of(rows, 32, "preference", empty=2), tiny_model(seed=1).params
    return batch_of([packed_row(random, 32, str(n)) for n in range(6)], 32, "pretrain", empty=2), None


def objective(name: str, form: str, model):
    return make_objective(dpo(form) if name == "dpo" else lm(1e-4, form), model.config, 2)


@pytest.mark.parametrize(("name", "tied"), [("lm", True), ("dpo", False)])
def test_objectives_have_the_sums_of_the_dense_form_on_a_mesh(name, tied):
    model = tiny_model(tie_embeddings=tied)
    batch, reference = pair(name)
    expected = jax.device_get(jax.jit(objective(name, "dense", model))(model.params, reference, batch))
    mesh = make_mesh(MeshConfig(1, 2, 2, 2))
    layout = shardings(mesh, abstract_params(model.config), logical_axes(model.config))
    with jax.set_mesh(mesh):
        params, frozen = jax.device_put((model.params, reference), (layout, reference and layout))
        found = jax.device_get(jax.jit(objective(name, "chunked", model))(params, frozen, batch))
    # Rewards are differences of log-probabilities, and round as those do.
    size = np.sum(batch["weights"]) * np.log(model.config.vocab_size)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7 * size), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tied"), [("lm", True), ("dpo", False)])
def test_objectives_have_the_gradient_of_the_dense_form(name, tied):
    model = tiny_model(tie_embeddings=tied)
    batch, reference = pair(name)
    found, expected = (
        jax.jit(jax.grad(objective(name, form, model), has_aux=True))(model.params, reference, batch)[0]
        for form in ("chunked", "dense")
    )
    assert_equal(found, expected, 1e-5)  # through the layers


# ---- Memory, and the choice between the forms


def test_the_automatic_form_is_dense_while_its_logits_fit_the_limit():
    padded = 125_824
    limit = DENSE_SHARE * UNKNOWN_MEMORY
    assert dense_bytes(4096, padded) == 2 * 4 * 4096 * padded <= limit < dense_bytes(8192, padded)
    for tokens, mesh, form in [
        (4096, {}, "dense"),
        (8192, {}, "chunked"),
        (16 * 4096, {"data": 2, "fsdp": 8, "tensor": 1, "context": 1}, "dense"),
        (32 * 4096, {"data": 2, "fsdp": 8, "tensor": 1, "context": 1}, "chunked"),
        (32 * 4096, {"data": 1, "fsdp": 4, "tensor": 2, "context": 4}, "dense"),
    ]:
        assert choose_form("auto", tokens, padded, mesh, None) == form
        assert choose_form("dense", tokens, padded, mesh, None) == "dense"
        assert choose_form("chunked", tokens, padded, mesh, None) == "chunked"
    assert [choose_form("auto", 8192, padded, {}, CHIPS[name]) for name in ("v5e", "v6e")] == ["chunked", "dense"]
    with pytest.raises(ValueError, match="'tiled' is unknown; there are: dense, chunked, auto"):
        lm(cross_entropy="tiled")


def temporary_bytes(logprobs, tokens, width, padded, ids, dtype, sharding=None) -> int:
    """What a compiled loss with its gradient needs beyond arguments and results."""
    shapes = [
        ((1, tokens, width), dtype),
        ((width, padded), "float32"),
        ((1, tokens), "int32"),
        ((1, tokens), "float32"),
    ]
    arguments = [jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in shapes]
    return step(logprobs, 1e-4, ids).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_chunks_never_hold_the_logits():
    tokens, padded = 256, 32_768
    dense, chunked = (
        temporary_bytes(form, tokens, 16, padded, padded - 5, "float32") for form in (dense_logprobs, label_logprobs)
    )
    assert dense > 4 * tokens * padded > 4 * chunked


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: pip install '.[tpu]'")
def test_the_loss_of_the_2b_head_fits_its_budget_on_v5e(monkeypatch):
    """The budget: 1.33 times one copy of the head in bfloat16."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), P())
    width, padded = 2048, 125_824
    needed = temporary_bytes(label_logprobs, 4096, width, padded, 125_696, "bfloat16", sharding)
    assert needed < 1.33 * 2 * width * padded
