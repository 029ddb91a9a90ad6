"""bfloat16 moments and gradients: right on average, alike on every mesh, and no worse a run than in float32."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from drift_jax.config import MeshConfig, TrainConfig
from drift_jax.optim import build_optimizer, clip_by_global_norm
from drift_jax.rounding import StochasticMomentsState, stochastic_moments, stochastic_rounding
from drift_jax.sharding import build_layout
from tests.test_rounding import bits, neighbours, run, tree

BF16 = jnp.bfloat16
STEPS = 200
NARROW = TrainConfig(moment_dtype="bfloat16", gradient_dtype="bfloat16", learning_rate=1e-4, schedule="constant")
OPTIMIZERS = [NARROW, dataclasses.replace(NARROW, optimizer="adamw", weight_decay=0.1)]
ALL_NARROW = [dataclasses.replace(cfg, master_dtype="bfloat16") for cfg in OPTIMIZERS]


def name(cfg: TrainConfig) -> str:
    return f"{cfg.optimizer}-{cfg.master_dtype}"


def average(decay: float) -> optax.GradientTransformation:
    """decay * v + (1 - decay) * g**2, v itself as the update: what every moment does."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        state = jax.tree.map(lambda g, v: decay * v + (1 - decay) * g**2, grads, state)
        return state, state

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def nearest(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Negative twin of `stochastic_moments`: moments are rounded to the nearest bfloat16."""

    def cast(tree: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, BF16)

    return optax.GradientTransformation(lambda params: cast(optimizer.init(params), BF16), update)


def test_a_stored_moment_is_right_on_average() -> None:
    """Over 1024 seeds, the mean of each of 256 stored moments is the float32 moment within 4.5 standard errors.

    The sum of the 256 squared z-scores is 256 with standard deviation sqrt(2 * 256). The updates do not depend on the
    seed: they are those of the moments before rounding.
    """
    seeds, rng = 1024, np.random.default_rng(0)
    before = jnp.asarray(rng.lognormal(-20, 3, 256), BF16)
    grads = jnp.asarray(np.sqrt(np.asarray(before, np.float32) * rng.uniform(0, 2, 256)), jnp.float32)
    exact = np.asarray(average(0.99).update(grads, before.astype(jnp.float32))[0])
    inner, outer = neighbours(exact)
    total = np.zeros(256)
    for seed in range(seeds):
        updates, state = stochastic_moments(average(0.99), seed).update(
            grads, StochasticMomentsState(jnp.int32(3), before)
        )
        stored = np.asarray(state.inner.astype(jnp.float32))
        np.testing.assert_array_equal(updates, exact)
        assert np.all((stored == inner) | (stored == outer))
        total += stored
    share = (exact - inner.astype(np.float64)) / (outer.astype(np.float64) - inner)
    error = (outer.astype(np.float64) - inner) * np.sqrt(share * (1 - share) / seeds)
    z = (total / seeds - exact) / error
    assert np.abs(z).max() < 4.5
    assert abs(np.sum(z**2) - 256) < 4.5 * math.sqrt(2 * 256)


@partial(jax.jit, static_argnums=0)
def step(optimizer: optax.GradientTransformation, state: Any, grads: Any) -> Any:
    return optimizer.update(grads, state)[1]


@pytest.mark.parametrize("decay, square", [(0.99, 1.15), (0.99, 0.85), (0.999, 0.0), (0.999, 2.0)])
def test_moments_follow_slow_changes_which_rounding_to_nearest_does_not_see(decay: float, square: float) -> None:
    """65536 moments of 1 see the same squared gradient s 400 times; the exact moment goes to s + (1 - s) decay**400.

    Each update adds at most spacing**2 / 4 to the variance, of which decay**2 is left after the next: the standard
    error of the mean is below spacing / 2 / sqrt((1 - decay**2) * 65536), 3.5e-4 at most. The mean may be 4.5 of them
    off. Rounded to nearest nothing moves, which is more than 100 of them off.
    """
    count, updates = 2**16, 400
    grads = jnp.full(count, math.sqrt(square), jnp.float32)
    exact = square + (1 - square) * decay**updates
    error = 2.0**-7 / 2 / math.sqrt((1 - decay**2) * count)
    ends = {}
    for how, wrap in (("ours", lambda inner: stochastic_moments(inner, 42)), ("nearest", nearest)):
        optimizer = wrap(average(decay))
        state = jax.tree.map(lambda x: jnp.ones_like(x) if x.dtype == BF16 else x, optimizer.init(grads))
        for _ in range(updates):
            state = step(optimizer, state, grads)
        (ends[how],) = (np.asarray(x, np.float64) for x in jax.tree.leaves(state) if x.dtype == BF16)
    assert error < 3.5e-4
    assert abs(ends["ours"].mean() - exact) < 4.5 * error
    np.testing.assert_array_equal(ends["nearest"], 1.0)
    assert abs(1.0 - exact) > 100 * error


@cache
def problem() -> dict[str, Any]:
    """A logistic regression of 4096 weights on noisy labels: 2048 rows."""
    rng = np.random.default_rng(5)
    scale = rng.lognormal(0, 1, 4096)
    rows = rng.normal(size=(2048, 4096)) * scale
    truth = rng.normal(size=4096) / (8 * scale)
    labels = np.where(rows @ truth / 4 + rng.logistic(size=2048) > 0, 1.0, -1.0)
    return {"rows": jnp.asarray(rows, jnp.float32), "labels": jnp.asarray(labels, jnp.float32)}


def logistic_loss(params: Any, rows: Any, labels: Any) -> Any:
    return jnp.mean(jax.nn.softplus(-labels * (rows @ params["w"])))


def descend(
    optimizer: optax.GradientTransformation, gradient_dtype: Any = jnp.float32
) -> tuple[np.ndarray, np.ndarray]:
    """The weights after each of 200 updates [200, 4096], and the losses over all rows after each."""
    order = jnp.asarray(np.random.default_rng(6).integers(0, 2048, (STEPS, 512)))
    start = {"w": jnp.zeros(4096)}

    @jax.jit
    def descent(data: Any) -> Any:
        def step(carry: Any, rows: Any) -> Any:
            params, state = carry
            grads = jax.grad(logistic_loss)(params, data["rows"][rows], data["labels"][rows])
            grads, _ = clip_by_global_norm(jax.tree.map(lambda g: g.astype(gradient_dtype), grads), 1.0)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params["w"], logistic_loss(params, **data))

        return jax.lax.scan(step, (start, optimizer.init(start)), order)[1]

    path, losses = descent(problem())
    return np.asarray(path, np.float64), np.asarray(losses, np.float64)


def moved_further(path: np.ndarray, reference: np.ndarray) -> float:
    """By what share the weights went further on the way of the reference, at the worst of the updates from 20 on."""
    off, way = (path - reference)[20:], reference[20:]
    return float(np.abs(np.sum(off * way, axis=1) / np.sum(way**2, axis=1)).max())


@pytest.mark.parametrize("cfg", OPTIMIZERS, ids=name)
def test_200_updates_lose_nothing_to_bfloat16_moments_and_gradients(cfg: TrainConfig) -> None:
    """Against float32 for both: the loss, which falls by more than 0.3 nats, is within 1e-4 nats after every update.

    The 4096 weights scatter by 0.3 to 0.5 % of the way they went, each by chance: over all of them the way is as long
    within 3e-4 (0.5 % / sqrt(4096) is 8e-5). With moments rounded to nearest, which rise with large squares and do
    not fall with small ones, it is not.
    """
    wide = build_optimizer(dataclasses.replace(cfg, moment_dtype="float32", gradient_dtype="float32"), STEPS)
    reference, wanted = descend(wide)
    assert wanted[0] - wanted[-1] > 0.3
    for gradient_dtype in (jnp.float32, BF16):
        path, losses = descend(build_optimizer(cfg, STEPS), gradient_dtype)
        assert np.abs(losses - wanted).max() < 1e-4
        assert moved_further(path, reference) < 3e-4
        assert 1e-3 < np.linalg.norm(path[-1] - reference[-1]) / np.linalg.norm(reference[-1]) < 6e-3
    twin, _ = descend(nearest(wide))
    assert moved_further(twin, reference) > 4.5e-4


@pytest.mark.parametrize("cfg", OPTIMIZERS, ids=name)
def test_bfloat16_gradients_are_clipped_and_averaged_in_float32(cfg: TrainConfig) -> None:
    """Bit for bit what the same gradients give in float32. In bfloat16 clipping alone would be 2**-9 off."""
    grads, params = {"w": tree(1, BF16)["stack"] * 100}, {"w": jnp.ones((3, 64, 32))}
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    optimizer = build_optimizer(dataclasses.replace(cfg, moment_dtype="float32"), 10)
    ours = clip_by_global_norm(grads, 1.0)
    assert bits(ours) == bits(clip_by_global_norm(wide, 1.0))
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype("float32")}
    norm = float(ours[1])
    np.testing.assert_allclose(ours[0]["w"], wide["w"] / norm, rtol=1e-6)
    in_bfloat16 = (grads["w"] / BF16(norm)).astype(jnp.float32)
    assert np.abs(in_bfloat16 / ours[0]["w"] - 1).max() > 1e-3
    state = optimizer.init(params)
    assert bits(optimizer.update(grads, state, params)) == bits(optimizer.update(wide, state, params))
    assert optimizer.update(grads, state, params)[0]["w"].dtype == jnp.float32


@pytest.mark.mesh
@pytest.mark.parametrize("cfg", OPTIMIZERS + ALL_NARROW, ids=name)
def test_the_mesh_changes_no_bit(cfg: TrainConfig) -> None:
    """Parameters, bfloat16 moments and counts on eight devices are those on one; nothing is sent between devices."""
    optimizer, dtype = build_optimizer(cfg, 30), jnp.dtype(cfg.master_dtype)
    grads = [tree(seed, BF16) for seed in range(1, 4)]
    expected = run(optimizer, tree(0, dtype), grads)
    other = run(build_optimizer(dataclasses.replace(cfg, seed=7), 30), tree(0, dtype), grads)
    assert bits(expected[1]) != bits(other[1])
    for sizes in ((1, 8, 1), (2, 2, 2)):
        layout = build_layout(MeshConfig(*sizes))
        specs = {"stack": (None, "fsdp", "tensor"), "table": (("data", "tensor"), "fsdp"), "scale": ("fsdp",)}
        placement = {name: NamedSharding(layout.mesh, PartitionSpec(*spec)) for name, spec in specs.items()}
        params = jax.device_put(tree(0, dtype), placement)
        split = [jax.device_put(grad, placement) for grad in grads]
        assert bits(run(optimizer, params, split)) == bits(expected)
        program = jax.jit(optimizer.update).lower(split[0], optimizer.init(params), params).compile().as_text()
        assert not any(word in program for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("cfg", OPTIMIZERS + ALL_NARROW, ids=name)
def test_a_resumed_run_is_the_same_run(cfg: TrainConfig) -> None:
    optimizer, dtype = build_optimizer(cfg, 30), jnp.dtype(cfg.master_dtype)
    grads = [tree(seed, BF16) for seed in range(1, 9)]
    straight = run(optimizer, tree(0, dtype), grads)
    params, state = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), run(optimizer, tree(0, dtype), grads[:3]))
    assert bits(run(optimizer, params, grads[3:], state)) == bits(straight)


def test_weights_and_moments_are_rounded_by_different_bits() -> None:
    """Two moments and the weight itself, all half way between two bfloat16 values: up or down, no two of them alike.

    The correlation of 65536 pairs of coins has the standard error 1/256. Under one key they would all be the same.
    """
    below, half_way = (np.array(x, np.uint32).view(np.float32) for x in (0x3CA30000, 0x3CA38000))

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        wanted = jax.tree.map(lambda p: jnp.full_like(p, half_way), params)
        return jax.tree.map(jnp.subtract, wanted, params), (wanted, wanted)

    inner = optax.GradientTransformation(lambda params: (params, params), update)
    optimizer = stochastic_rounding(stochastic_moments(inner, seed=3), seed=3)
    params = {"w": jnp.full(2**16, below, BF16)}
    updates, state = optimizer.update(params, optimizer.init(params), params)
    rounded = [optax.apply_updates(params, updates), *state.inner.inner]
    coins = [np.sign(np.asarray(x["w"], np.float64) - half_way) for x in rounded]
    assert all(np.all(np.abs(coin) == 1) and abs(np.mean(coin)) < 4.5 / 256 for coin in coins)
    for one, other in itertools.combinations(coins, 2):
        assert abs(np.mean(one * other)) < 4.5 / 256


@pytest.mark.parametrize("cfg, wanted", [*zip(OPTIMIZERS + ALL_NARROW, (8, 10, 6, 8), strict=True)], ids=str)
def test_bytes_per_parameter(cfg: TrainConfig, wanted: int) -> None:
    """Master weight, moments and gradient: 8 bytes with RMSprop where float32 takes 12. Moments lie as weights do."""
    sharding = NamedSharding(build_layout(MeshConfig()).mesh, PartitionSpec("fsdp"))

    def total(cfg: TrainConfig) -> tuple[float, Any]:
        optimizer = build_optimizer(cfg, 10)
        params = {"w": jax.ShapeDtypeStruct((1024, 64), jnp.dtype(cfg.master_dtype), sharding=sharding)}
        state = jax.eval_shape(optimizer.init, params)
        placed = optax.tree.map_params(
            optimizer,
            lambda leaf, param: f"{leaf.dtype} {param.sharding}",
            state,
            params,
            transform_non_params=lambda leaf: f"{leaf.shape} {leaf.dtype}",
        )
        grads = jax.ShapeDtypeStruct((1024, 64), jnp.dtype(cfg.gradient_dtype))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state, grads)) if leaf.shape)
        return size / (1024 * 64), set(jax.tree.leaves(placed))

    assert total(cfg) == (wanted, {f"bfloat16 {sharding}", "() int32"})
    wide = dataclasses.replace(cfg, master_dtype="float32", moment_dtype="float32", gradient_dtype="float32")
    moments = 2 if cfg.optimizer == "adamw" else 1
    assert total(wide) == (8 + 4 * moments, {f"float32 {sharding}", "() int32"})
