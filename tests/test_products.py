"""Products with a parameter matrix: values and gradients are those of the plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.products import head_logits, product

B, L = 2, 5
EQUATIONS = {  # as the model writes them: x's shape, the matrix's
    "BLD,DNH->BLNH": ((B, L, 6), (6, 2, 4)),
    "BLNH,NHD->BLD": ((B, L, 2, 4), (2, 4, 6)),
    "BLD,DF->BLF": ((B, L, 6), (6, 16)),
    "BLF,FD->BLD": ((B, L, 16), (16, 6)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_and_its_gradients_are_those_of_einsum(equation):
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        x, matrix = (jnp.asarray(random.normal(size=shape)) for shape in EQUATIONS[equation])
        y, backward = jax.vjp(lambda *operands: product(equation, *operands), x, matrix)
        expected, plain_backward = jax.vjp(lambda *operands: jnp.einsum(equation, *operands), x, matrix)
        np.testing.assert_array_equal(y, expected)
        dy = jnp.asarray(random.normal(size=y.shape))
        for gradient, plain in zip(backward(dy), plain_backward(dy), strict=True):
            assert gradient.dtype == plain.dtype
            np.testing.assert_allclose(gradient, plain, rtol=1e-13, atol=1e-13)


def test_gradients_of_the_head_are_of_a_cotangent_rounded_to_bf16():
    random = np.random.default_rng(0)
    x_BLD = jnp.asarray(random.normal(size=(B, L, 6)), jnp.bfloat16)
    head_DV = jnp.asarray(random.normal(size=(6, 7)), jnp.float32)
    logits_BLV, backward = jax.vjp(head_logits, x_BLD, head_DV)
    assert logits_BLV.dtype == jnp.float32
    dlogits_BLV = random.normal(size=logits_BLV.shape).astype(np.float32)
    dx_BLD, dhead_DV = backward(jnp.asarray(dlogits_BLV))
    rounded_BLV = np.asarray(jnp.asarray(dlogits_BLV, jnp.bfloat16), np.float64)
    expected_DV = np.einsum("BLD,BLV->DV", np.asarray(x_BLD, np.float64), rounded_BLV)
    assert (dx_BLD.dtype, dhead_DV.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(dhead_DV, expected_DV, rtol=1e-5, atol=1e-5)
    unrounded_DV = np.einsum("BLD,BLV->DV", np.asarray(x_BLD, np.float64), dlogits_BLV)
    assert np.abs(unrounded_DV - expected_DV).max() > 1e-3
