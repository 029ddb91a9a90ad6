"""Sums over a dim in the form that each platform is fast at, and the norm that is made of them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sum_last(x: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Sum over the last dim. On CPUs a product with ones: what XLA fuses there with a sum can take 20 times as long."""
    return jax.lax.platform_dependent(
        x, cpu=lambda x: x @ jnp.ones(x.shape[-1:], x.dtype), default=partial(jnp.sum, axis=-1)
    )


def sum_rows(x: Float[Array, "*B D"]) -> Float[Array, "D"]:
    """Sum over all dims but the last; see `sum_last`."""
    dims = x.ndim - 1
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: jnp.tensordot(jnp.ones(x.shape[:-1], x.dtype), x, dims),
        default=partial(jnp.sum, axis=tuple(range(dims))),
    )


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """x over its root mean square, computed in float32, times the scale in the dtype of x (as in transformers)."""
    return jnp.asarray(_rms_norm(x, scale, eps))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return _normalize(x, eps)[0].astype(x.dtype) * scale.astype(x.dtype)


def _normalize(x: Float[Array, "*B D"], eps: float) -> tuple[Float[Array, "*B D"], Float[Array, "*B 1"]]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide * inverse, inverse


def _forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return _rms_norm(x, scale, eps), (x, scale)


def _backward(eps: float, kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, scale = kept
    normal, inverse = _normalize(x, eps)
    d_scale = sum_rows((grad * normal.astype(x.dtype)).astype(jnp.float32))
    d_normal = (grad * scale.astype(x.dtype)).astype(jnp.float32)
    along = sum_last(d_normal * normal)[..., None] / x.shape[-1]
    return (inverse * (d_normal - normal * along)).astype(x.dtype), d_scale.astype(scale.dtype)


_rms_norm.defvjp(_forward, _backward)
