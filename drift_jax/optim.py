"""Optimizers, learning-rate schedules and clipping that compute what torch and transformers compute.

One update is `apply_gradients`: `clip_by_global_norm`, then the transformation of `build_optimizer`, then
`optax.apply_updates`. Gradients may be bfloat16; everything is computed in float32 and fused, so that no wider copy
of them is ever kept. Clipping stands apart so that the norm is computed once and logged as `grad_norm`.

Where optax is not torch, and what is done here:
 1. `optax.rmsprop` has decay 0.9 and adds epsilon inside the square root; torch 0.99, outside. After
    clipping, squared gradients of a 7B model are near 1e-10, far below epsilon 1e-8: inside the root it
    shrinks every step about ninefold. `optax.scale_by_rms` with `eps_in_sqrt=False` equals torch and is used.
 2. `optax.scale_by_adam` computes 1 - beta**k in float32, which for 0.999 at k = 1 is wrong by 1e-5 relative.
    `_scale_by_adam` keeps the digits.
 3. `optax.clip_by_global_norm` scales by max_norm / norm; torch by min(1, max_norm / (norm + 1e-6)).
 4. `optax.linear_schedule` and `optax.cosine_decay_schedule` subtract almost equal numbers near the end; the
    schedules here keep a relative error below 1e-6 at every step.
 5. torch's RMSprop adds weight decay to the gradient (L2); AdamW shrinks the weights. Both as in torch, but
    torch's AdamW in float32 rounds the factor 1 - lr * decay, so that 1 - 5e-9 is 1. Here the decay joins
    the update before the weight is rounded, which agrees with torch in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int32, PyTree

from drift_jax.changes import changed_at_peak
from drift_jax.config import TrainConfig
from drift_jax.errors import ConfigError, DataError
from drift_jax.rounding import stochastic_moments, stochastic_rounding

Params = PyTree  # of arrays, or of anything with a shape and a dtype
Mask = PyTree | Callable[[Params], PyTree]  # of bools
Decay = Callable[[Float[Array, ""]], Float[Array, ""]]


def total_steps(num_pairs: int, batch_size: int, epochs: int | float, max_steps: int | None = None) -> int:
    """Updates of a stage: `max_steps` if given, else ceil(epochs * ceil(num_pairs / batch_size)).

    As in the Hugging Face Trainer, a part of an epoch is rounded up to whole updates, and `max_steps` replaces
    `epochs`: a stage may end early or go on past them.

    Raises:
      DataError: there is no pair to train on.
    """
    if num_pairs < 1:
        raise DataError(f"a training stage needs at least one pair, found {num_pairs}. Look at drops.json.")
    return max_steps if max_steps is not None else math.ceil(epochs * math.ceil(num_pairs / batch_size))


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """`config.warmup_steps`, or else ceil(warmup_ratio * total_steps), rounded as in the Hugging Face Trainer.

    There too 0.07 of 100 gives 8, and a warm-up may be longer than the stage.
    """
    return math.ceil(total_steps * config.warmup_ratio) if config.warmup_steps is None else config.warmup_steps


def build_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Update index k (from 0) -> learning rate, equal to transformers' `get_*_schedule_with_warmup`.

    During warm-up it is k / warmup_steps of the peak, so the first update has learning rate 0. `constant` has
    a warm-up too.

    Raises:
      ConfigError: `total_steps` is below 1.
    """
    if total_steps < 1:
        raise ConfigError(f"a learning-rate schedule needs at least 1 update, found {total_steps}.")
    warmup = warmup_steps(config, total_steps)
    decay = _DECAYS[config.schedule]

    def schedule(count: Any) -> Float[Array, ""]:
        step = jnp.asarray(count).astype(jnp.result_type(float))  # float32; float64 under enable_x64
        length = max(1, total_steps - warmup)
        # Integers below 2**24 are exact in float32, so this keeps all digits down to the last update.
        left = (length - (step - warmup)) / length
        factor = jnp.where(step < warmup, step / max(1, warmup), decay(left))
        return config.learning_rate * factor

    return schedule


def build_optimizer(config: TrainConfig, total_steps: int, mask: Mask | None = None) -> optax.GradientTransformation:
    """Clipped gradients -> updates for `optax.apply_updates`, step for step what torch's optimizer does.

    The parameters must have `config.master_dtype`, and moments are kept in `config.moment_dtype`; bfloat16 ones are
    rounded stochastically (`rounding.py`) by `config.seed`. Gradients may be bfloat16. The updates are float32 in any
    case.

    Args:
      mask: the parameters that decay, as a pytree of bools or a function of the parameters; by default
        `decay_mask`. Read only when `config.weight_decay` is above 0.

    Raises:
      ConfigError: a decay rate is 1, or (from `init`) a parameter has not the master dtype.
    """
    master = _MASTERS[config.master_dtype]
    optimizer = optax.chain(
        *_OPTIMIZERS[config.optimizer].build(config, decay_mask if mask is None else mask),
        optax.scale_by_learning_rate(build_schedule(config, total_steps)),
    )
    optimizer = master.wrap(_MOMENTS[config.moment_dtype](optimizer, config.seed), config.seed)

    def init(params: Params) -> optax.OptState:
        master.check(params)
        return optimizer.init(params)

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, optax.OptState]:
        return optimizer.update(jax.tree.map(_widen, updates), state, params)

    return optax.GradientTransformation(init, update)


class Update(NamedTuple):
    """What `apply_gradients` leaves behind."""

    params: Params
    opt_state: optax.OptState
    grad_norm: Float[Any, ""]  # before clipping
    params_changed: Float32[Any, ""]  # `changed_at_peak` of update `first_moving_update`, 0 at all others


def apply_gradients(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    grads: Params,
    learning_rate: Float[Array, ""],
    step: Int32[Array, ""],
) -> Update:
    """One update of the weights by unclipped gradients.

    With `train.on_nonfinite: skip` gradients that are not finite change neither weights nor moments; the schedule goes
    on.

    Args:
      learning_rate: that of this update, for `params_changed`; the optimizer knows its own.
      step: updates done before this one.
    """
    norm = global_norm(grads)

    def updates(norm: Float[Array, ""]) -> tuple[Params, optax.OptState]:
        return optimizer.update(_clip(grads, norm, config.max_grad_norm), opt_state, params)

    def count() -> Float32[Array, ""]:
        # From the start: updates and clipped gradients from outside would be arrays, which are fused away otherwise.
        return changed_at_peak(config, params, updates(norm)[0], grads, learning_rate)

    changed = jax.lax.cond(step == first_moving_update(config), count, lambda: jnp.zeros((), jnp.float32))
    # Always `norm`. Without a need for `changed` the compiler may count after it has overwritten weights and moments,
    # for which it copies them at every update.
    after = jnp.where(changed < 0, jnp.nan, norm)
    moved, moments = updates(after)
    weights = optax.apply_updates(params, moved)
    if config.on_nonfinite == "skip":
        finite = jnp.isfinite(norm)
        weights = jax.tree.map(partial(jnp.where, finite), weights, params)
        moments = _keep_moments(finite, moments, opt_state)
    return Update(weights, moments, norm, changed)


def _keep_moments(finite: Bool[Array, ""], new: optax.OptState, old: optax.OptState) -> optax.OptState:
    """The old state unless `finite`, but for the schedule: an update that is left out is one of the stage's."""

    def choose(new: Any, old: Any) -> Any:
        return new if _is_schedule(new) else jnp.where(finite, new, old)

    return jax.tree.map(choose, new, old, is_leaf=_is_schedule)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def first_moving_update(config: TrainConfig) -> int:
    """Index (from 0) of the first update whose learning rate is above 0."""
    return 1 if config.warmup_steps is not None or config.warmup_ratio > 0 else 0


def decay_mask(params: Params) -> PyTree:
    """True where weight decay applies: where the path has no "bias" and no "norm" (as in transformers)."""

    def decays(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path).lower()
        return "bias" not in name and "norm" not in name

    return jax.tree_util.tree_map_with_path(decays, params)


def global_norm(grads: Params) -> Float[Array, ""]:
    """Euclidean norm over all leaves, accumulated in float32 or wider."""
    squares = [jnp.sum(jnp.square(_widen(g))) for g in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares, start=jnp.zeros(())))


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Params, Float[Array, ""]]:
    """Scales the gradients by min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does.

    Returns:
      The scaled gradients, float32 also where they were bfloat16, and their norm before scaling. If the norm is not
      finite the gradients hold NaN, as in torch: the caller must look at the norm.
    """
    norm = global_norm(grads)
    return _clip(grads, norm, max_norm), norm


def _clip(grads: Params, norm: Float[Array, ""], max_norm: float) -> Params:
    coefficient = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: _widen(g) * coefficient, grads)


def _widen(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """bfloat16 -> float32; float32 and float64 as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def describe_optimizer(config: TrainConfig, total_steps: int) -> str:
    """The resolved optimizer in one paragraph, for people to read before a run."""
    kind = _OPTIMIZERS[config.optimizer]
    decay = f"{config.weight_decay:g}, {kind.coupling}" if config.weight_decay else "none"
    updates = warmup_steps(config, total_steps)
    warmup = f"linear from 0 over {updates} of {total_steps} updates" if updates else "no warm-up"
    if updates > total_steps:
        warmup = f"linear from 0 over {updates} updates, of which the stage has {total_steps}"
    after = "constant" if config.schedule == "constant" else f"{config.schedule} to 0"
    return (
        f"{config.optimizer}: {kind.describe(config)}; weight decay {decay}; gradients clipped to global "
        f"norm {config.max_grad_norm:g}; learning rate {config.learning_rate:g}, {warmup}, then {after}; "
        f"{_in_words(config.master_dtype, 'weights')}, {_in_words(config.moment_dtype, 'moments')}, "
        f"{config.gradient_dtype} gradients."
    )


def _in_words(dtype: str, what: str) -> str:
    return f"{dtype} {what}" + (" rounded stochastically" if dtype == "bfloat16" else "")


def _linear(left: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.maximum(left, 0.0)


def _cosine(left: Float[Array, ""]) -> Float[Array, ""]:
    # 0.5 (1 + cos(pi (1 - left))) without the cancellation that ruins the last steps in float32.
    return jnp.square(jnp.sin(0.5 * math.pi * left))


def _constant(left: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.ones_like(left)


# Share of the updates after warm-up that are left, 1 to 0 -> share of the peak learning rate.
_DECAYS: dict[str, Decay] = {"linear": _linear, "cosine": _cosine, "constant": _constant}


def _rmsprop(config: TrainConfig, mask: Mask) -> list[optax.GradientTransformation]:
    _check_rates(rmsprop_decay=config.rmsprop_decay)
    scale = optax.scale_by_rms(
        config.rmsprop_decay,
        config.rmsprop_epsilon,
        initial_scale=0.0,
        eps_in_sqrt=False,
        bias_correction=False,
    )
    return [*_weight_decay(config, mask), scale]


def _adamw(config: TrainConfig, mask: Mask) -> list[optax.GradientTransformation]:
    _check_rates(adam_beta1=config.adam_beta1, adam_beta2=config.adam_beta2)
    scale = _scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon)
    return [scale, *_weight_decay(config, mask)]


def _describe_rmsprop(config: TrainConfig) -> str:
    return f"decay {config.rmsprop_decay:g}, epsilon {config.rmsprop_epsilon:g} outside the square root"


def _describe_adamw(config: TrainConfig) -> str:
    return f"betas {config.adam_beta1:g} and {config.adam_beta2:g}, epsilon {config.adam_epsilon:g}"


class _Optimizer(NamedTuple):
    build: Callable[[TrainConfig, Mask], list[optax.GradientTransformation]]
    describe: Callable[[TrainConfig], str]
    coupling: str


_OPTIMIZERS: dict[str, _Optimizer] = {
    "rmsprop": _Optimizer(_rmsprop, _describe_rmsprop, coupling="added to the gradient, not on biases and norms"),
    "adamw": _Optimizer(_adamw, _describe_adamw, coupling="apart from the gradient, not on biases and norms"),
}


def _weight_decay(config: TrainConfig, mask: Mask) -> list[optax.GradientTransformation]:
    return [optax.add_decayed_weights(config.weight_decay, mask)] if config.weight_decay else []


def _scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with the bias correction in full float32 precision."""
    log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))

    def init(params: Params) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like
        return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=zeros(params), nu=zeros(params))

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, beta1, 1)
        nu = optax.tree.update_moment(updates, state.nu, beta2, 2)
        step = jnp.asarray(count).astype(jnp.result_type(float))
        # 1 - beta**step by expm1: subtracting a float32 beta**step near 1 from 1 leaves few digits.
        correction1, correction2 = -jnp.expm1(step * log_beta1), -jnp.expm1(step * log_beta2)
        scaled = jax.tree.map(lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + epsilon), mu, nu)
        return scaled, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _check_rates(**rates: float) -> None:
    wrong = {f"train.{name}": rate for name, rate in rates.items() if not 0 <= rate < 1}
    if wrong:
        raise ConfigError(
            f"decay rates must be in [0, 1), found {wrong}: at 1 a moment never sees a gradient. "
            "Usual values are 0.9 to 0.999."
        )


class _Master(NamedTuple):
    wrap: Callable[[optax.GradientTransformation, int], optax.GradientTransformation]
    check: Callable[[Params], None]


def _check_float32(params: Params) -> None:
    narrow = _leaves_where(params, lambda dtype: jnp.promote_types(dtype, jnp.float32) != dtype)
    if narrow:
        raise ConfigError(
            f"master weights must be float32: a bfloat16 weight of 0.02 cannot absorb an update of 5e-7. "
            f"{len(narrow)} parameters are narrower, the first: {', '.join(narrow[:3])}. Load them as "
            "float32; model.compute_dtype sets the dtype of the matmuls. Where memory is short, "
            "train.master_dtype=bfloat16 allows them: updates are then rounded stochastically."
        )


def _check_bfloat16(params: Params) -> None:
    other = _leaves_where(params, lambda dtype: dtype != jnp.bfloat16)
    if other:
        raise ConfigError(
            f"with train.master_dtype=bfloat16 every weight must be bfloat16. {len(other)} parameters are not, the "
            f"first: {', '.join(other[:3])}. Load them as bfloat16, or set train.master_dtype=float32, which is "
            "exact and takes twice the memory."
        )


def _leaves_where(params: Params, wrong: Callable[[Any], bool]) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [f"{jax.tree_util.keystr(path)} ({leaf.dtype})" for path, leaf in leaves if wrong(leaf.dtype)]


_MASTERS: dict[str, _Master] = {
    "float32": _Master(lambda optimizer, seed: optimizer, _check_float32),
    "bfloat16": _Master(stochastic_rounding, _check_bfloat16),
}

_MOMENTS: dict[str, Callable[[optax.GradientTransformation, int], optax.GradientTransformation]] = {
    "float32": lambda optimizer, seed: optimizer,
    "bfloat16": stochastic_moments,
}
