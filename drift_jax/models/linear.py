"""Products of activations with weights, and biases, whose gradients come out as the weights are kept.

The gradient that JAX derives for the weights has its dims in another order and transposes it; the compiler for CPUs
then transposes activations instead, which there takes as long as the product.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drift_jax.models.remat import keep


def linear(equation: str, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, weight)`, kept for the backward pass by `remat: dots`."""
    return keep(_linear(equation, x, weight))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(equation: str, x: Array, weight: Array) -> Array:
    return jnp.einsum(equation, x, weight)


def _linear_forward(equation: str, x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _linear(equation, x, weight), (x, weight)


def _linear_backward(equation: str, kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, weight = kept
    inputs, out = equation.split("->")
    x_dims, w_dims = inputs.split(",")
    d_x = jnp.einsum(f"{out},{w_dims}->{x_dims}", grad, weight)
    # The operand whose dims come first in the weights comes first: the product then needs no transposition.
    first, second = ((x_dims, x), (out, grad)) if w_dims[0] in x_dims else ((out, grad), (x_dims, x))
    return d_x, jnp.einsum(f"{first[0]},{second[0]}->{w_dims}", first[1], second[1])


_linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def add_bias(x: Float[Array, "B T N H"], bias: Float[Array, "N H"]) -> Float[Array, "B T N H"]:
    """x + bias in the dtype of x. The bias's gradient is a sum over tokens in float32; JAX's own is in that of x."""
    return x + bias.astype(x.dtype)


def _bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(x, bias), bias


def _bias_backward(bias: Array, grad: Array) -> tuple[Array, Array]:
    return grad, jnp.sum(grad, axis=(0, 1), dtype=jnp.float32).astype(bias.dtype)


add_bias.defvjp(_bias_forward, _bias_backward)
