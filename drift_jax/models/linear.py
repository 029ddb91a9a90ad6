"""Products of activations with weights, whose gradients come out in the layout of the weights.

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
