"""The DPO step: what one update computes from the parameters and a batch.

Everything here is pure; jit, shardings and donation are applied in `train.Trainer` and nowhere else. The reference is
not in memory while training: its log-probabilities come with the batch, computed by `score_step` with the same
forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from drift_jax.config import TrainConfig
from drift_jax.data.batches import PairBatch
from drift_jax.losses import (
    NLL_REDUCTIONS,
    NLL_TOKENS,
    LossWeights,
    count_weights,
    normalise_weights,
    preference_loss,
    sum_by_completion,
)
from drift_jax.models.attention import AttentionBackend
from drift_jax.models.intervals import KeyIntervals, KeySpans, place_tokens, to_intervals
from drift_jax.models.logps import choose_tile, token_logps
from drift_jax.models.policy import bind
from drift_jax.optim import apply_gradients, global_norm
from drift_jax.sharding import constrain

Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything an update changes."""

    params: Any  # nested dict
    opt_state: optax.OptState
    step: Any  # int32 scalar


@dataclass(frozen=True)
class StepSetup:
    """What is fixed while a stage runs (static under jit)."""

    platform: str  # `jax.Device.platform`
    graphdef: Any
    config: TrainConfig
    remat: str
    scan_layers: bool
    attention: AttentionBackend
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule


class MicroBatch(NamedTuple):
    """The rows of one micro-batch of a `PairBatch`."""

    ids: Int[Array, "R T"]
    positions: Int[Array, "R T"]
    spans: KeySpans
    sources: Int[Array, "G C"]
    targets: Int[Array, "G C"]
    owners: Int[Array, "G C"]


def micro_batch(batch: PairBatch, index: Int[Array, ""]) -> MicroBatch:
    """Micro-batch `index`, which may be traced."""
    rows = MicroBatch(*(getattr(batch, name) for name in MicroBatch._fields))
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), rows)


def arrange(backend: AttentionBackend, micro: MicroBatch) -> tuple[MicroBatch, KeySpans | KeyIntervals]:
    """The rows as a back end wants them, and which keys each query then sees."""
    if not backend.intervals:
        return micro, micro.spans
    places, seen = to_intervals(micro.spans)
    ids, positions = (place_tokens(x, places) for x in (micro.ids, micro.positions))
    # Of a group's rows, one after the other.
    among = (places + jnp.arange(len(places))[:, None] * places.shape[1]).reshape(len(micro.sources), -1)
    among -= jnp.arange(len(among))[:, None] * among.shape[1]
    return micro._replace(ids=ids, positions=positions, sources=jnp.take_along_axis(among, micro.sources, 1)), seen


def completion_token_logps(
    setup: StepSetup, params: dict[str, Any], micro: MicroBatch, grads: dict[str, Any] | None = None
) -> Float[Array, "G C"]:
    """Log-probability of each listed completion token, in nats.

    Args:
      grads: None, or gradients so far, to which those of `params` go (see models/stack.py).
    """
    rows, seen = arrange(setup.attention, micro)
    model = bind(setup.graphdef, params)
    ids, positions = (constrain(x, "batch", "length") for x in (rows.ids, rows.positions))
    loop = {"remat": setup.remat, "scan": setup.scan_layers}
    hidden = model.hidden(ids, positions, seen, attend=setup.attention.attend, **loop, grads=grads)
    listed = jnp.max(jnp.sum(micro.owners >= 0, axis=1))
    head, head_grads = model.output_table, model.output_grads(grads)
    tile = choose_tile(setup.platform, len(micro.sources), len(head))
    return token_logps(hidden, head, rows.sources, micro.targets, listed, head_grads, tile)


def batch_shares(config: TrainConfig, batch: PairBatch) -> LossWeights:
    """What each pair, and each chosen token of it, counts for in the mean over the whole update."""
    counted = (batch.owners >= 0) & NLL_TOKENS[config.nll_tokens](batch.targets)
    chosen = 2 * jnp.arange(len(batch.real))
    mine = (batch.owners[..., None] == chosen) & counted[..., None]
    tokens = jnp.sum(mine, axis=(0, 1, 2)).astype(jnp.float32)
    reduction = NLL_REDUCTIONS[config.nll_reduction](config.group_size)
    return normalise_weights(count_weights(tokens, batch.real.astype(jnp.float32), reduction), tokens)


def find_homes(batch: PairBatch) -> Int[Array, " N"]:
    """The micro-batch of each pair; the first one for a pair without a completion token, which still has its loss."""
    there = jnp.any(batch.owners[..., None] // 2 == jnp.arange(len(batch.real)), axis=(1, 2))
    return jnp.argmax(there, axis=0)


def micro_loss(
    setup: StepSetup,
    params: dict[str, Any],
    grads: dict[str, Any] | None,
    micro: MicroBatch,
    *,
    ref_logps: Float[Array, "N 2"],
    shares: LossWeights,
) -> tuple[Float[Array, ""], Metrics]:
    """A micro-batch's part of the loss and of the metrics; its gradient goes to `grads`, or to `params` if None.

    Args:
      shares: 0 for pairs of other micro-batches.
    """
    c, pairs = setup.config, len(ref_logps)
    token_logps = completion_token_logps(setup, params, micro, grads)
    logps = sum_by_completion(token_logps, micro.owners, micro.owners >= 0, pairs)
    nll = -sum_by_completion(token_logps, micro.owners, NLL_TOKENS[c.nll_tokens](micro.targets), pairs)[:, 0]
    scales = {"beta": c.beta, "label_smoothing": c.label_smoothing, "rpo_alpha": c.rpo_alpha}
    return preference_loss(logps, nll, ref_logps, shares, **scales)


def loss_and_grads(setup: StepSetup, params: dict[str, Any], batch: PairBatch) -> tuple[Metrics, dict[str, Any]]:
    """Metrics and gradients of the whole update, the same however its pairs were packed.

    Gradients have `gradient_dtype`, and there is one set of them: each micro-batch adds its own in place.
    """
    shares, homes = batch_shares(setup.config, batch), find_homes(batch)

    def loss(grads: dict[str, Any], index: Array) -> tuple[Float[Array, ""], Metrics]:
        mine = LossWeights(*(jnp.where(homes == index, share, 0.0) for share in shares))
        return micro_loss(setup, params, grads, micro_batch(batch, index), ref_logps=batch.ref_logps, shares=mine)

    def one(index: Array, so_far: tuple[Metrics, dict[str, Any]]) -> tuple[Metrics, dict[str, Any]]:
        metrics, grads = so_far
        # With respect to the gradients so far: what comes out is their sum with this micro-batch's (models/stack.py).
        grads, more = jax.grad(loss, has_aux=True)(grads, index)
        return jax.tree.map(jnp.add, metrics, more), grads

    grads = jax.tree.map(lambda p: jnp.zeros(p.shape, setup.config.gradient_dtype), params)
    _, shapes = jax.eval_shape(loss, grads, jnp.int32(0))
    metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, batch.micro_batches, one, (metrics, grads))


def train_step(setup: StepSetup, state: TrainState, batch: PairBatch) -> tuple[TrainState, Metrics]:
    """One update."""
    metrics, grads = loss_and_grads(setup, state.params, batch)
    rate = jnp.asarray(setup.schedule(state.step))
    update = apply_gradients(setup.config, setup.optimizer, state.params, state.opt_state, grads, rate, state.step)
    metrics |= {"grad_norm": update.grad_norm, "learning_rate": rate, "params_changed": update.params_changed}
    return TrainState(update.params, update.opt_state, state.step + 1), metrics


class PairScores(NamedTuple):
    """Of each pair: log-probabilities of both completions, NLL and length of the chosen one."""

    logps: Float[Any, "*N 2"]  # nats, summed over the completion
    last_logps: Float[Any, "*N 2"]  # nats, of the completion's last token
    nll: Float[Any, "*N"]  # nats, summed over the chosen completion
    tokens: Float[Any, "*N"]


class KnownScores(NamedTuple):
    """Of a pass that was begun before: what it has found, and who takes what is found now."""

    pairs: Bool[np.ndarray, " N"]  # which ones are known; a batch of these alone is passed over
    keep: Callable[[Int[np.ndarray, "R"], PairScores], None]  # positions in the loader's pairs, and their scores


def score_step(setup: StepSetup, params: dict[str, Any], batch: PairBatch) -> PairScores:
    """Scores the N pairs of a batch under `params`: the reference pass and evaluation."""
    pairs = len(batch.real)

    def one(index: Array, so_far: PairScores) -> PairScores:
        micro = micro_batch(batch, index)
        logps = completion_token_logps(setup, params, micro)
        every = micro.owners >= 0
        last = micro.owners != jnp.pad(micro.owners[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        sums = sum_by_completion(logps, micro.owners, every, pairs)
        ends = sum_by_completion(logps, micro.owners, last, pairs)
        tokens = sum_by_completion(jnp.ones_like(logps), micro.owners, every, pairs)
        return jax.tree.map(jnp.add, so_far, PairScores(sums, ends, -sums[:, 0], tokens[:, 0]))

    zeros = jnp.zeros((pairs, 2)), jnp.zeros(pairs)
    return jax.lax.fori_loop(0, batch.micro_batches, one, PairScores(zeros[0], zeros[0], zeros[1], zeros[1]))


def measure_step(
    setup: StepSetup, params: dict[str, Any], batch: PairBatch
) -> tuple[Float[Array, "2"], Float[Array, ""]]:
    """Of a batch's only pair: both log-probs, and the norm of the gradient of their difference (theory.py)."""
    micro = micro_batch(batch, jnp.int32(0))

    def difference(grads: dict[str, Any]) -> tuple[Float[Array, ""], Float[Array, "2"]]:
        token_logps = completion_token_logps(setup, params, micro, grads)
        logps = sum_by_completion(token_logps, micro.owners, micro.owners >= 0, len(batch.real))[0]
        return logps[0] - logps[1], logps

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, setup.config.gradient_dtype), params)
    grads, logps = jax.grad(difference, has_aux=True)(zeros)
    return logps, global_norm(grads)
