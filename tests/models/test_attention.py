"""Attention against jax.nn.dot_product_attention on the whole sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.models.attention import attend


def random_qkv(length: int, heads: int = 6, kv_heads: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = ((2, length, heads, 8), (2, length, kv_heads, 8), (2, length, kv_heads, 8))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))  # type: ignore


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 1100])
def test_causal_blocks_equal_the_whole(length: int) -> None:
    q, k, v = random_qkv(length)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
    np.testing.assert_allclose(attend(q, k, v), expected, atol=2e-6)


def test_gradients_equal_the_whole() -> None:
    q, k, v = random_qkv(200)
    ours = jax.grad(lambda *qkv: jnp.sin(attend(*qkv)).sum(), argnums=(0, 1, 2))(q, k, v)
    whole = lambda *qkv: jnp.sin(jax.nn.dot_product_attention(*qkv, is_causal=True, implementation="xla")).sum()  # noqa: E731
    for a, b in zip(ours, jax.grad(whole, argnums=(0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-5)


def test_a_mask_per_row() -> None:
    q, k, v = random_qkv(40)
    mask = jnp.arange(40) < jnp.asarray([[13], [40]])
    expected = jax.nn.dot_product_attention(q[:, :1], k, v, mask=mask[:, None, None], implementation="xla")
    np.testing.assert_allclose(attend(q[:, :1], k, v, mask[:, None]), expected, atol=2e-6)
    assert np.abs(attend(q[:, :1], k, v, mask[:, None])[0] - attend(q, k, v)[0, :1]).max() > 1e-2
