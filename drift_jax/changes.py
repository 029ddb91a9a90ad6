"""How many of the weights an update changes: whether their dtype can take updates as small as those of the run."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, PyTree

from drift_jax.config import TrainConfig

Params = PyTree  # of arrays


def changed_share(old_params: Params, new_params: Params, grads: Params) -> Float32[Array, ""]:
    """Of the parameters whose gradient is not 0, the share (0 to 1) that an update changed.

    Each count is exact within an array of up to 2**31 - 1 elements; beyond that and over the arrays it adds up in
    float32, which for n such parts is within n * 6e-8 relative. With no gradient but 0 the share is 1: no parameter
    that should have moved stayed. A gradient of NaN counts, and so does a parameter that becomes NaN.
    """
    tally = _Tally(*jnp.zeros(2, jnp.float32))
    for old, new, grad in zip(*map(jax.tree.leaves, (old_params, new_params, grads)), strict=True):
        tally = tally.add(old, new, grad)
    return tally.share()


def changed_at_peak(
    config: TrainConfig, params: Params, updates: Params, grads: Params, learning_rate: Float[Array, ""]
) -> Float32[Array, ""]:
    """`changed_share` of an update as if its learning rate were the peak of the schedule.

    It tells whether the weights can take what the run is going to give them, from the first update with a learning
    rate above 0 on. That update's own share says less: a 35th of 5e-7 is below the float32 spacing of many weights,
    which is no fault. At a learning rate of 0 the share is 0. Updates rounded stochastically count as they are.
    """
    scale = jnp.where(learning_rate > 0, config.learning_rate / jnp.where(learning_rate > 0, learning_rate, 1.0), 1.0)
    tally = _Tally(*jnp.zeros(2, jnp.float32))
    for param, update, grad in zip(*map(jax.tree.leaves, (params, updates, grads)), strict=True):
        # One array after the other: CPUs keep a flag in 4 bytes, and would keep all of both counts at once.
        param, grad, tally = jax.lax.optimization_barrier((param, grad, tally))
        tally = tally.add(param, optax.apply_updates(param, update * scale), grad)
    return tally.share()


class _Tally(NamedTuple):
    """How many parameters have a gradient other than 0, and how many of these changed."""

    changed: Float32[Any, ""]
    counted: Float32[Any, ""]

    def add(self, old: Array, new: Array, grad: Array) -> _Tally:
        return _Tally(self.changed + _count((grad != 0) & (new != old)), self.counted + _count(grad != 0))

    def share(self) -> Float32[Array, ""]:
        return jnp.where(self.counted > 0, self.changed / jnp.maximum(self.counted, 1.0), 1.0)


def _count(flags: Bool[Array, "*dims"]) -> Float32[Array, ""]:
    """How many are True. float32 stops counting ones at 2**24 and int32 ends at 2**31, so each has its part."""
    axes, size = [], 1
    for axis in reversed(range(flags.ndim)):
        size *= flags.shape[axis]
        if size >= 2**31:
            break
        axes.append(axis)
    return jnp.sum(jnp.sum(flags, axis=axes, dtype=jnp.int32).astype(jnp.float32))
