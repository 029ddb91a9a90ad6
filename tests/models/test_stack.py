"""The stack of layers and its parts against plain differentiation through an unrolled loop; what stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.models import stack
from drift_jax.models.linear import linear
from drift_jax.models.stack import REMAT, apply_layers, from_zero, look_up, track

LAYERS, BATCH, LENGTH, DIM, WIDE = 4, 2, 6, 8, 16
Tree = dict[str, Any]


def layer(weights: Tree, x: jax.Array, context: Any) -> jax.Array:
    """Has what a decoder layer has: a norm's scale, two products, a residual, and integers it reads besides."""
    gain, shift = context
    scaled = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weights["scale"]
    wide = jnp.tanh(linear("btd,df->btf", scaled, weights["parts"]["into"].astype(x.dtype)) + shift[..., None])
    return x + gain * linear("btf,fd->btd", wide, weights["parts"]["out"].astype(x.dtype))


def make_weights(layers: int = LAYERS, dim: int = DIM, wide: int = WIDE, seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

    scale = 1 + 0.2 * normal(layers, 1, dim)[:, 0]
    return {"parts": {"into": normal(layers, dim, wide), "out": normal(layers, wide, dim)}, "scale": scale}


def make_inputs(seed: int = 1) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
    """x, context, and the weights of the sum that is differentiated."""
    rng = np.random.default_rng(seed)
    x, ends = (jnp.asarray(rng.normal(size=(BATCH, LENGTH, DIM)), jnp.float32) for _ in range(2))
    return x, (jnp.float32(0.7), jnp.asarray(rng.integers(0, 3, (BATCH, LENGTH)))), ends


def unrolled(weights: Tree, x: jax.Array, context: Any) -> jax.Array:
    for i in range(len(weights["scale"])):
        x = layer(jax.tree.map(lambda w, i=i: w[i], weights), x, context)
    return x


def weighted_sum(
    remat: str | None, weights: Tree, grads: Tree | None, x: jax.Array, scan: bool = True
) -> tuple[jax.Array, jax.Array]:
    """`remat` None: the plain loop."""
    _, context, ends = make_inputs()
    if remat is None:
        out = unrolled(weights, x, context)
    else:
        out = apply_layers(layer, remat, weights, grads, x, context, scan)
    return jnp.sum(ends * out), out


def assert_close(seen: Any, expected: Any, rtol: float = 1e-6) -> None:
    """Of every array, relative to its largest number."""
    assert jax.tree.structure(seen) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (seen, expected)), strict=True):
        a, b = (np.asarray(y, np.float32) for y in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def plain_gradients() -> tuple[Tree, jax.Array, jax.Array]:
    """Of the weights and of x, and the output, by the unrolled loop."""
    (d_weights, d_x), out = jax.jit(jax.grad(partial(weighted_sum, None), (0, 2), has_aux=True))(
        make_weights(), None, make_inputs()[0]
    )
    return d_weights, d_x, out


# --- layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", REMAT)
def test_layers_have_the_gradients_of_a_plain_loop(remat: str, scan: bool) -> None:
    d_weights, d_x, out = plain_gradients()
    function = jax.jit(jax.grad(partial(weighted_sum, remat, scan=scan), (0, 2), has_aux=True))
    (own, own_x), own_out = function(make_weights(), None, make_inputs()[0])
    assert_close((own, own_x, own_out), (d_weights, d_x, out))
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(d_weights))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", REMAT)
def test_gradients_so_far_grow_by_those_of_the_layers(remat: str, scan: bool) -> None:
    """And the weights themselves have none: the sum has it all."""
    d_weights, d_x, _ = plain_gradients()
    so_far = make_weights(seed=9)
    function = jax.jit(jax.grad(partial(weighted_sum, remat, scan=scan), (0, 1, 2), has_aux=True))
    (none, total, own_x), _ = function(make_weights(), so_far, make_inputs()[0])
    assert_close((total, own_x), (jax.tree.map(jnp.add, so_far, d_weights), d_x))
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(none))


def test_a_layer_added_to_the_wrong_place_is_seen() -> None:
    """The negative twin: every layer's gradient one place further in the sum."""
    d_weights, so_far = plain_gradients()[0], make_weights(seed=9)
    right, wrong = stack._add_at, lambda i, total, more: right((i + 1) % LAYERS, total, more)
    with patch.object(stack, "_add_at", wrong):
        total = jax.grad(partial(weighted_sum, "layer"), 1, has_aux=True)(make_weights(), so_far, make_inputs()[0])[0]
    with pytest.raises(AssertionError):
        assert_close(total, jax.tree.map(jnp.add, so_far, d_weights))


@pytest.mark.parametrize("scan", [True, False])
def test_the_sum_keeps_its_dtype_and_is_rounded_once_per_addition(scan: bool) -> None:
    d_weights = plain_gradients()[0]
    so_far = jax.tree.map(lambda w: w.astype(jnp.bfloat16), make_weights(seed=9))
    function = jax.jit(jax.grad(partial(weighted_sum, "layer", scan=scan), 1, has_aux=True))
    total = function(make_weights(), so_far, make_inputs()[0])[0]
    for a, b, start in zip(*map(jax.tree.leaves, (total, d_weights, so_far)), strict=True):
        assert a.dtype == jnp.bfloat16
        exact = np.asarray(start, np.float32) + np.asarray(b)
        error = np.abs(np.asarray(a, np.float32) - exact)
        # Half a unit in the last of 8 bits; the rest is float32's order of sums.
        assert np.all(error <= 2**-8 * np.abs(exact) * 1.001 + 1e-6)
        assert error.max() > 1e-4, "bfloat16 must have rounded something"


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_what_all_layers_share_is_not_kept_by_each(remat: str) -> None:
    """Neither weights nor context: a scan would stack what is kept, a copy for each layer."""
    x, context, _ = make_inputs()
    weights = jax.tree.map(lambda w: w[0], make_weights())
    kept = jax.tree.leaves(REMAT[remat].keep(layer, weights, x, context)[1])
    assert any(leaf is x for leaf in kept)
    assert not any(leaf is shared for leaf in kept for shared in jax.tree.leaves((weights, context)))
    residuals = jax.tree.leaves(jax.vjp(lambda w, x: layer(w, x, context), weights, x)[1])
    assert any(leaf is context[0] for leaf in residuals), "the derivative must need the context"


def test_layers_compute_in_the_dtype_of_x() -> None:
    weights, (x, context, _) = make_weights(), make_inputs()
    half = {"parts": weights["parts"], "scale": weights["scale"].astype(jnp.bfloat16)}
    out = apply_layers(layer, "dots", half, None, x.astype(jnp.bfloat16), (jnp.bfloat16(0.7), context[1]))
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out, np.float32) - np.asarray(unrolled(weights, x, context)))
    assert 1e-4 < error.max() < 0.1


@pytest.mark.parametrize(
    ("scan_layers", "remat", "platform", "devices", "scanned"),
    [
        (None, "dots", "gpu", 1, False),
        (None, "none", "gpu", 1, False),
        (None, "dots", "gpu", 2, True),
        (None, "layer", "gpu", 1, True),
        (None, "dots", "tpu", 1, True),
        (None, "dots", "cpu", 1, True),
        (True, "dots", "gpu", 1, True),
        (False, "layer", "cpu", 8, False),
    ],
)
def test_where_layers_are_scanned(
    scan_layers: bool | None, remat: str, platform: str, devices: int, scanned: bool
) -> None:
    assert stack.resolve_scan(scan_layers, remat, platform, devices) is scanned


def test_only_a_scan_has_one_program_for_all_layers() -> None:
    def count(scan: bool) -> int:
        function = jax.grad(partial(weighted_sum, "dots", scan=scan), has_aux=True)
        return jax.jit(function).lower(make_weights(), None, make_inputs()[0]).as_text().count("stablehlo.dot_general")

    assert count(False) == LAYERS * count(True)


# --- single parameters --------------------------------------------------------------------------------------


def test_a_tracked_weight_sends_its_gradient_to_the_sum() -> None:
    weight, so_far, factor = jnp.arange(3.0), jnp.array([10.0, 20.0, 30.0]), jnp.array([1.0, 2.0, 3.0])

    def total(weight: jax.Array, grads: jax.Array | None) -> jax.Array:
        return jnp.sum(factor * track(weight, grads) ** 2)

    np.testing.assert_array_equal(track(weight, so_far), weight)
    own = 2 * factor * weight
    np.testing.assert_array_equal(jax.grad(total)(weight, None), own)
    none, summed = jax.grad(total, (0, 1))(weight, so_far)
    np.testing.assert_array_equal(none, jnp.zeros(3))
    np.testing.assert_array_equal(summed, so_far + own)
    rounded = jax.grad(total, 1)(weight, so_far.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, (so_far + own).astype(jnp.bfloat16))


def test_from_zero_hands_on_the_gradient_without_the_sum() -> None:
    so_far = jnp.array([10.0, 20.0])
    np.testing.assert_array_equal(from_zero(so_far), jnp.zeros(2))
    weights = jnp.array([1.0, 2.0])
    assert from_zero(so_far.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.grad(lambda g: jnp.sum(weights * from_zero(g)))(so_far), weights)


def test_a_weight_used_twice_counts_what_was_there_once() -> None:
    """The first use carries the sum, the second starts from zero; the twin starts from the sum twice."""
    weight, so_far = jnp.array([2.0, 3.0]), jnp.array([100.0, 200.0])

    def total(grads: jax.Array, second: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jnp.sum(track(weight, grads) ** 2) + jnp.sum(5 * track(weight, second(grads)))

    np.testing.assert_array_equal(jax.grad(total)(so_far, from_zero), so_far + 2 * weight + 5)
    np.testing.assert_array_equal(jax.grad(total)(so_far, lambda grads: grads), 2 * so_far + 2 * weight + 5)


IDS = jnp.array([[0, 3, 3, 1], [3, 0, 5, 5]])  # 3 three times, 2 and 4 never


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_looked_up_rows_add_their_gradients_to_the_table(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    table, so_far = (jnp.asarray(rng.normal(size=(6, DIM)), jnp.float32) for _ in range(2))
    ends = jnp.asarray(rng.normal(size=(*IDS.shape, DIM)), dtype)

    def total(table: jax.Array, grads: jax.Array | None) -> jax.Array:
        return jnp.sum((ends * look_up(dtype, table, grads, IDS)).astype(jnp.float32))

    found = look_up(dtype, table, None, IDS)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, table.astype(dtype)[IDS])
    own = np.zeros((6, DIM), np.float32)
    np.add.at(own, np.asarray(IDS), np.asarray(ends, np.float32))
    assert np.all(own[[2, 4]] == 0) and np.all(own[[0, 1, 3, 5]] != 0)
    np.testing.assert_allclose(jax.grad(total)(table, None), own, rtol=1e-6, atol=1e-6)
    none, summed = jax.grad(total, (0, 1))(table, so_far)
    np.testing.assert_array_equal(none, jnp.zeros_like(table))
    np.testing.assert_allclose(summed, so_far + own, rtol=1e-6, atol=1e-6)


def test_looked_up_gradients_in_bfloat16_are_rounded_once() -> None:
    """256 + 1 + 1 is 258 in bfloat16 only if the ones meet first, or the sum is wider."""
    so_far = jnp.full((6, 1), 256.0, jnp.bfloat16)

    def total(grads: jax.Array) -> jax.Array:
        return jnp.sum(look_up(jnp.float32, jnp.zeros((6, 1)), grads, jnp.array([[1, 1]])))

    summed = jax.grad(total)(so_far)
    assert summed.dtype == jnp.bfloat16 and float(summed[1, 0]) == 258.0
    assert float(so_far[1, 0] + jnp.bfloat16(1) + jnp.bfloat16(1)) == 256.0, "the twin: rounded after each"


# --- memory -------------------------------------------------------------------------------------------------


def temp_bytes(function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> int:
    """Of the compiled program, without running it."""
    compiled = jax.jit(function, donate_argnums=donate).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def accumulate(in_place: bool, weights: Tree, grads: Tree, xs: jax.Array, count: jax.Array) -> Tree:
    """Gradients of the first `count` micro-batches of xs, added to `grads`."""

    def loss(weights: Tree, grads: Tree | None, x: jax.Array) -> jax.Array:
        return jnp.sum(apply_layers(layer, "layer", weights, grads, x, (1.0, jnp.zeros(x.shape[:2]))) ** 2)

    def one(index: jax.Array, grads: Tree) -> Tree:
        x = jax.lax.dynamic_index_in_dim(xs, index, keepdims=False)
        if in_place:
            return jax.grad(loss, 1)(weights, grads, x)
        return jax.tree.map(jnp.add, grads, jax.value_and_grad(loss)(weights, None, x)[1])

    return jax.lax.fori_loop(0, count, one, grads)


def test_accumulation_holds_one_set_of_gradients() -> None:
    """The twin, `value_and_grad` and a sum of trees, holds a second one while it adds."""
    weights = make_weights(8, 128, 512)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    args = (weights, jax.tree.map(jnp.zeros_like, weights), jnp.ones((2, 1, 8, 128)), jnp.int32(2))
    in_place, naive = (temp_bytes(partial(accumulate, how), *args, donate=(1,)) for how in (True, False))
    assert in_place < 0.5 * size, "one layer's gradients are an eighth"
    assert naive > size
    summed, expected = (jax.jit(partial(accumulate, how))(*args) for how in (True, False))
    assert_close(summed, expected, 1e-5)


def test_remat_orders_the_memory_of_a_step() -> None:
    weights, x = make_weights(6, 32, 128), jnp.ones((4, 256, 32))
    context = (1.0, jnp.zeros(x.shape[:2]))

    def loss(remat: str, weights: Tree, x: jax.Array) -> jax.Array:
        return jnp.sum(apply_layers(layer, remat, weights, None, x, context) ** 2)

    temp = {remat: temp_bytes(jax.grad(partial(loss, remat)), weights, x) for remat in ("layer", "dots", "none")}
    # Per layer at least: the input; also the wide product; also what comes of it.
    inputs, wide = 6 * x.nbytes, 6 * 4 * x.nbytes
    assert temp["layer"] < temp["dots"] < temp["none"]
    assert temp["layer"] >= inputs
    assert temp["dots"] - temp["layer"] > 0.8 * wide
    assert temp["none"] - temp["dots"] > 0.8 * wide
