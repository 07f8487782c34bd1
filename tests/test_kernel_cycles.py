"""Static cycles of the attention kernels: how profiles are read, and that jax's take no fewer."""

import importlib.util
import pathlib
import sys

import pytest

from ctllm_jax.common.errors import UserError
from ctllm_jax.plan import kernel_cycles
from ctllm_jax.plan.kernel_cycles import KERNELS, by_kernel, kernel_seconds, parse

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

import attention as benchmark

OF = ("cycles", "jax_cycles")  # of ours, of jax's

# As libtpu 0.0.42.1 writes them, one file for each operation.
PROFILES = [
    """hlo_op_estimate {
  hlo_op_name: "jvp_flash_attention_forward_.1"
  estimated_cycles: 77235
  num_equivalent_hlos: 1
  dma_instruction_type: DMA_INSTRUCTION_TYPE_LOCAL
  scalar_inputs: 0
}
""",
    'hlo_op_estimate {\n  hlo_op_name: "convert_reduce_fusion"\n  estimated_cycles: 153\n}\n',
    'hlo_op_estimate {\n  hlo_op_name: "convert_reduce_fusion.12"\n  estimated_cycles: 7\n}\n',
]


def test_a_profile_is_read():
    cycles = parse(PROFILES)
    assert cycles == {"jvp_flash_attention_forward_": 77235, "convert_reduce_fusion": 160}
    assert by_kernel(cycles) == {"forward": 77235}


def test_one_head_stands_for_each_and_is_kept(monkeypatch, tmp_path):
    asked = []

    def measured(chip, build, request):
        asked.append(request)
        return {f"flash_attention_{name}": 1000 * request["group"] for name in KERNELS}

    monkeypatch.setattr(kernel_cycles, "CACHE", tmp_path)
    monkeypatch.setattr(kernel_cycles, "static_cycles", measured)
    monkeypatch.setattr(kernel_cycles, "_versions", dict)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    for _ in range(2):
        found = kernel_seconds("v5e", heads=16, kv_heads=8, length=512, head_dim=64)
    assert found == {name: pytest.approx(2000 * 8 / 1.5e9) for name in KERNELS}
    assert asked == [{"kv_heads": 1, "group": 2, "length": 512, "head_dim": 64, "measured": "causal"}]


def test_what_cannot_be_had_is_none_and_what_fails_is_said(monkeypatch, tmp_path):
    assert kernel_seconds("v6e", 16, 16, 512, 64) is None
    assert kernel_seconds("h100", 16, 16, 512, 64) is None
    monkeypatch.setattr(kernel_cycles, "CACHE", tmp_path)
    monkeypatch.setattr(kernel_cycles, "static_cycles", lambda *_: {})
    monkeypatch.setattr(kernel_cycles, "_versions", dict)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="states no cycles"):
        kernel_seconds("v5e", 16, 16, 512, 64)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: pip install '.[tpu]'")
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_attention_takes_no_more_cycles_than_that_of_jax(chip):
    """Each pass over the square, forward and backward (dq and dkv), and a causal one as a whole."""
    figures = benchmark.static(chip, ("square", "causal"), quick=False)

    def cycles(measured: str, *kernels: str) -> tuple[int, int]:
        return tuple(sum(figures[f"{chip}_{measured}_{kernel}_{of}"] for kernel in kernels) for of in OF)

    for measured, kernels in (("square", ("forward",)), ("square", ("dq", "dkv")), ("causal", KERNELS)):
        ours, theirs = cycles(measured, *kernels)
        assert ours <= theirs, (measured, kernels, figures)
