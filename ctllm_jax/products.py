"""Products with a parameter matrix, whose backward passes are ours for the sake of speed: the values are autodiff's.

Shapes: B batch, L length, D model width, V vocabulary (padded).
"""

import functools

import jax
import jax.numpy as jnp

from ctllm_jax.precision import wide


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x times a matrix of its dtype, by an einsum equation such as "BLD,DF->BLF".

    In the backward pass the matrix's gradient has x as its first operand. Autodiff has the cotangent first, and XLA on
    a CPU then turns the whole gradient over, element by element.
    """
    return jnp.einsum(equation, x, matrix)


def _product_forward(equation, x, matrix):
    return product(equation, x, matrix), (x, matrix)


def _product_backward(equation, kept, dy):
    x, matrix = kept
    operands, out = equation.split("->")
    of_x, of_matrix = operands.split(",")
    dx = jnp.einsum(f"{out},{of_matrix}->{of_x}", dy, matrix)
    return dx, jnp.einsum(f"{of_x},{out}->{of_matrix}", x, dy)


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def head_logits(x_BLD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """x times the head in x's dtype, added up in fp32 [B, L, V].

    In the backward pass the fp32 cotangent is rounded to x's dtype first. A TPU does that anyway; a GPU would multiply
    in TF32, at half the speed.
    """
    return jnp.einsum("BLD,DV->BLV", x_BLD, head_DV.astype(x_BLD.dtype), preferred_element_type=wide(x_BLD.dtype))


def _head_logits_forward(x_BLD, head_DV):
    return head_logits(x_BLD, head_DV), (x_BLD, head_DV)


def _head_logits_backward(kept, dlogits_BLV):
    x_BLD, head_DV = kept
    product = functools.partial(jnp.einsum, preferred_element_type=wide(x_BLD.dtype))
    dlogits_BLV = dlogits_BLV.astype(x_BLD.dtype)
    dx_BLD = product("BLV,DV->BLD", dlogits_BLV, head_DV.astype(x_BLD.dtype)).astype(x_BLD.dtype)
    return dx_BLD, product("BLD,BLV->DV", x_BLD, dlogits_BLV).astype(head_DV.dtype)


head_logits.defvjp(_head_logits_forward, _head_logits_backward)
