"""Stochastic rounding: neighbours only, right on average, the same on every mesh and after a resume."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from drift_jax.changes import changed_at_peak, changed_share
from drift_jax.config import MeshConfig, TrainConfig
from drift_jax.errors import ConfigError
from drift_jax.optim import build_optimizer, build_schedule
from drift_jax.rounding import StochasticRoundingState, stochastic_round, stochastic_rounding
from drift_jax.sharding import build_layout
from tests.test_optim import torch_run

BF16 = jnp.bfloat16
STEPS = 200


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 values next to finite float32 ones: towards 0 and away from it (equal where x is one itself)."""
    bits = x.astype(np.float32).view(np.uint32)
    inner = bits & np.uint32(0xFFFF0000)
    outer = inner + np.uint32(0x10000) * ((bits & np.uint32(0xFFFF)) > 0)
    return inner.view(np.float32), outer.astype(np.uint32).view(np.float32)


def all_bfloat16() -> np.ndarray:
    """Every finite bfloat16 that is not subnormal, as float32."""
    values = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    return values[np.isfinite(values) & ((np.abs(values) >= 2.0**-126) | (values == 0))]


def normal_values(size: int) -> np.ndarray:
    """Float32 of either sign over the whole range of exponents."""
    rng = np.random.default_rng(0)
    return (rng.choice([-1, 1], size) * rng.uniform(1, 2, size) * 2.0 ** rng.integers(-126, 127, size)).astype(
        np.float32
    )


def rounded(x: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.asarray(stochastic_round(jnp.asarray(x), jax.random.key(seed)).astype(jnp.float32))


def test_a_bfloat16_stays_what_it_is() -> None:
    values = all_bfloat16()
    for seed in range(8):
        np.testing.assert_array_equal(rounded(values, seed), values)


def test_only_neighbours_come_out_and_both_do() -> None:
    values = normal_values(20_000)
    inner, outer = neighbours(values)
    results = np.stack([rounded(values, seed) for seed in range(4)])
    assert np.all((results == inner) | (results == outer))
    assert 0.4 < np.mean(results == outer) < 0.6


def test_what_is_no_finite_bfloat16() -> None:
    """NaN stays NaN whatever its payload, infinity stays; above the largest bfloat16 comes that one or infinity."""
    nan = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    infinite, most = np.array([np.inf, -np.inf], np.float32), float(jnp.finfo(BF16).max)
    above = np.full(1000, np.finfo(np.float32).max, np.float32) * np.float32(0.999)
    for seed in range(8):
        assert np.isnan(rounded(nan, seed)).all()
        np.testing.assert_array_equal(rounded(infinite, seed), infinite)
        assert set(rounded(above, seed).tolist()) == {most, math.inf}


def test_the_expectation_is_the_value() -> None:
    """Over 4096 seeds the share of outer neighbours is k / 2**16, each within 4.5 standard errors, and as scattered.

    The sum of the 256 squared z-scores of independent draws is 256 with standard deviation sqrt(2 * 256).
    """
    seeds, low = 4096, np.linspace(300, 65_300, 256).astype(np.uint32)
    values = (normal_values(256).view(np.uint32) & np.uint32(0xFFFF0000) | low).view(np.float32)
    inner, outer = neighbours(values)
    draw = jax.jit(jax.vmap(lambda key: stochastic_round(jnp.asarray(values), key)))
    draws = np.asarray(draw(jax.random.split(jax.random.key(1), seeds)).astype(jnp.float32))
    share, wanted = (draws == outer).mean(axis=0), low / 2**16
    z = (share - wanted) / np.sqrt(wanted * (1 - wanted) / seeds)
    assert np.abs(z).max() < 4.5
    assert abs(np.sum(z**2) - 256) < 4.5 * math.sqrt(2 * 256)
    # So is the mean itself, for both signs: the error of the mean in units of the spacing.
    mean_error = (draws.astype(np.float64).mean(axis=0) - values) / (outer.astype(np.float64) - inner)
    for sign in (-1, 1):
        chosen = np.sign(values) == sign
        assert abs(mean_error[chosen].mean()) < 4.5 * 0.5 / math.sqrt(seeds * chosen.sum())


def test_elements_are_rounded_independently_of_each_other() -> None:
    """A million equal weights under one key: the share, and the correlation of neighbours in the array."""
    count, wanted = 2**20, 0x4000 / 2**16
    value = np.array(0x3CA34000, np.uint32).view(np.float32)
    up = rounded(np.full((1024, 1024), value)) > value
    assert abs(up.mean() - wanted) < 4.5 * math.sqrt(wanted * (1 - wanted) / count)
    noise = (up - wanted) / math.sqrt(wanted * (1 - wanted))
    for lagged in (noise[:, 1:] * noise[:, :-1], noise[1:] * noise[:-1]):
        assert abs(lagged.mean()) < 4.5 / math.sqrt(count)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_last_of_the_16_bits_counts(sign: int) -> None:
    """One float32 step from a bfloat16: of 4 million weights 64 reach the far neighbour, give or take 8."""
    weight = np.float32(sign * 0.02).view(np.uint32) & np.uint32(0xFFFF0000)
    for low, near in ((1, weight), (0xFFFF, weight + np.uint32(0x10000))):
        value = np.array(weight | np.uint32(low), np.uint32).view(np.float32)
        far = np.sum(rounded(np.full(2**22, value)) != near.view(np.float32))
        assert abs(far - 64) < 4.5 * 8


def test_applied_updates_are_exactly_the_rounded_values() -> None:
    """For every bfloat16 weight and updates of all sizes, those that almost cancel the weight included."""
    params = all_bfloat16()
    rng, weight = np.random.default_rng(2), jnp.asarray(params, BF16)
    transform = stochastic_rounding(optax.identity(), seed=-7)
    key = jax.random.fold_in(jax.random.key(-7 % 2**32, impl="threefry2x32"), 0)
    tiny, huge = 2.0**-126, 2.0**127
    for case in range(60):
        relative = rng.uniform(-1, 1, params.shape) * 2.0 ** rng.integers(-30, 30, params.shape)
        cancelling = -1 + rng.choice([-1, 0, 1], params.shape) * 2.0 ** rng.integers(-26, -1, params.shape)
        update = (params.astype(np.float64) * (relative, cancelling)[case % 2]).clip(-huge, huge).astype(np.float32)
        update[np.abs(update) < tiny] = 0
        wide = jnp.asarray(update) + weight.astype(jnp.float32)
        updates, _ = transform.update({"w": jnp.asarray(update)}, transform.init({"w": weight}), {"w": weight})
        result = np.asarray(optax.apply_updates(weight, updates["w"]).astype(jnp.float32))
        wanted = np.asarray(stochastic_round(wide, jax.random.fold_in(key, 0)).astype(jnp.float32))
        # Subnormal sums and differences, which CPUs flush to 0 here, are outside of the claim.
        parts = (np.asarray(wide), wanted.astype(np.float64) - params)
        checked = np.all([(np.abs(part) >= tiny) | (part == 0) for part in parts], axis=0)
        assert checked.mean() > 0.9
        np.testing.assert_array_equal(result[checked], wanted[checked])


def test_infinite_and_nan_weights_are_kept() -> None:
    transform = stochastic_rounding(optax.identity(), seed=0)
    params = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1.0], BF16)
    grads = jnp.array([1.0, 1.0, 1.0, jnp.inf])
    updates, _ = transform.update(grads, transform.init(params), params)
    result = np.asarray(optax.apply_updates(params, updates).astype(jnp.float32))
    np.testing.assert_array_equal(result, [np.inf, -np.inf, np.nan, np.inf])


def run(
    optimizer: optax.GradientTransformation,
    params: Any,
    grads: list[Any],
    state: Any = None,
    watch: Callable[[Any], None] = lambda params: None,
) -> tuple[Any, Any]:
    """Updates under jit, from `state` or from the start."""

    @jax.jit
    def step(params: Any, state: Any, grad: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params) if state is None else state
    for grad in grads:
        params, state = step(params, state, grad)
        watch(params)
    return params, state


def test_small_updates_reach_the_weights_on_average() -> None:
    """200 updates of 5e-7 on weights near 0.02, which are 1.2e-4 apart: rounding to nearest loses every one of them.

    Stochastic rounding moves a weight by 0 or 1.2e-4, and the mean over all of them like float32 ones, within 4
    standard errors. Each weight's variance is at most (distance gone) * (spacing), so the error of the mean is
    sqrt(1e-4 * 1.2e-4 / 65536) / 1e-4 = 0.43 % of the distance.
    """
    rng, rate, count = np.random.default_rng(3), 5e-7, 2**16
    start = jnp.asarray(rng.choice([-1, 1], count) * rng.uniform(0.016, 0.031, count), BF16)
    towards = np.sign(rng.normal(size=count)).astype(np.float32)
    grads = [jnp.asarray(-towards)] * STEPS
    before = np.asarray(start, np.float32)

    to_nearest, _ = run(optax.sgd(rate), start, grads)
    np.testing.assert_array_equal(np.asarray(to_nearest, np.float32), before)

    in_float32, _ = run(optax.sgd(rate), start.astype(jnp.float32), grads)
    distance = np.mean((np.asarray(in_float32) - before) * towards)
    assert distance == pytest.approx(STEPS * rate, rel=1e-2)

    ours, _ = run(stochastic_rounding(optax.sgd(rate), seed=42), start, grads)
    assert ours.dtype == BF16
    moved = np.mean((np.asarray(ours, np.float32) - before) * towards)
    error = math.sqrt(distance * 2.0**-13 / count)
    assert error / distance < 0.005
    assert abs(moved - distance) < 4 * error


CONFIGS = [
    TrainConfig(master_dtype="bfloat16", optimizer="rmsprop", learning_rate=1e-5),
    TrainConfig(master_dtype="bfloat16", optimizer="adamw", learning_rate=1e-5, weight_decay=0.1),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: c.optimizer)
def test_200_steps_track_torch_in_float32(cfg: TrainConfig) -> None:
    """The movement of 16384 weights, projected on the movement that torch gives them in float32, is 1 times that.

    The rounding errors of a weight are uncorrelated and each update u adds at most |u| * spacing to its variance.
    With V the sum of that over the updates and m the movement, the standard error of the projection is
    sqrt(sum(V m**2)) / sum(m**2), 0.6 % here; the mean difference has sqrt(sum(V)) / 16384. Both may be 4 errors off.
    """
    rng = np.random.default_rng(4)
    shape = (128, 128)
    start = np.asarray(jnp.asarray(rng.normal(0, 0.02, shape), BF16).astype(jnp.float32))
    lean = rng.normal(size=shape)
    grads = [{"w": (1e-3 * (lean + 0.5 * rng.normal(size=shape))).astype(np.float32)} for _ in range(STEPS)]
    theirs = torch_run(cfg, grads, torch.float32, start={"w": start})["w"]
    ours, _ = run(build_optimizer(cfg, STEPS), {"w": jnp.asarray(start, BF16)}, grads)
    ours = np.asarray(ours["w"], np.float64)

    optimizer = build_optimizer(dataclasses.replace(cfg, master_dtype="float32"), STEPS)
    path = [start]
    run(optimizer, {"w": jnp.asarray(start)}, grads, watch=lambda params: path.append(np.asarray(params["w"])))
    lengths = np.abs(np.diff(np.array(path, np.float64), axis=0)).sum(axis=0)
    largest = np.abs(path).max(axis=0) + 2 * np.abs(ours - theirs)
    variance = lengths * 2.0 ** (np.floor(np.log2(largest)) - 7)

    moved, off = theirs - start, ours - theirs
    error = math.sqrt(np.sum(variance * moved**2)) / np.sum(moved**2)
    assert error < 0.006
    assert abs(np.sum(off * moved) / np.sum(moved**2)) < 4 * error
    assert abs(off.mean()) < 4 * math.sqrt(variance.sum()) / off.size
    assert np.abs(off).max() < 8 * np.sqrt(variance).max()

    to_nearest = optimizer.update  # negative twin: the same optimizer, its result rounded to nearest
    twin, _ = run(optax.GradientTransformation(state_of(optimizer), to_nearest), {"w": jnp.asarray(start, BF16)}, grads)
    off = np.asarray(twin["w"], np.float64) - theirs
    assert np.sum(off * moved) / np.sum(moved**2) < -40 * error


def state_of(optimizer: optax.GradientTransformation) -> Any:
    """`init` with float32 moments for bfloat16 parameters, past the check that refuses these."""
    return lambda params: optimizer.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))


def tree(seed: int, dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"stack": (3, 64, 32), "table": (128, 16), "scale": (8,)}
    return {name: jnp.asarray(rng.normal(0, 0.02, shape), dtype) for name, shape in shapes.items()}


def bits(params: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


@pytest.mark.mesh
@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: c.optimizer)
def test_the_mesh_changes_no_bit(cfg: TrainConfig) -> None:
    """Parameters, moments and counts on eight devices are those on one; nothing is sent between devices."""
    optimizer = build_optimizer(cfg, 30)
    grads = [tree(seed, jnp.float32) for seed in range(1, 7)]
    expected = run(optimizer, tree(0, BF16), grads)
    assert bits(expected[0]) != bits(tree(0, BF16))
    for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
        layout = build_layout(MeshConfig(*sizes))
        specs = {"stack": (None, "fsdp", "tensor"), "table": (("data", "tensor"), "fsdp"), "scale": ("fsdp",)}
        placement = {name: NamedSharding(layout.mesh, PartitionSpec(*spec)) for name, spec in specs.items()}
        params = jax.device_put(tree(0, BF16), placement)
        split = [jax.device_put(grad, placement) for grad in grads]
        assert bits(run(optimizer, params, split)) == bits(expected)
        program = jax.jit(optimizer.update).lower(split[0], optimizer.init(params), params).compile().as_text()
        assert not any(word in program for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: c.optimizer)
def test_a_resumed_run_is_the_same_run(cfg: TrainConfig) -> None:
    optimizer = build_optimizer(cfg, 30)
    grads = [tree(seed, jnp.float32) for seed in range(1, 9)]
    straight = run(optimizer, tree(0, BF16), grads)
    half = run(optimizer, tree(0, BF16), grads[:3])
    params, state = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), half)
    assert bits(run(optimizer, params, grads[3:], state)) == bits(straight)
    forgetful = state._replace(count=jnp.zeros([], jnp.int32))
    assert bits(run(optimizer, params, grads[3:], forgetful)[0]) != bits(straight[0])


def test_bits_differ_by_seed_update_and_leaf() -> None:
    """Equal weights with equal updates: three ways to round them differently, and one to round them alike."""
    params = {"a": jnp.full(4096, 0.02, BF16), "b": jnp.full(4096, 0.02, BF16)}
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 6e-5), params)

    def first(seed: int, count: int = 0) -> dict[str, np.ndarray]:
        transform = stochastic_rounding(optax.identity(), seed)
        state = StochasticRoundingState(jnp.int32(count), optax.EmptyState())
        return jax.tree.map(np.asarray, transform.update(grads, state, params)[0])

    one = first(5)
    np.testing.assert_array_equal(one["a"], first(5)["a"])
    for other in (one["b"], first(6)["a"], first(5, count=1)["a"]):
        assert 0.4 < np.mean(one["a"] != other) < 0.6


def test_moments_are_float32_and_lie_where_the_parameters_lie() -> None:
    """As in `Trainer`: `optax.tree.map_params` must find the moments through the wrapper."""
    sharding = NamedSharding(build_layout(MeshConfig()).mesh, PartitionSpec("fsdp"))
    params = {"w": jax.ShapeDtypeStruct((16, 4), BF16, sharding=sharding)}
    for cfg, moments in zip(CONFIGS, (1, 2), strict=True):
        optimizer = build_optimizer(cfg, 10)
        placed = optax.tree.map_params(
            optimizer,
            lambda leaf, param: f"{leaf.dtype} {param.sharding}",
            jax.eval_shape(optimizer.init, params),
            params,
            transform_non_params=lambda leaf: f"{leaf.shape} {leaf.dtype}",
        )
        leaves = jax.tree.leaves(placed)
        assert leaves.count(f"float32 {sharding}") == moments
        assert set(leaves) == {f"float32 {sharding}", "() int32"}


def test_an_update_without_parameters_is_a_bug() -> None:
    transform = stochastic_rounding(optax.identity(), seed=0)
    with pytest.raises(ValueError, match="needs the parameters"):
        transform.update(jnp.ones(2), transform.init(jnp.ones(2, BF16)))


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: c.optimizer)
def test_bfloat16_masters_must_be_asked_for_and_be_there(cfg: TrainConfig) -> None:
    optimizer = build_optimizer(cfg, 10)
    with pytest.raises(ConfigError, match=r"must be bfloat16.*1 parameters.*'v'.*float32.*train.master_dtype=float32"):
        optimizer.init({"w": jnp.ones(3, BF16), "v": jnp.ones(3)})


def test_changed_at_peak_takes_rounded_updates_as_they_are() -> None:
    cfg = dataclasses.replace(CONFIGS[0], warmup_steps=10)
    optimizer, params = build_optimizer(cfg, 100), {"w": jnp.full(2**16, 0.02, BF16)}
    grads = {"w": jnp.ones(2**16)}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    updates, _ = optimizer.update(grads, state, params)
    actual = float(changed_share(params, optax.apply_updates(params, updates), grads))
    # The second update of RMSprop is rate / sqrt(0.01 + 0.0099), the spacing 2**-13, one standard error 9e-4.
    assert actual == pytest.approx(1e-6 / math.sqrt(0.0199) * 2**13, abs=4 * 9e-4)
    assert float(changed_at_peak(cfg, params, updates, grads, build_schedule(cfg, 100)(1))) == actual
