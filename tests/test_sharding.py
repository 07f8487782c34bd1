"""Where arrays lie: every parameter's place, and layouts that are refused."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import tiny_config

from ctllm_jax.common.errors import UserError
from ctllm_jax.model import abstract_params, logical_axes
from ctllm_jax.sharding import RULES, MeshConfig, constrain, make_mesh, shardings, spec

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")


def flat(tree) -> dict:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


# ---- Rules


@pytest.mark.parametrize("axes", [("heads", "mlp"), ("batch", "embed"), ("vocab", "kv_heads"), ("embed", "embed")])
def test_axes_that_would_use_a_mesh_axis_twice_are_refused(axes):
    with pytest.raises(ValueError, match=r"use a mesh axis twice: .*(tensor|fsdp)"):
        spec(axes)


def test_rules_name_mesh_axes_only():
    known = {"slice", "data", "fsdp", "tensor", "context"}
    assert all(set(entry) <= known for entry in RULES.values())
    assert spec(("batch", "length", None)) == P(("slice", "data", "fsdp"), "context", None)
    with pytest.raises(KeyError, match="width"):
        spec(("width",))


PLACES = {
    "embed": P("tensor", "fsdp"),
    "final_norm": P(None),
    "head": P("fsdp", "tensor"),
    "layers/attention_norm": P(None, None),
    "layers/q": P(None, "fsdp", "tensor", None),
    "layers/k": P(None, "fsdp", "tensor", None),
    "layers/v": P(None, "fsdp", "tensor", None),
    "layers/out": P(None, "tensor", None, "fsdp"),
    "layers/q_norm": P(None, None),
    "layers/k_norm": P(None, None),
    "layers/mlp_norm": P(None, None),
    "layers/gate": P(None, "fsdp", "tensor"),
    "layers/up": P(None, "fsdp", "tensor"),
    "layers/down": P(None, "tensor", "fsdp"),
}


@pytest.mark.parametrize(
    "axes", [(8, 1, 1, 1), (1, 8, 1, 1), (1, 4, 2, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 2, 2, 1, 2)]
)
def test_every_parameter_lies_where_the_table_says(axes):
    config = tiny_config(qk_norm=True)
    abstract = abstract_params(config)
    mesh = make_mesh(MeshConfig(*axes))
    layout = shardings(mesh, abstract, logical_axes(config))
    assert {name: sharding.spec for name, sharding in flat(layout).items()} == PLACES
    _, fsdp, tensor, *_ = axes
    for name, sharding in flat(layout).items():
        shape = flat(abstract)[name].shape
        ways = {"fsdp": fsdp, "tensor": tensor, None: 1}
        expected = tuple(size // ways[axis] for size, axis in zip(shape, PLACES[name], strict=True))
        assert sharding.mesh == mesh and sharding.shard_shape(shape) == expected


@pytest.mark.parametrize(
    ("changes", "axes", "message"),
    [
        ({"num_kv_heads": 1}, (1, 4, 2, 1), r"layers/k .*size 1 does not divide over 2 devices of axis tensor"),
        ({"d_ff": 50}, (1, 2, 4, 1), r"layers/(down|gate|up|k) .*does not divide over 4 devices of axis tensor"),
        ({"d_model": 36}, (1, 8, 1, 1), r"embed \(384, 36\): size 36 does not divide over 8 devices of axis fsdp"),
        ({"padded_vocab_size": 385}, (4, 1, 2, 1), r"embed \(385, 32\): size 385 does not divide over 2 devices"),
    ],
)
def test_a_parameter_that_does_not_divide_is_named(changes, axes, message):
    config = tiny_config(**changes)
    with pytest.raises(UserError, match=message):
        shardings(make_mesh(MeshConfig(*axes)), abstract_params(config), logical_axes(config))


# ---- Meshes


def test_one_mesh_axis_takes_what_is_left():
    found = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2, context=1, slice=2)).shape
    assert dict(found) == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2, "context": 1}
    assert dict(make_mesh(MeshConfig(1, -1, 1, 1), jax.devices()[:3]).shape)["fsdp"] == 3


@pytest.mark.parametrize(
    "axes",
    [(1, 1, 1, 1), (3, -1, 1, 1), (16, 1, 1, 1), (-1, -1, 8, 1), (-2, -4, 1, 1), (0, -1, 1, 1), (1, -1, 16, 1)],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(axes):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(*axes))


def test_constraints_do_nothing_without_a_mesh():
    x = np.ones((3, 5), np.float32)
    assert constrain(x, "batch", "length") is x
