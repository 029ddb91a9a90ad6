"""The bias and its gradient, which is a sum over all tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.models.linear import add_bias


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-5)])
def test_the_gradient_of_a_bias_is_summed_in_float32(dtype: jnp.dtype, bound: float) -> None:
    """Of 16,384 tokens, whose sum in bfloat16 would stop growing at a few hundred, or be off by a percent in a tree."""
    x = jax.random.normal(jax.random.key(0), (4, 4096, 2, 8)).astype(dtype)
    bias = jax.random.normal(jax.random.key(1), (2, 8))
    grad = (1 + jax.random.normal(jax.random.key(2), x.shape)).astype(dtype)
    out, pull = jax.vjp(add_bias, x, bias)
    np.testing.assert_array_equal(out, x + bias.astype(dtype))
    d_x, d_bias = pull(grad)
    np.testing.assert_array_equal(d_x, grad)
    exact = np.asarray(grad, np.float64).sum((0, 1))
    assert d_bias.dtype == jnp.float32
    np.testing.assert_allclose(d_bias, exact, rtol=bound)
    if dtype == jnp.bfloat16:
        derived = jax.vjp(lambda x, bias: x + bias.astype(x.dtype), x, bias)[1](grad)[1]
        assert np.abs(np.asarray(derived) / exact - 1).max() > 1e-3
