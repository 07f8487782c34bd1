"""Names of slices, and the chip that a device is."""

import types

import pytest

from ctllm_jax.common.errors import UserError
from ctllm_jax.hardware import CHIPS, chip_of, parse_slice


@pytest.mark.parametrize(
    ("text", "chip", "devices", "name"),
    [
        ("v5e:16x16", "v5e", 256, "v5e:16x16"),
        ("v5litepod-256", "v5e", 256, "v5e:16x16"),
        ("v5e-8", "v5e", 8, "v5e:2x4"),
        ("v6e-64", "v6e", 64, "v6e:8x8"),
        ("v6e:1x1", "v6e", 1, "v6e:1x1"),
        ("v5p-128", "v5p", 64, "v5p:4x4x4"),  # counts TensorCores: 64 chips
        ("v5p-8", "v5p", 4, "v5p:2x2x1"),
        ("v4-128", "v4", 64, "v4:4x4x4"),
        ("v5p:4x8x12", "v5p", 384, "v5p:4x8x12"),  # cubes of 4 x 4 x 4
        ("2*v5e:16x16", "v5e", 512, "2*v5e:16x16"),
        ("4*v5p-128", "v5p", 256, "4*v5p:4x4x4"),
        ("h200x1", "h200", 1, "h200x1"),
        ("h100x8", "h100", 8, "h100x8"),
        ("h200x64", "h200", 64, "h200x64"),
    ],
)
def test_a_slice_by_topology_by_cloud_name_by_gpus(text, chip, devices, name):
    target = parse_slice(text)
    assert (target.chip, target.devices, target.name) == (CHIPS[chip], devices, name)
    assert parse_slice(name) == target


def test_gpus_of_several_hosts_are_as_many_slices():
    target = parse_slice("h200x64")
    assert (target.shape, target.count) == ((8,), 8)
    assert parse_slice("a100x4").shape == (4,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e:3x5", "'v5e:3x5' cannot be had; there are: v5e:1x1, v5e:2x2"),
        ("v5p:4x4x6", "'v5p:4x4x6' cannot be had"),
        ("v5p:4x4", "'v5p:4x4' is unknown; write it as one of v5e:16x16"),
        ("v5p-100", "'v5p-100' is unknown; there are: v5p-8, v5p-16"),
        ("0*v5e:4x4", "is unknown"),
        ("h100x12", "hosts have 8 devices, 12 is not a multiple"),
        ("h100x0", "is unknown"),
        ("b200x8", "'b200x8' is unknown.*chips: v4, v5e"),
        ("v5e", "is unknown"),
        ("", "is unknown"),
    ],
)
def test_what_is_no_slice_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_slice(text)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", "v4"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
    ],
)
def test_a_device_is_known_by_its_kind(kind, name):
    assert chip_of(types.SimpleNamespace(device_kind=kind)) == CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "TPU v3", "NVIDIA L4", ""])
def test_an_unknown_device_is_not_guessed(kind):
    assert chip_of(types.SimpleNamespace(device_kind=kind)) is None
