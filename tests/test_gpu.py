"""What can only be seen on a GPU: `JAX_PLATFORMS=cuda python -m pytest tests/test_gpu.py`; elsewhere it skips."""

import subprocess
import sys

import jax
import pytest
from test_attention import SEGMENTS, compare, draw
from tiny_runs import ROOT, assert_same_run, config_of
from tiny_stores import tiny_store

from ctllm_jax import train
from ctllm_jax.attention import BACKENDS

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("segments", "L", "N", "K", "H"),
    [
        ("ragged", 300, 4, 4, 64),
        ("ragged", 384, 4, 2, 128),
        ("ragged", 270, 2, 1, 256),
        ("one document", 333, 2, 2, 128),
        ("padding before and between", 320, 3, 1, 128),
    ],
)
def test_the_attention_kernel_is_as_good_as_plain_attention(segments, L, N, K, H, dtype):
    segments = SEGMENTS[segments](L)
    with jax.default_matmul_precision("highest"):  # of plain attention, which would take TF32
        compare(BACKENDS["pallas_gpu"].call, *draw(L, len(segments), L, N, K, H, dtype), segments, segments)


RUN = """
import sys
sys.path.insert(0, "tests")
import test_gpu, tiny_runs
tiny_runs.killed_run({store!r}, {workdir!r}, **test_gpu.changes())
"""


def changes() -> dict[str, object]:
    """Of the tests' small run: one device, a model whose attention is the kernel's."""
    model = {"max_length": 256, "d_model": 256, "head_dim": 64, "d_ff": 512, "init_std": 0.02}
    model |= {"dtype": "bfloat16", "remat": "matmuls", "attention": "pallas_gpu"}
    found = {f"model__{name}": value for name, value in model.items()}
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    return {**found, "optimizer__learning_rate": 2e-3, "mesh": mesh, "deterministic": True}


def test_a_killed_run_ends_in_the_same_bits(tmp_path):
    store = tiny_store(tmp_path / "store", length=256).folder
    train.run(config_of(store, **changes()), str(tmp_path / "undisturbed"))
    program = RUN.format(store=str(store), workdir=str(tmp_path / "run"))
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    train.run(config_of(store, **changes()), str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
