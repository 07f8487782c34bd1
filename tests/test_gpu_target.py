"""GPUs described for compiling: the description, and what is refused."""

import importlib.metadata

import pytest

from ctllm_jax.common.errors import UserError
from ctllm_jax.hardware import CHIPS
from ctllm_jax.plan import gpu_target


def test_a_description_states_the_card_and_the_installed_versions(monkeypatch):
    versions = {"nvidia-cuda-runtime": "13.1.80", "nvidia-cudnn-cu13": "9.17.1.4"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    text = gpu_target.target(gpu_target.GPUS["h200"])
    for line in (
        'name: "NVIDIA H200"',
        "cuda_compute_capability { major: 9 minor: 0 }",
        "device_memory_size: 151397597184",
        "shared_memory_per_block_optin: 232448",
        "dnn_version_info { major: 9 minor: 17 patch: 1 }",
        "runtime_version { major: 13 minor: 1 patch: 80 }",
    ):
        assert line in text


def test_every_gpu_of_the_chip_table_is_described_under_its_own_kind():
    chips = {name: chip for name, chip in CHIPS.items() if chip.platform == "gpu"}
    assert set(gpu_target.GPUS) == set(chips)
    for name, chip in chips.items():
        assert gpu_target.GPUS[name].name.startswith(chip.kind)
        assert chip.memory < gpu_target.GPUS[name].memory


def test_an_unknown_gpu_and_a_missing_plugin_are_refused(monkeypatch):
    with pytest.raises(UserError, match="'b200' is unknown; there are: a100, h100, h200"):
        gpu_target.topology("b200", 1, 8)
    monkeypatch.setattr(gpu_target, "available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'ctllm-jax\[cuda\]'"):
        gpu_target.topology("h200", 1, 8)
