"""The norm and its hand-written gradient, beside torch's autograd in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from drift_jax.models.norms import rms_norm, sum_last

EPS = 1e-2  # large enough to matter


def torch_norm(x: np.ndarray, scale: np.ndarray, ends: np.ndarray, eps: float) -> list[np.ndarray]:
    """The norm in float64 and its gradients with respect to x and scale."""
    wide, weight = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, scale))
    out = torch.nn.functional.rms_norm(wide, (x.shape[-1],), weight, eps)
    return [
        out.detach().numpy(),
        *(g.numpy() for g in torch.autograd.grad((out * torch.tensor(ends)).sum(), (wide, weight))),
    ]


def inputs(shape: tuple[int, ...], dtype: jnp.dtype) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [shape, shape[-1:], shape]
    return [jax.random.normal(key, size).astype(dtype) for key, size in zip(keys, sizes, strict=True)]


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 3, 4, 16), (7, 6)])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_norm_and_gradients_equal_torch(shape: tuple[int, ...], dtype: jnp.dtype, bound: float) -> None:
    x, scale, ends = inputs(shape, dtype)
    out, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, EPS), x, scale)
    exact = torch_norm(*(np.asarray(a, np.float64) for a in (x, scale, ends)), EPS)
    for ours, theirs in zip((out, *pull(ends)), exact, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=bound * np.abs(theirs).max())


def test_the_bound_sees_a_wrong_epsilon() -> None:
    x, scale, ends = inputs((3, 5, 8), jnp.float32)
    exact = torch_norm(*(np.asarray(a, np.float64) for a in (x, scale, ends)), EPS)[0]
    assert np.abs(np.asarray(rms_norm(x, scale, 1e-3)) - exact).max() > 1e-4 * np.abs(exact).max()


def test_sums_on_every_platform() -> None:
    x = jax.random.normal(jax.random.key(1), (3, 5, 8))
    np.testing.assert_allclose(sum_last(x), np.asarray(x, np.float64).sum(-1), rtol=1e-5, atol=1e-6)
    # A product with ones is for CPUs only; elsewhere it would write the summands to memory.
    for platform, product in (("cpu", True), ("tpu", False)):
        text = jax.jit(sum_last).trace(x).lower(lowering_platforms=(platform,)).as_text()
        assert ("dot_general" in text) == product
