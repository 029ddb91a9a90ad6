"""The DPO step and the loop around it.

`train_step` is pure; jit, shardings and donation are applied in `Trainer` and nowhere else. The reference is not
in memory while training: its log-probabilities come with the batch, computed by `score_pairs` with the same
forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from drift_jax.config import TrainConfig
from drift_jax.data.batches import PairBatch, PairLoader, count_tokens, put_batch
from drift_jax.losses import (
    NLL_REDUCTIONS,
    NLL_TOKENS,
    LossWeights,
    chosen_nll_sum,
    count_weights,
    dpo_losses,
    normalise_weights,
    preference_loss,
    preference_metrics,
    sum_logps,
)
from drift_jax.models.logps import token_logps
from drift_jax.models.policy import bind
from drift_jax.models.qwen import abstract_params
from drift_jax.optim import build_optimizer, build_schedule, changed_at_peak, clip_by_global_norm
from drift_jax.sharding import constrain, replicated

Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything an update changes."""

    params: Any  # nested dict
    opt_state: optax.OptState
    step: Any  # int32 scalar


@dataclass(frozen=True)
class StepSetup:
    """What is fixed while a stage runs (static under jit)."""

    graphdef: Any
    config: TrainConfig
    remat: str
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule


def pair_token_logps(
    setup: StepSetup, params: dict[str, Any], ids: Int[Array, "B 2 T"], mask: Bool[Array, "B 2 T"]
) -> tuple[Float[Array, "B 2 T"], Bool[Array, "B 2 T"]]:
    """log p(ids[..., t + 1] | ids[..., :t + 1]) at index t, and which of those t + 1 are completion tokens."""
    pairs, _, length = ids.shape
    rows = constrain(ids.reshape(2 * pairs, length), "batch", "length")
    model = bind(setup.graphdef, params)
    hidden = model.hidden(rows, jnp.broadcast_to(jnp.arange(length), rows.shape), setup.remat)
    logps = token_logps(hidden, model.output_table, jnp.roll(rows, -1, axis=1))
    # Rolled around, the first token lands last; it belongs to the prompt, so its mask is False.
    return logps.reshape(pairs, 2, length), jnp.roll(mask, -1, axis=2)


def batch_shares(config: TrainConfig, batch: PairBatch) -> LossWeights:
    """What each pair [A, B] and each chosen token [A, B, T] counts for in the mean over the whole update."""
    micro, pairs = batch.real.shape
    counted = batch.completion_mask[:, :, 0] & NLL_TOKENS[config.nll_tokens](batch.ids[:, :, 0])
    chosen = jnp.roll(counted, -1, axis=2).reshape(micro * pairs, -1)
    reduction = NLL_REDUCTIONS[config.nll_reduction](config.group_size)
    shares = normalise_weights(count_weights(chosen, batch.real.reshape(-1).astype(jnp.float32), reduction))
    return LossWeights(shares.pairs.reshape(micro, pairs), shares.nll.reshape(micro, pairs, -1))


def loss_and_grads(setup: StepSetup, params: dict[str, Any], batch: PairBatch) -> tuple[Metrics, dict[str, Any]]:
    """Metrics and gradients of the whole update: the same for A micro-batches of B pairs as for one of A * B."""
    c = setup.config
    scales = {"beta": c.beta, "label_smoothing": c.label_smoothing, "rpo_alpha": c.rpo_alpha}

    def loss_fn(params: dict[str, Any], micro: PairBatch, shares: LossWeights) -> tuple[Array, Metrics]:
        logps, mask = pair_token_logps(setup, params, micro.ids, micro.completion_mask)
        return preference_loss(logps, mask, micro.ref_logps, shares, **scales)

    def one(xs: tuple[PairBatch, LossWeights]) -> tuple[Metrics, dict[str, Any]]:
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *xs)
        return metrics, grads

    xs = (batch, batch_shares(c, batch))
    first, rest = (jax.tree.map(lambda x, part=part: x[part], xs) for part in (0, slice(1, None)))
    total = one(first)
    if batch.real.shape[0] > 1:
        # In float32 also where the weights, and so the gradients, are bfloat16: a sum of eight would lose three bits.
        wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), total)
        total, _ = jax.lax.scan(lambda total, xs: (jax.tree.map(jnp.add, total, one(xs)), None), wide, rest)
    return total


def train_step(setup: StepSetup, state: TrainState, batch: PairBatch) -> tuple[TrainState, Metrics]:
    """One update."""
    metrics, grads = loss_and_grads(setup, state.params, batch)
    grads, norm = clip_by_global_norm(grads, setup.config.max_grad_norm)
    updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    rate = jnp.asarray(setup.schedule(state.step))
    changed = changed_at_peak(setup.config, state.params, updates, grads, rate)
    metrics |= {"grad_norm": norm, "learning_rate": rate, "params_changed": changed}
    return TrainState(params, opt_state, state.step + 1), metrics


class PairScores(NamedTuple):
    """Of each pair: log-probabilities of both completions, NLL and length of the chosen one."""

    logps: Float[Any, "*N 2"]  # nats, summed over the completion
    last_logps: Float[Any, "*N 2"]  # nats, of the completion's last token
    nll: Float[Any, "*N"]  # nats, summed over the chosen completion
    tokens: Float[Any, "*N"]


def score_step(setup: StepSetup, params: dict[str, Any], batch: PairBatch) -> PairScores:
    """Scores [A, B] pairs under `params`: the reference pass and evaluation."""

    def one(micro: PairBatch) -> PairScores:
        logps, mask = pair_token_logps(setup, params, micro.ids, micro.completion_mask)
        last = mask & ~jnp.roll(mask, -1, axis=-1)  # the last position is never a target, so nothing wraps around
        return PairScores(sum_logps(logps, mask), sum_logps(logps, last), *chosen_nll_sum(logps, mask))

    return jax.lax.map(one, batch)


@final
class Trainer:
    """A policy with its optimizer on a mesh: the one place where jit, shardings and donation are applied."""

    def __init__(
        self, graphdef: Any, declared: dict[str, Any], mesh: Mesh, config: TrainConfig, remat: str, total_steps: int
    ) -> None:
        self.mesh = mesh
        optimizer = build_optimizer(config, total_steps)
        schedule = build_schedule(config, total_steps)
        self.setup = StepSetup(graphdef, config, remat, optimizer, schedule)
        self.abstract_state = self._abstract_state(abstract_params(declared, mesh, jnp.dtype(config.master_dtype)))
        # Pinned: a state that came back placed differently would be compiled for a second time.
        placement = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self._step = jax.jit(
            partial(train_step, self.setup), donate_argnums=0, out_shardings=(placement, replicated(mesh))
        )
        self._score = jax.jit(partial(score_step, self.setup))

    def _abstract_state(self, params: dict[str, Any]) -> TrainState:
        """Shapes, dtypes and placements of the state; each moment lies where its parameter lies."""
        rest = replicated(self.mesh)
        opt_state = optax.tree.map_params(
            self.setup.optimizer,
            lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
            jax.eval_shape(self.setup.optimizer.init, params),
            params,
            transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rest),
        )
        return TrainState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32, sharding=rest))

    def init_state(self, params: dict[str, Any]) -> TrainState:
        """Fresh optimizer state around the given parameters."""
        placement = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state.opt_state)
        opt_state = jax.jit(self.setup.optimizer.init, out_shardings=placement)(params)
        return self.state_at(0, params, opt_state)

    def state_at(self, step: int, params: dict[str, Any], opt_state: optax.OptState) -> TrainState:
        """The state after `step` updates, from restored parts."""
        return TrainState(params, opt_state, jax.device_put(np.int32(step), replicated(self.mesh)))

    def step(self, state: TrainState, batch: PairBatch) -> tuple[TrainState, Metrics]:
        """One update. `state` is donated: it cannot be used again."""
        with jax.set_mesh(self.mesh):
            return self._step(state, put_batch(batch, self.mesh))

    def compiled_shapes(self) -> int:
        """How many programs the update was compiled to: one per row length, no more."""
        return self._step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]

    def score_pairs(
        self,
        params: dict[str, Any],
        loader: PairLoader,
        on_batch: Callable[[int], None] | None = None,
        as_trained: bool = False,
    ) -> PairScores:
        """Scores of all pairs of a loader in the order of its pairs, on the host in float64.

        Args:
          as_trained: in the batches of the first epoch instead of by length (see `PairLoader.first_epoch`).
        """
        count = len(loader.pairs)
        scores = PairScores(np.empty((count, 2)), np.empty((count, 2)), np.empty(count), np.empty(count))
        for rows, batch in loader.first_epoch() if as_trained else loader.by_length():
            with jax.set_mesh(self.mesh):
                parts = jax.device_get(self._score(params, put_batch(batch, self.mesh)))
            for column, part in zip(scores, parts, strict=True):
                column[rows] = part.reshape(-1, *part.shape[2:])[: len(rows)]
            if on_batch is not None:
                on_batch(len(rows))
        return scores

    def fit(
        self, state: TrainState, loader: PairLoader, total_steps: int
    ) -> Iterator[tuple[TrainState, int, Metrics, int]]:
        """Yields (state, updates done, metrics, real tokens of the batch) after each update.

        Starts at `state.step`, so a restored state goes on with the batch that comes next. The metrics are still
        on their way from the device.
        """
        for step in range(int(state.step), total_steps):
            batch = loader.shuffled(step)
            state, metrics = self.step(state, batch)
            yield state, step + 1, metrics, count_tokens(batch)


def evaluate_scores(scores: PairScores, ref_logps: Float[np.ndarray, "N 2"], config: TrainConfig) -> dict[str, float]:
    """TRL's `eval_*` metrics of held-out pairs, each pair counting the same (rule 9 of losses.py)."""
    logps, ref = jnp.asarray(scores.logps, jnp.float32), jnp.asarray(ref_logps, jnp.float32)
    shares = jnp.full(len(logps), 1.0 / len(logps))
    nll = scores.nll.sum() / scores.tokens.sum()
    loss = dpo_losses(logps, ref, config.beta, config.label_smoothing).mean() + config.rpo_alpha * nll
    metrics = {"loss": loss, "nll_loss": nll} | preference_metrics(logps, ref, shares, config.beta)
    return {f"eval_{name}": float(value) for name, value in metrics.items()}


def host_metrics(metrics: Metrics) -> dict[str, float]:
    """Waits for the device and brings the metrics over."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
