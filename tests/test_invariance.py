"""Loss and gradient do not depend on how a batch is computed: by microbatch, layout, padding, form of the loss, mesh.

In fp32 up to rounding; in fp64 so closely that a mean of means, a mask that leaks or a weight that counts twice could
not hide. The rows' masks are very uneven. Numbers of processes: test_processes.py.
"""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_models import tiny_config
from tiny_objectives import dpo, lm
from tiny_stores import batch_of, packed_row, preference_row

from ctllm_jax.data.record import Row
from ctllm_jax.model import ModelConfig, abstract_params, logical_axes
from ctllm_jax.objectives import make_objective
from ctllm_jax.sharding import MeshConfig, make_mesh, shardings
from ctllm_jax.step import abstract_batch, gradient

LENGTH = 24
TOLERANCE = {"float32": (1e-6, 1e-5), "float64": (1e-10, 1e-10)}  # of the loss; of each parameter's gradient, in norm
both = pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])


@functools.cache
def chat_rows() -> list[Row]:
    """Eight packed rows, of whose tokens a share between none and all is learned."""
    random, rows = np.random.default_rng(3), []
    for number in range(8):
        row = packed_row(random, LENGTH, str(number))
        mask = (random.random(len(row.tokens)) < (number / 7) ** 2).astype(np.uint8)
        rows.append(dataclasses.replace(row, mask=mask))
    assert not rows[0].mask.any() and rows[-1].mask.all()
    return rows


@functools.cache
def pairs() -> list[Row]:
    """Five preference pairs, three of them again, one of those with nothing to learn."""
    random = np.random.default_rng(4)
    rows = [preference_row(random, LENGTH, str(number)) for number in range(5)]
    return [*rows, rows[0], rows[1], dataclasses.replace(rows[2], mask=np.zeros_like(rows[2].mask))]


def batch_for(kind: str, rows: list[Row] | None = None, length: int = LENGTH, empty: int = 0) -> dict:
    return batch_of(rows or {"chat": chat_rows, "preference": pairs}[kind](), length, kind, empty)


def computed(
    dtype: str,
    batch: dict,
    kind: str = "chat",
    axes: tuple[int, ...] = (1, 1, 1, 1),
    microbatches: int = 1,
    form: str = "dense",
    remat: str = "none",
) -> tuple[dict, dict]:
    """(gradient by parameter, sums) of a batch, laid over a mesh of as many devices as the axes take."""
    config = tiny_config(dtype=dtype, param_dtype=dtype, d_ff=64, remat=remat)
    objective = make_objective(lm(1e-4, form) if kind == "chat" else dpo(form, beta=0.3), config, 2)
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: np.prod(axes)])
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext(), jax.set_mesh(mesh):
        layout = shardings(mesh, abstract_params(config), logical_axes(config))
        policy, reference = (jax.device_put(random_params(config, seed), layout) for seed in (0, 1))
        rows, *sides, length = batch["tokens"].shape
        places = jax.tree.map(lambda x: x.sharding, abstract_batch(rows, length, tuple(sides), mesh))
        step = jax.jit(functools.partial(gradient, objective=objective, microbatches=microbatches))
        frozen = reference if kind == "preference" else None
        grads, sums = jax.device_get(step(policy, frozen, jax.device_put(batch, places)))
    flat = jax.tree_util.tree_flatten_with_path(grads)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}, sums


def random_params(config: ModelConfig, seed: int) -> dict:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(leaf.dtype), abstract_params(config))


@functools.cache
def expected(dtype: str, kind: str = "chat") -> tuple[dict, dict]:
    return computed(dtype, batch_for(kind), kind)


def assert_same(found: tuple[dict, dict], dtype: str, kind: str = "chat") -> None:
    (grads, sums), (known, totals) = found, expected(dtype, kind)
    loss_tolerance, gradient_tolerance = TOLERANCE[dtype]
    assert float(sums["count"]) == float(totals["count"]) > 0
    np.testing.assert_allclose(sums["loss"], totals["loss"], rtol=loss_tolerance)
    assert grads.keys() == known.keys()
    for name, grad in known.items():
        assert grads[name].dtype == dtype
        distance = np.linalg.norm(np.float64(grads[name]) - grad) / np.linalg.norm(np.float64(grad))
        assert distance <= gradient_tolerance, (name, distance)


@both
@pytest.mark.parametrize(("kind", "microbatches"), [("chat", 8), ("preference", 4)])
def test_by_microbatches(dtype, kind, microbatches):
    assert_same(computed(dtype, batch_for(kind), kind, microbatches=microbatches), dtype, kind)


def apart(rows: list[Row]) -> list[Row]:
    """The documents of packed rows, one to a row."""
    return [
        Row(row.tokens[end - size : end], [size], [name], row.mask[end - size : end], 0)
        for row in rows
        for name, size, end in zip(row.ids, row.lengths, np.cumsum(row.lengths), strict=True)
    ]


def packed_anew(documents: list[Row], length: int) -> list[Row]:
    """The documents from last to first, each in the first row that has room for it."""
    filled: list[list[Row]] = []
    for document in reversed(documents):
        room = (row for row in filled if sum(len(one.tokens) for one in row) + len(document.tokens) <= length)
        row = next(room, None)
        if row is None:
            filled.append(row := [])
        row.append(document)
    return [
        Row(
            np.concatenate([one.tokens for one in row]),
            [len(one.tokens) for one in row],
            [one.ids[0] for one in row],
            np.concatenate([one.mask for one in row]),
            0,
        )
        for row in filled
    ]


@both
def test_by_packing(dtype):
    documents = apart(chat_rows())
    assert len(documents) > len(chat_rows())
    assert_same(computed(dtype, batch_for("chat", documents)), dtype)
    rows = packed_anew(documents, 2 * LENGTH)
    assert len(rows) < len(chat_rows()) and len({len(row.lengths) for row in rows}) > 1
    assert_same(computed(dtype, batch_for("chat", rows, length=2 * LENGTH)), dtype)


@both
@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_by_padding(dtype, kind):
    assert_same(computed(dtype, batch_for(kind, length=LENGTH + 9, empty=3), kind), dtype, kind)


@both
def test_by_form_of_the_loss_and_what_is_kept_for_the_backward_pass(dtype):
    assert_same(computed(dtype, batch_for("chat"), form="chunked", remat="full"), dtype)


@both
def test_by_mesh(dtype):
    assert_same(computed(dtype, batch_for("chat"), axes=(1, 2, 2, 2), microbatches=2, form="chunked"), dtype)


@pytest.mark.slow
@both
@pytest.mark.parametrize("kind", ["chat", "preference"])
@pytest.mark.parametrize("form", ["dense", "chunked"])
@pytest.mark.parametrize("axes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 1, 2, 4), (1, 1, 1, 2, 4)])
def test_by_every_kind_of_mesh(dtype, kind, form, axes):
    assert_same(computed(dtype, batch_for(kind), kind, axes, form=form), dtype, kind)


def test_the_comparison_would_notice_a_mean_of_means():
    """What it guards against: microbatches of unequal weight, each divided by its own count."""
    batch = batch_for("chat")
    halves = [computed("float32", jax.tree.map(lambda x, s=start: x[s::2], batch)) for start in (0, 1)]
    means = jax.tree.map(lambda a, b: (a + b) / 2, halves[0][0], halves[1][0])
    with pytest.raises(AssertionError):
        assert_same((means, expected("float32")[1]), "float32")
