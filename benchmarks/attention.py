"""Attention kernels: ours beside jax's own, by the TPU compiler's static cycles or timed on a GPU.

    python benchmarks/attention.py [--quick] [--part PART] [--chip CHIP ...] [--over square causal]

static     cycles that libtpu states for each kernel compiled alone, no accelerator needed; an estimate
gpu        forward and backward on the GPU at hand, beside cuDNN, jax's Pallas kernel and tokamax

benchmarks/README.md says what is counted, and how.
"""

import argparse
import functools
import importlib.util
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from common import finish, table

from ctllm_jax.attention import BACKENDS
from ctllm_jax.hardware import CHIPS
from ctllm_jax.plan.estimate import PRODUCTS
from ctllm_jax.plan.kernel_cycles import CORES, KERNELS, by_kernel, static_cycles

HEADS, LENGTH, HEAD_DIM = 16, 4096, 128
SCORES = LENGTH * LENGTH  # of a head
# Queries; keys of a grid cell; keys of a step. For dkv, which holds keys: keys; queries of a cell; queries of a step.
# With all 4,096 of the other side in a cell, jax's kernels have no loop left for the square, but skip little causally.
BLOCKS = {
    "square": {
        "forward": [(512, 4096, 1024), (512, 4096, 512), (512, 2048, 512), (1024, 1024, 1024)],
        "dq": [(256, 4096, 1024), (512, 4096, 512), (1024, 4096, 512), (1024, 1024, 1024)],
        "dkv": [(512, 4096, 512), (1024, 4096, 512), (256, 4096, 1024), (1024, 1024, 1024)],
    },
    "causal": dict.fromkeys(KERNELS, [(512, 512, 512), (512, 1024, 1024), (1024, 1024, 1024), (512, 2048, 512)]),
}


def main() -> None:
    """Runs the parts that are asked for and prints their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="v5p alone and one size of blocks; few rounds on a GPU")
    parser.add_argument("--part", choices=("static", "gpu"), help="only this one; else gpu where there is one")
    parser.add_argument("--chip", nargs="*", choices=("v5e", "v5p"), help="chips of the static part")
    parser.add_argument("--over", nargs="*", choices=tuple(BLOCKS), default=tuple(BLOCKS), help="for the static part")
    options = parser.parse_args()
    has_gpu = any(pathlib.Path("/dev").glob("nvidia[0-9]*"))
    jax.config.update("jax_platforms", "cuda" if has_gpu else "cpu")  # libtpu, where installed, would look for a TPU
    part = options.part or ("gpu" if has_gpu else "static")
    if part == "gpu" and not has_gpu:
        print("gpu: no GPU here, nothing was timed")
        figures = {}
    elif part == "gpu":
        figures = gpu(rounds=3 if options.quick else 20)
    else:
        chips = options.chip or (["v5p"] if options.quick else ["v5e", "v5p"])
        figures = {name: value for chip in chips for name, value in static(chip, options.over, options.quick).items()}
    ratios = {name: value for name, value in figures.items() if name.endswith("_ratio")}
    finish(ratios | figures | {"part": part, "quick": options.quick})


# ---- static cycles


def static(chip: str, over: Sequence[str], quick: bool) -> dict[str, float]:
    """Ours and jax's, segment ids compared in each tile: the whole square, then a causal pass."""
    figures = {}
    for measured in over:
        figures |= _static(chip, measured, quick)
    return figures


def _static(chip: str, measured: str, quick: bool) -> dict[str, float]:
    heads = CORES[chip] if measured == "causal" else 1  # cores share the heads, and the square of one evenly
    size = {"measured": measured, "kv_heads": heads, "length": LENGTH, "head_dim": HEAD_DIM}
    cycles = by_kernel(static_cycles(chip, "ctllm_jax.plan.kernel_cycles:ours", {"group": 1, **size}))
    rows, figures = [], {}
    for kernel in KERNELS:
        flops = 2 * PRODUCTS[kernel] * heads * SCORES * HEAD_DIM / (2 if measured == "causal" else 1)
        blocks = BLOCKS[measured][kernel][: 1 if quick else None]
        requests = [{"kernel": kernel, "blocks": sizes, **size} for sizes in blocks]
        found = [static_cycles(chip, "attention:jax_flash", request) for request in requests]
        compiled = {sizes: max(one.values()) for sizes, one in zip(blocks, found, strict=True) if one}
        contestants = {"ctllm": cycles[kernel]}
        contestants |= {f"jax {' '.join(map(str, sizes))}": count for sizes, count in compiled.items()}
        for name, count in contestants.items():
            rows.append((f"{kernel}: {name}", count, flops / (count / CHIPS[chip].clock) / 1e12))
        best = min(compiled.values())
        figures[f"{chip}_{measured}_{kernel}_to_jax_ratio"] = best / contestants["ctllm"]
        figures[f"{chip}_{measured}_{kernel}_cycles"] = contestants["ctllm"]
        figures[f"{chip}_{measured}_{kernel}_jax_cycles"] = best
    title = f"static, {chip}: {measured}, {heads} head(s), length {LENGTH:,}, head size {HEAD_DIM}, bf16, segments"
    table(title, ("kernel", "cycles", "TFLOP/s"), rows)
    return figures


def jax_flash(
    kind: str, *, measured: str, kernel: str, blocks: tuple[int, int, int], kv_heads: int, length: int, head_dim: int
) -> tuple:
    """One of jax's TPU kernels, for `static_cycles`; private functions, so that each stands alone."""
    from jax.experimental.pallas.ops.tpu import flash_attention as peer

    held, major, minor = blocks
    scale, causal = head_dim**-0.5, measured == "causal"
    common = {"sm_scale": scale, "causal": causal, "mask_value": peer.DEFAULT_MASK_VALUE, "debug": False}

    def forward(q, k, v, segments):
        ids = peer.SegmentIds(segments, segments)
        return peer._flash_attention_impl(q, k, v, None, ids, True, causal, scale, 1, held, major, minor, False)

    def dq(q, k, v, segments, *rest):
        ids = peer.SegmentIds(segments, segments)
        sizes = {"block_q_major": held, "block_k_major": major, "block_k": minor}
        return peer._flash_attention_bwd_dq(q, k, v, None, ids, *rest, **sizes, **common)[0]

    def dkv(q, k, v, segments, *rest):
        ids = peer.SegmentIds(segments, segments)
        sizes = {"block_q_major": major, "block_q": minor, "block_k_major": held, "block_k": held}
        return peer._flash_attention_bwd_dkv(q, k, v, None, ids, *rest, **sizes, **common)

    values = jax.ShapeDtypeStruct((1, kv_heads, length, head_dim), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((1, kv_heads, length), jnp.float32)
    shapes = (values, values, values, jax.ShapeDtypeStruct((1, length), jnp.int32))
    if kernel == "forward":
        return forward, shapes
    return {"dq": dq, "dkv": dkv}[kernel], (*shapes, row, row, values, row)


# ---- on a GPU


def gpu(rounds: int) -> dict[str, float]:
    """TFLOP/s of forward and backward, causal, 4 sequences: one document a row, then eight."""
    batch = 4
    rng = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(batch, LENGTH, HEADS, HEAD_DIM)), jnp.bfloat16) for _ in range(4))
    whole = jnp.ones((batch, LENGTH), jnp.int32)
    packed = jnp.broadcast_to(1 + jnp.arange(LENGTH) * 8 // LENGTH, (batch, LENGTH)).astype(jnp.int32)
    flops = 2 * (2 + 5) * batch * HEADS * SCORES / 2 * HEAD_DIM  # two products forward, five backward, half the square
    rows, seconds = [], {}
    for name, function in _contestants(whole, packed).items():
        try:
            seconds[name] = _seconds(function, (q, k, v, dout), rounds)
        except Exception as error:  # a peer that does not run here is named, and the others still count
            rows.append((name, f"{type(error).__name__}: {str(error).splitlines()[0][:60]}", ""))
            continue
        rows.append((name, 1000 * seconds[name], flops / seconds[name] / 1e12))
    title = f"gpu, {jax.devices()[0].device_kind}: batch {batch}, {HEADS} heads, length {LENGTH:,}, bf16, causal"
    table(f"{title}; TFLOP/s as if each row were one document", ("", "ms", "TFLOP/s"), rows)
    peers = [value for name, value in seconds.items() if not name.startswith("ctllm pallas") and "packed" not in name]
    figures = {f"{name.replace(' ', '_')}_ms": 1000 * value for name, value in seconds.items()}
    if peers and "ctllm pallas" in seconds:
        figures["gpu_to_fastest_peer_ratio"] = min(peers) / seconds["ctllm pallas"]
    return figures


def _contestants(whole: jax.Array, packed: jax.Array) -> dict[str, Callable]:
    """(q, k, v) -> out; "packed": eight documents in a row, which only some can tell apart."""
    from jax.experimental.pallas.ops.gpu import attention as pallas

    def ours(backend: str, segments: jax.Array) -> Callable:
        call = BACKENDS[backend].call
        return lambda q, k, v: call(q, k, v, segments, segments)

    def jax_pallas(segments: jax.Array | None) -> Callable:
        sizes = pallas.BlockSizes(128, 64, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64)
        return lambda q, k, v: pallas.mha(q, k, v, segments, HEAD_DIM**-0.5, True, sizes)

    found = {
        "ctllm pallas": ours("pallas_gpu", whole),
        "ctllm pallas packed": ours("pallas_gpu", packed),
        "cudnn": functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"),
        "ctllm cudnn packed": ours("cudnn", packed),
        "jax pallas": jax_pallas(None),
        "jax pallas packed": jax_pallas(packed),
    }
    if importlib.util.find_spec("tokamax"):
        import tokamax

        found["tokamax"] = functools.partial(tokamax.dot_product_attention, is_causal=True)
    return found


def _seconds(function: Callable, arrays: tuple, rounds: int) -> float:
    """Median seconds of value and gradient, after two runs that are not counted."""

    @jax.jit
    def step(q, k, v, dout):
        out, pull = jax.vjp(function, q, k, v)
        return out, pull(dout)

    taken = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        jax.block_until_ready(step(*arrays))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


if __name__ == "__main__":
    main()
