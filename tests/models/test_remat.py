"""What lies between the forward and the backward pass, and products whose gradients are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.models.attention import attend_by_xla
from drift_jax.models.intervals import KeySpans
from drift_jax.models.linear import linear
from drift_jax.models.stack import REMAT, apply_layers

LENGTHS = {"b": 2, "t": 5, "d": 6, "f": 7, "n": 3, "h": 4}


def random(dims: str, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), [LENGTHS[dim] for dim in dims])


# --- products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equation", ["btd,df->btf", "btf,df->btd", "btd,dnh->btnh", "btnh,dnh->btd"])
def test_products_have_the_gradients_of_einsum(equation: str) -> None:
    inputs, out = equation.split("->")
    x, weight = (random(dims, seed) for seed, dims in enumerate(inputs.split(",")))
    ends = random(out, 2)

    def judge(product: Callable[..., jax.Array]) -> Any:
        return jax.value_and_grad(lambda x, w: jnp.sum(ends * product(equation, x, w)), (0, 1))(x, weight)

    for a, b in zip(jax.tree.leaves(judge(linear)), jax.tree.leaves(judge(jnp.einsum)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- what is made again ---------------------------------------------------------------------------------------


def block(weights: dict[str, jax.Array], x: jax.Array, context: Any) -> jax.Array:
    """A layer like the model's: attention over spans, then a gated product."""
    heads = [linear("btd,dnh->btnh", x, weights[name]) for name in "qkv"]
    x = x + linear("btnh,dnh->btd", attend_by_xla(*heads, context), weights["o"])
    wide = jax.nn.silu(linear("btd,df->btf", x, weights["gate"])) * linear("btd,df->btf", x, weights["up"])
    return x + linear("btf,df->btd", wide, weights["down"])


def gradient(remat: str) -> tuple[Callable[..., Any], tuple[Any, jax.Array]]:
    shapes = {"q": "dnh", "k": "dnh", "v": "dnh", "o": "dnh", "gate": "df", "up": "df", "down": "df"}
    weights = {name: random(dims, seed)[None] for seed, (name, dims) in enumerate(shapes.items())}
    x = random("btd", 9)
    zeros = jnp.zeros(x.shape[:2], jnp.int32)
    spans = KeySpans(zeros, zeros + 2, zeros)

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(apply_layers(block, remat, weights, None, x, spans)))

    return jax.grad(loss, (0, 1)), (weights, x)


def test_only_remat_layer_makes_products_again() -> None:
    """7 products and 2 of attention forward; backward twice the 7, and 6 of attention. What is made again: 6 and 2."""
    found = {}
    for remat in REMAT:
        function, args = gradient(remat)
        compiled = jax.jit(function).lower(*args).as_text()
        found[remat] = compiled.count("stablehlo.dot_general")
    assert found["none"] == found["dots"] == 9 + 14 + 6
    assert found["layer"] == found["offload"] >= 9 + 14 + 6 + 8


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_what_is_made_again_changes_nothing(remat: str) -> None:
    seen, expected = (jax.jit(function)(*args) for function, args in (gradient(remat), gradient("none")))
    for a, b in zip(jax.tree.leaves(seen), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
