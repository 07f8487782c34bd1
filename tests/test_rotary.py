"""The rotary embedding: turns by angles, and frequencies lowered as longer contexts ask for."""

import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.rotary import RopeScaling, frequencies, rotate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_pair_turns_by_its_angle(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3, 16)), dtype)
    positions = np.random.default_rng(1).integers(0, 4096, (2, 7))
    angle = positions[..., None, None] * frequencies(16, 10_000.0, None).astype(np.float64)
    pairs = np.asarray(x, np.float64)
    turned = (pairs[..., :8] + 1j * pairs[..., 8:]) * np.exp(1j * angle)
    found = np.asarray(rotate(x, jnp.asarray(positions), frequencies(16, 10_000.0, None)), np.float64)
    rounding = 2e-3 if dtype == "float32" else 2e-2  # of angles up to 4096 in fp32; of the result
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), atol=rounding, rtol=0)


def test_position_zero_changes_nothing():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 64)), jnp.bfloat16)
    assert np.array_equal(rotate(x, jnp.zeros((1, 3), jnp.int32), frequencies(64, 10_000.0, None)), x)


def test_scalings():
    plain = frequencies(128, 500_000.0, None)
    np.testing.assert_array_equal(frequencies(128, 500_000.0, RopeScaling("linear", 4.0)), plain / np.float32(4))
    scaled = frequencies(128, 500_000.0, RopeScaling("llama3", 8.0))
    turns = 8192 * plain / (2 * np.pi)
    assert np.array_equal(scaled[turns > 4], plain[turns > 4]) and (turns > 4).sum() > 20
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert (
        between.sum() > 3 and np.all(scaled[between] < plain[between]) and np.all(scaled[between] > plain[between] / 8)
    )
    assert np.all(np.diff(scaled) < 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("yarn", 2.0), "'yarn' is unknown; there are: linear, llama3"),
        (("linear", 0.5), "factor >= 1"),
        (("llama3", 8.0, 4.0, 4.0), "low_frequency_factor < high_frequency_factor"),
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(*values)
