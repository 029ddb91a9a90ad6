"""A whole update, and how many of the weights it changes."""

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

from drift_jax.changes import changed_at_peak, changed_share
from drift_jax.config import TrainConfig
from drift_jax.optim import (
    apply_gradients,
    build_optimizer,
    build_schedule,
    clip_by_global_norm,
    first_moving_update,
)
from tests.test_optim import config, gradients, weights


def test_changed_share_counts_parameters_that_have_a_gradient() -> None:
    old = {"a": jnp.arange(4.0), "b": jnp.zeros((2, 3), jnp.bfloat16)}
    grads = {"a": jnp.array([1.0, 0.0, -1.0, 1e-37]), "b": jnp.ones((2, 3), jnp.bfloat16).at[0, 0].set(0)}
    new = {"a": old["a"].at[0].add(1).at[1].add(1), "b": old["b"].at[0].set(1)}
    # a: 3 have a gradient, 1 of them moved (another moved without one); b: 5 have one, 2 of them moved.
    share = jax.jit(changed_share)(old, new, grads)
    assert share.dtype == jnp.float32
    assert float(share) == pytest.approx(3 / 8)
    assert float(changed_share(old, old, grads)) == 0.0
    assert float(changed_share(old, old, jax.tree.map(jnp.zeros_like, grads))) == 1.0
    nan = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), grads)
    assert float(changed_share(old, nan, nan)) == 1.0


def test_changed_share_counts_past_the_end_of_int32() -> None:
    """A scalar made 3 * 2**30 elements inside the program takes no memory; a third of it changes."""

    @jax.jit
    def share(old: jax.Array, new: jax.Array, grad: jax.Array) -> jax.Array:
        return changed_share(*({"w": jnp.broadcast_to(x[:, None], (3, 2**30))} for x in (old, new, grad)))

    old, new = jnp.zeros(3, jnp.int8), jnp.array([1, 0, 0], jnp.int8)
    assert float(share(old, new, jnp.ones(3, jnp.int8))) == pytest.approx(1 / 3, rel=1e-6)


def test_changed_at_peak_does_not_depend_on_the_warm_up() -> None:
    """The same gradient in the second update of warm-ups from 1 to 10000 updates, where the rate is peak / warm-up.

    Weights are from 1e-3 to 20. Those from 16 on, 2 % of them, are 1.9e-6 apart and take no update of 5e-7; most take
    no 10000th of it.
    """
    params = {"w": jnp.asarray(np.geomspace(1e-3, 20, 4096), jnp.float32)}
    grads = {"w": jnp.ones(4096)}
    shares, actual = [], []
    for warmup in (1, 35, 10_000):
        cfg = config(optimizer="adamw", warmup_steps=warmup)
        optimizer, rate = build_optimizer(cfg, 20_000), build_schedule(cfg, 20_000)(1)
        _, state = optimizer.update(grads, optimizer.init(params), params)
        updates, _ = optimizer.update(grads, state, params)
        shares.append(float(changed_at_peak(cfg, params, updates, grads, rate)))
        actual.append(float(changed_share(params, optax.apply_updates(params, updates), grads)))
    assert shares == pytest.approx([math.log(16 / 1e-3) / math.log(20 / 1e-3)] * 3, abs=1e-3)
    assert shares[0] == actual[0]
    assert actual[1] < 0.7 and actual[2] < 0.01
    zero = changed_at_peak(config(), params, jax.tree.map(jnp.zeros_like, params), grads, jnp.zeros(()))
    assert float(zero) == 0.0


def apply(cfg: TrainConfig, steps: int = 100) -> Callable[..., Any]:
    """(params, state, grads, updates done) -> `apply_gradients`."""
    optimizer, schedule = build_optimizer(cfg, steps), build_schedule(cfg, steps)
    return lambda params, state, grads, step: apply_gradients(
        cfg, optimizer, params, state, grads, schedule(step), step
    )


@pytest.mark.parametrize(
    "cfg",
    [
        config(learning_rate=1e-5, warmup_steps=3),
        config(optimizer="adamw", weight_decay=0.1, warmup_ratio=0.0, moment_dtype="bfloat16"),
        config(master_dtype="bfloat16", moment_dtype="bfloat16", warmup_steps=3),
    ],
    ids=["rmsprop", "adamw", "bfloat16"],
)
def test_an_update_is_its_parts_and_counts_once(cfg: TrainConfig) -> None:
    """Clipping, optimizer, addition; `params_changed` at the first update that moves the weights and 0 at others."""
    optimizer, schedule = build_optimizer(cfg, 100), build_schedule(cfg, 100)
    params = {name: jnp.asarray(w, cfg.master_dtype) for name, w in weights().items()}
    state, moving = optimizer.init(params), first_moving_update(cfg)
    assert moving == (1 if cfg.warmup_ratio else 0)
    assert float(schedule(moving)) > 0 and all(float(schedule(k)) == 0 for k in range(moving))
    update, seen = jax.jit(apply(cfg)), []
    for step, grad in enumerate(gradients(0.5)[:4]):
        grads = jax.tree.map(jnp.asarray, grad)
        clipped, norm = clip_by_global_norm(grads, 1.0)
        moved, wanted_state = optimizer.update(clipped, state, params)
        share = changed_at_peak(cfg, params, moved, clipped, schedule(step))
        ours = update(params, state, grads, jnp.int32(step))
        assert float(ours.params_changed) == pytest.approx(float(share) if step == moving else 0.0, abs=2e-3)
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-6)
        seen.append(float(ours.params_changed))
        wanted = (optax.apply_updates(params, moved), wanted_state)
        for a, b in zip(jax.tree.leaves((ours.params, ours.opt_state)), jax.tree.leaves(wanted), strict=True):
            # Inside one program products are fused into sums: the last bit differs, and now and then a rounding.
            close = np.isclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-6, atol=1e-12)
            assert close.mean() > (0.99 if a.dtype == jnp.bfloat16 else 0.9999)
        params, state = ours.params, ours.opt_state
    assert seen[moving] > 0


def test_gradients_that_are_not_finite_show_in_the_norm() -> None:
    params = {"w": jnp.ones(3)}
    state = build_optimizer(config(), 100).init(params)
    for bad in (jnp.nan, jnp.inf):
        assert not np.isfinite(
            apply(config())(params, state, {"w": jnp.array([1.0, bad, 0.0])}, jnp.int32(0)).grad_norm
        )


def is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(
    "cfg",
    [
        config(learning_rate=1e-3, warmup_ratio=0.0),
        config(optimizer="adamw", weight_decay=0.1, warmup_ratio=0.0, moment_dtype="bfloat16"),
        config(master_dtype="bfloat16", moment_dtype="bfloat16", warmup_ratio=0.0),
    ],
    ids=["rmsprop", "adamw", "bfloat16"],
)
def test_a_skipped_update_leaves_every_bit_and_others_are_as_without(cfg: TrainConfig, bad: float) -> None:
    skip, stop = (jax.jit(apply(dataclasses.replace(cfg, on_nonfinite=policy))) for policy in ("skip", "stop"))
    params = {name: jnp.asarray(w, cfg.master_dtype) for name, w in weights().items()}
    state = build_optimizer(cfg, 100).init(params)
    for step, grad in enumerate(gradients(0.5)[:3]):
        grads = jax.tree.map(jnp.asarray, grad)
        name = next(iter(grads))
        broken = grads | {name: grads[name].at[(0,) * grads[name].ndim].set(bad)}
        kept, lost = skip(params, state, broken, jnp.int32(step)), stop(params, state, broken, jnp.int32(step))
        assert not np.isfinite(kept.grad_norm)
        # All but the place in the schedule, which goes on.
        after = jax.tree.map(
            lambda node: node._replace(count=node.count - 1) if is_schedule(node) else node,
            kept.opt_state,
            is_leaf=is_schedule,
        )
        for now, before in zip(*map(jax.tree.leaves, ((kept.params, after), (params, state))), strict=True):
            assert now.dtype == before.dtype and np.array_equal(now, before)
        assert not all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(lost.params))
        one, other = (update(params, state, grads, jnp.int32(step)) for update in (skip, stop))
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            assert np.array_equal(a, b)
        params, state = one[:2]


def test_counting_copies_no_weights() -> None:
    """Donated weights and moments are overwritten in place: what else there is are flags, 4 bytes each on CPUs.

    Counting at every update, from the updates themselves, takes half as much again.
    """
    cfg, shape = config(), (256, 1024)
    optimizer, schedule = build_optimizer(cfg, 100), build_schedule(cfg, 100)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in "abcd"}
    state = jax.eval_shape(optimizer.init, params)

    def always(params: Any, state: Any, grads: Any, step: Any) -> Any:
        clipped, _ = clip_by_global_norm(grads, 1.0)
        moved, state = optimizer.update(clipped, state, params)
        changed = changed_at_peak(cfg, params, moved, clipped, schedule(step))
        return optax.apply_updates(params, moved), state, changed

    def temporary(update: Callable[..., Any]) -> float:
        program = jax.jit(update, donate_argnums=(0, 1)).lower(
            params, state, params, jax.ShapeDtypeStruct((), jnp.int32)
        )
        memory = program.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes / (4 * math.prod(shape))

    ours, twin = temporary(lambda *args: tuple(apply(cfg)(*args))), temporary(always)
    skips = dataclasses.replace(cfg, on_nonfinite="skip")
    skipping = temporary(lambda *args: tuple(apply(skips)(*args)))
    assert ours < 4.1 and skipping < 4.1, (ours, "the state before is in place as well", skipping)
    assert twin > 5.9, twin
