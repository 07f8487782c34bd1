"""The flash kernels against attention in fp64, value and gradient, in interpret mode; lowering for TPU and GPU."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ctllm_jax.attention import BACKENDS, attention, cudnn, flash, sharded, tiles, xla
from ctllm_jax.attention.tiles import Tile, Tiling
from ctllm_jax.common.errors import UserError
from ctllm_jax.plan import gpu_target
from ctllm_jax.sharding import MeshConfig, make_mesh

# Tiles of different shapes in each kernel, so that sequences of a few hundred tokens span several of each.
TPU = Tiling("tpu", forward=Tile(128, 256, (2, 1)), dq=Tile(256, 128, (2, 1)), dkv=Tile(128, 128, (4, 2, 1)))
GPU = Tiling("gpu", forward=Tile(32, 16), dq=Tile(16, 32), dkv=Tile(32, 32))


def oracle(q, k, v, q_segments, kv_segments, dout, q_offset=0, dtype=np.float64):
    """(out, dq, dk, dv) in `dtype` from the formulas, and the size of the terms that each is a sum of."""
    q, k, v, dout = (np.asarray(x, dtype) for x in (q, k, v, dout))
    group = q.shape[2] // k.shape[2]
    k_all, v_all = (np.repeat(x, group, axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    causal = q_offset + np.arange(q.shape[1])[:, None] >= np.arange(k.shape[1])
    same = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    scores = np.where((causal & same)[:, None], np.einsum("blnh,btnh->bnlt", q, k_all) * scale, -np.inf)
    highest = np.max(scores, axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(axis=-1, keepdims=True)
    weights /= np.where(total == 0, 1, total)
    out = np.einsum("bnlt,btnh->blnh", weights, v_all)
    dweights = np.einsum("blnh,btnh->bnlt", dout, v_all)
    delta = np.einsum("blnh,blnh->bnl", dout, out)[..., None]

    def results(dscores, weights, q, k_all, v_all, dout):
        shares = (np.einsum("bnlt,blnh->btnh", dscores, q), np.einsum("bnlt,blnh->btnh", weights, dout))
        dk, dv = (x.reshape(*k.shape[:3], group, k.shape[3]).sum(axis=3) for x in shares)
        out = np.einsum("bnlt,btnh->blnh", weights, v_all)
        return out, np.einsum("bnlt,btnh->blnh", dscores, k_all), dk, dv

    values = results(weights * (dweights - delta) * scale, weights, q, k_all, v_all, dout)
    sizes = [np.abs(x) for x in (q, k_all, v_all, dout)]
    spread = weights * (
        1 + np.einsum("blnh,btnh->bnlt", *sizes[:2]) * scale
    )  # an error of a score is one of its weight
    return values, results(spread * (np.abs(dweights) + np.abs(delta)) * scale, spread, *sizes)


def draw(seed, B, L, N, K, H, dtype, T=None):
    rng = np.random.default_rng(seed)
    shapes = [(B, L, N, H), (B, T or L, K, H), (B, T or L, K, H), (B, L, N, H)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def packed(lengths, L):
    """Segments 1, 2, ... of these lengths, then padding."""
    row = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:L]
    return np.pad(row, (0, L - len(row))).astype(np.int32)


def value_and_gradients(function, q, k, v, dout):
    def run(q, k, v, dout):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    # The interpreter's loops, and plain attention's products on a GPU, compile for longer than they run.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    run = jax.jit(run, compiler_options=options if jax.default_backend() == "cpu" else {"xla_gpu_autotune_level": 0})
    return [np.asarray(x, np.float64) for x in run(q, k, v, dout)]


def check(*arrays, tiling, q_offset=0, interpret=True):
    """The flash kernels."""
    compare(functools.partial(flash.attention, tiling=tiling, interpret=interpret), *arrays, q_offset=q_offset)


def compare(kernel, q, k, v, dout, q_segments, kv_segments, *, q_offset=0):
    """Errors at most twice those of the xla backend or of the formulas in fp32 (on a GPU xla splits sums, which makes
    them finer), and the rounding of fp32 where neither has any; exact zeros where nothing is seen."""
    segments = {"q_segments_BL": q_segments, "kv_segments_BT": kv_segments, "q_offset": q_offset}
    ours = functools.partial(kernel, **segments)
    theirs = functools.partial(xla.attention, **segments)
    arrays = q, k, v, q_segments, kv_segments, dout, q_offset
    (want, sizes), (in_fp32, _) = oracle(*arrays), oracle(*arrays, dtype=np.float32)
    found = value_and_gradients(ours, q, k, v, dout)
    reference = value_and_gradients(theirs, q, k, v, dout)
    results = zip(("out", "dq", "dk", "dv"), found, reference, in_fp32, want, sizes, strict=True)
    for name, a, b, c, exact, size in results:
        assert np.all(np.isfinite(a)), name
        error, allowed = np.linalg.norm(a - exact), 2 * max(np.linalg.norm(b - exact), np.linalg.norm(c - exact))
        if not allowed:  # rows see one key each: the terms of xla cancel to the bit, ours to the rounding of fp32
            allowed = 2.0**-24 * np.linalg.norm(size)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    for array in found[:2]:
        assert not np.any(array[np.asarray(q_segments) == 0]), "padding queries"
    for array in found[2:]:
        assert not np.any(array[np.asarray(kv_segments) == 0]), "padding keys"


SEGMENTS = {
    "one document": lambda L: np.ones((1, L), np.int32),
    "ragged": lambda L: np.stack([packed([L // 2 + 3, L // 3, 5], L), packed([1, L // 4, L // 2], L)]),
    "one-token documents": lambda L: np.arange(1, L + 1, dtype=np.int32)[None],
    "a row of padding": lambda L: np.stack([np.zeros(L, np.int32), packed([L - 9], L)]),
    "padding before and between": lambda L: np.repeat(np.int32([[0, 2, 0, 2, 1]]), -(-L // 5), axis=1)[:, :L],
    "unordered": lambda L: np.random.default_rng(5).integers(0, 4, size=(2, L)).astype(np.int32),
}
CASES = [  # segments, length, query heads, key/value heads, head size, dtype, tiling
    ("ragged", 300, 2, 2, 64, "float32", TPU),
    ("ragged", 300, 4, 2, 128, "bfloat16", TPU),
    ("one document", 513, 1, 1, 64, "bfloat16", TPU),
    ("one document", 1, 2, 1, 256, "float32", TPU),
    ("a row of padding", 270, 2, 1, 256, "bfloat16", TPU),
    ("padding before and between", 52, 3, 1, 64, "float32", GPU),
    ("one-token documents", 77, 2, 2, 128, "float32", GPU),
    ("ragged", 77, 4, 1, 64, "bfloat16", GPU),
    ("unordered", 96, 2, 2, 64, "float32", GPU),
    ("a row of padding", 33, 1, 1, 256, "float32", GPU),
    ("one document", 100, 6, 2, 128, "bfloat16", GPU),
]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("N", "K"), [(2, 2), (4, 2)])
def test_plain_attention_is_that_of_the_formulas(segments, N, K):
    """Lengths of less than a block, of some, of a block and a bit."""
    for L in (40, xla.BLOCK + 1, 3 * xla.BLOCK):
        rows = SEGMENTS[segments](L)
        q, k, v, dout = draw(L, len(rows), L, N, K, 16, jnp.float32)
        want, sizes = oracle(q, k, v, rows, rows, dout)
        ours = functools.partial(xla.attention, q_segments_BL=rows, kv_segments_BT=rows)
        for a, b, size in zip(value_and_gradients(ours, q, k, v, dout), want, sizes, strict=True):
            assert np.linalg.norm(a - b) <= 2.0**-24 * np.linalg.norm(size)  # the rounding of fp32


@pytest.mark.parametrize(("segments", "L", "N", "K", "H", "dtype", "tiling"), CASES)
def test_value_and_gradient_are_as_good_as_those_of_xla(segments, L, N, K, H, dtype, tiling):
    segments = SEGMENTS[segments](L)
    check(*draw(L, len(segments), L, N, K, H, dtype), segments, segments, tiling=tiling)


CUDNN_CASES = [  # segments, length, query heads, key/value heads, head size, dtype
    ("ragged", 77, 4, 2, 128, "bfloat16"),
    ("ragged", 77, 2, 2, 64, "float32"),
    ("a row of padding", 33, 2, 1, 64, "bfloat16"),
    ("padding before and between", 52, 3, 1, 8, "float32"),
    ("one-token documents", 40, 2, 2, 64, "float32"),
    ("unordered", 96, 2, 2, 64, "float32"),
]


@pytest.mark.parametrize(("segments", "L", "N", "K", "H", "dtype"), CUDNN_CASES)
def test_what_cudnn_is_asked_for(segments, L, N, K, H, dtype):
    """Its mask, its padding and the order of heads, through JAX's own implementation of the same function."""
    segments = SEGMENTS[segments](L)
    kernel = functools.partial(cudnn.attention, implementation="xla")
    compare(kernel, *draw(L, len(segments), L, N, K, H, dtype), segments, segments)


def test_what_cudnn_is_asked_for_of_a_stretch_of_the_queries():
    segments = np.stack([packed([40, 30, 60], 160), packed([100, 50], 160)])
    arrays = draw(1, 2, 53, 2, 1, 64, "float32", T=160)
    kernel = functools.partial(cudnn.attention, implementation="xla")
    compare(kernel, *arrays, segments[:, 75:128], segments, q_offset=np.int32(75))


def test_queries_may_start_anywhere_among_the_keys():
    kv_segments = np.stack([packed([40, 30, 60], 160), packed([100, 50], 160)])
    check(
        *draw(1, 2, 48, 2, 1, 64, "float32", T=160),
        kv_segments[:, 75:123],
        kv_segments,
        tiling=GPU,
        q_offset=np.int32(75),
    )


def test_tpu_semantics_without_races():
    """Memory spaces, block copies and two cores as on a TPU; what is not initialised reads as NaN."""
    interpreter = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")  # no public name
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
    segments = SEGMENTS["ragged"](150)[:1]
    tiling = dataclasses.replace(TPU, forward=Tile(128, 128), dq=Tile(128, 128))
    check(*draw(2, 1, 150, 2, 1, 64, "bfloat16"), segments, segments, tiling=tiling, interpret=interpret)
    assert not interpreter.races.races_found


@pytest.mark.parametrize("rows", ["queries", "keys"])
@pytest.mark.parametrize("q_offset", [0, 24])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_the_schedule_visits_every_visible_tile(segments, q_offset, rows):
    kv_segments = SEGMENTS[segments](96)
    q_segments = kv_segments[:, q_offset : q_offset + 64]
    tile = Tile(16, 8)
    first, split, stop = tiles.schedule(q_segments, kv_segments, np.int32(q_offset), tile, rows=rows)
    causal = q_offset + np.arange(64)[:, None] >= np.arange(96)
    same = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    tiled = causal.reshape(4, 16, 12, 8)
    visible = (causal & same).reshape(-1, 4, 16, 12, 8).any(axis=(2, 4))
    whole = np.broadcast_to(tiled.all(axis=(1, 3)), visible.shape)  # no causal mask needed
    if rows == "keys":
        visible, whole = visible.swapaxes(1, 2), whole.swapaxes(1, 2)
    index = np.arange(visible.shape[-1])
    visited = (index >= first[..., None]) & (index < stop[..., None])
    unmasked = visited & ((index < split[..., None]) if rows == "queries" else (index >= split[..., None]))
    assert not np.any(visible & ~visited)
    assert not np.any(unmasked & ~whole)
    if segments in ("one document", "one-token documents"):
        assert np.array_equal(visible, visited)


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize(
    "kernel",
    [
        sharded.Kernel(flash.attention, tiling=GPU, interpret=True),
        sharded.Kernel(cudnn.attention, implementation="xla"),
    ],
    ids=["flash", "cudnn"],
)
def test_shards_of_a_mesh_give_the_same(kernel, context):
    q, k, v, dout = draw(3, 2, 128, 4, 2, 64, "float32")
    segments = SEGMENTS["ragged"](128)
    want, _ = oracle(q, k, v, segments, segments, dout)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=context), jax.devices()[: 4 * context])):
        on_mesh = functools.partial(sharded.attention, kernel, q_segments_BL=segments, kv_segments_BL=segments)
        found = value_and_gradients(on_mesh, q, k, v, dout)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_a_mesh_that_does_not_divide_is_refused():
    q, k, v, _ = draw(3, 2, 128, 4, 2, 64, "float32")
    segments = SEGMENTS["ragged"](128)
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 4, 1))), pytest.raises(UserError, match="kv_heads 2"):
        sharded.attention(sharded.Kernel(flash.attention, tiling=GPU), q, k, v, segments, segments)


def step(tiling, q, k, v, segments, dout):
    out, pull = jax.vjp(lambda *a: flash.attention(*a, segments, segments, tiling=tiling), q, k, v)
    return out, pull(dout)


def arguments(L, N, K, H, dtype, **kwargs):
    shapes = [((2, L, N, H), dtype), *[((2, L, K, H), dtype)] * 2, ((2, L), "int32"), ((2, L, N, H), dtype)]
    return [jax.ShapeDtypeStruct(shape, kind, **kwargs) for shape, kind in shapes]


SHAPES = [(512, 4, 2, 128, "bfloat16"), (2000, 2, 2, 64, "float32"), (4096, 2, 1, 256, "bfloat16")]  # L, N, K, H


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("platform", "kind"), [("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H200")])
def test_the_kernels_lower_for(platform, kind, shape):
    """Without a plugin: shapes, layouts and primitives that the compiler's front end refuses are found here."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    function = jax.jit(functools.partial(step, flash.tiling_for(platform, kind)))
    unstable = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.export.export(
            function, platforms=["cuda" if platform == "gpu" else "tpu"], disabled_checks=[unstable]
        )(*arguments(*shape))
    assert lowered.mlir_module().count("stablehlo.custom_call @" + ("tpu" if platform == "tpu" else "__gpu")) == 3


TOPOLOGIES = {"v4:2x2x1": {"chip_config_name": "megacore"}, "v5e:2x2": {}, "v5p:2x2x1": {}, "v6e:2x2": {}}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: pip install '.[tpu]'")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_kernels_compile_through_mosaic(topology, shape, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = TOPOLOGIES[topology]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    tiling = flash.tiling_for("tpu", devices[0].device_kind)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(functools.partial(step, tiling)).lower(
            *arguments(*shape, sharding=NamedSharding(mesh, PartitionSpec()))
        )
        compiled = lowered.compile()
    scores = 4 * 2 * shape[1] * shape[0] ** 2
    if shape[0] == 4096:
        assert compiled.memory_analysis().temp_size_in_bytes < scores / 4


@pytest.mark.slow
@pytest.mark.skipif(not gpu_target.available(), reason="no CUDA plugin: pip install '.[cuda]' (it needs no GPU)")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chip", gpu_target.GPUS)
def test_the_kernels_compile_for_a_gpu(chip, shape):
    """In a chip's shared memory and registers: the compiler refuses what exceeds either. Nothing has run on one."""
    (device,) = gpu_target.topology(chip, 1, 1)
    mesh = Mesh(np.array([device]), ("x",))
    tiling = flash.tiling_for("gpu", device.device_kind)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        described = arguments(*shape, sharding=NamedSharding(mesh, PartitionSpec()))
        lowered = jax.jit(functools.partial(step, tiling)).lower(*described)
        compiled = lowered.compile(compiler_options={"xla_gpu_fail_ptx_compilation_on_register_spilling": True})
    scores = 4 * 2 * shape[1] * shape[0] ** 2
    if shape[0] == 4096:
        assert compiled.memory_analysis().temp_size_in_bytes < scores / 4


@pytest.mark.slow
@pytest.mark.skipif(not gpu_target.available(), reason="no CUDA plugin: pip install '.[cuda]' (it needs no GPU)")
@pytest.mark.parametrize("head_size", [8, 128])
@pytest.mark.parametrize("chip", gpu_target.GPUS)
def test_cudnn_is_called_through_the_entry_point(chip, head_size):
    """An odd length, heads in groups: one call of cuDNN forward, one backward, no fp32 scores in memory."""
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), list(gpu_target.topology(chip, 1, 1)))

    def run(q, k, v, segments, dout):
        out, pull = jax.vjp(lambda *a: attention(*a, segments, segments, backend="cudnn"), q, k, v)
        return out, pull(dout)

    with jax.set_mesh(mesh):
        described = arguments(4095, 8, 2, head_size, "bfloat16", sharding=NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(run).lower(*described).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="__cudnn$fmhaScaleBiasSoftmax"') == 1
    assert text.count('custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"') == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2 * 8 * 4095**2 / 2  # half of the fp32 scores


def test_unknown_and_unsupported_requests_are_refused():
    q, k, v, _ = draw(4, 1, 8, 2, 1, 64, "float32")
    segments = np.ones((1, 8), np.int32)
    with pytest.raises(UserError, match="unknown; there are: cudnn, pallas_gpu, pallas_tpu, xla"):
        attention(q, k, v, segments, segments, backend="flash")
    with pytest.raises(UserError, match="'pallas_tpu' does not support platform cpu; these do: xla"):
        attention(q, k, v, segments, segments, backend="pallas_tpu")
    assert BACKENDS["pallas_gpu"].refusals("gpu", 96, "float16") == ["head size 96", "dtype float16"]
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        with pytest.raises(UserError, match="'cudnn' does not support dtype float32; these do: pallas_gpu, xla"):
            attention(q, k, v, segments, segments, backend="cudnn")


def test_a_call_with_a_cache_goes_to_the_backend_the_table_names():
    q, k, v, _ = draw(5, 1, 8, 2, 1, 64, "float32")
    segments = np.ones((1, 8), np.int32)
    for queries, offset in ((q[:, 5:7], 5), (q, jnp.int32(0))):
        at = segments[:, : queries.shape[1]]
        found = attention(queries, k, v, at, segments, q_offset=offset, backend="pallas_tpu")
        want = attention(queries, k, v, at, segments, q_offset=offset, backend="xla")
        assert np.array_equal(found, want)
