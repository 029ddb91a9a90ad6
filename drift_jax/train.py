"""The DPO step and the loop around it.

`train_step` is pure; jit, shardings and donation are applied in `Trainer` and nowhere else. The reference is not
in memory while training: its log-probabilities come with the batch, computed by `score_pairs` with the same
forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from drift_jax.compiled import recall
from drift_jax.config import TrainConfig
from drift_jax.data.batches import PairBatch, PairLoader, count_tokens, put_batch
from drift_jax.data.packing import tokens_per_compilation
from drift_jax.losses import (
    NLL_REDUCTIONS,
    NLL_TOKENS,
    LossWeights,
    count_weights,
    dpo_losses,
    normalise_weights,
    preference_loss,
    preference_metrics,
    sum_by_completion,
)
from drift_jax.models.attention import AttentionBackend, resolve_attention
from drift_jax.models.intervals import KeyIntervals, KeySpans, place_tokens, to_intervals
from drift_jax.models.logps import choose_tile, token_logps
from drift_jax.models.policy import bind
from drift_jax.models.qwen import abstract_params
from drift_jax.models.stack import resolve_scan
from drift_jax.optim import apply_gradients, build_optimizer, build_schedule, global_norm
from drift_jax.sharding import Layout, constrain, put, replicated, use_layout
from drift_jax.theory import PairGradients

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


class _Programs(NamedTuple):
    """What of a trainer depends on no weights."""

    setup: StepSetup
    abstract_state: TrainState
    init: Any  # the jitted functions, from here on
    step: Any
    score: Any
    measure: Any


def _build_programs(
    graphdef: Any,
    declared: dict[str, Any],
    layout: Layout,
    config: TrainConfig,
    remat: str,
    total_steps: int,
    attention: str,
    scan_layers: bool | None,
) -> _Programs:
    platform, everywhere = layout.platform, replicated(layout)
    backend = resolve_attention(attention, platform)
    optimizer, schedule = build_optimizer(config, total_steps), build_schedule(config, total_steps)
    scan = resolve_scan(scan_layers, remat, platform, layout.devices)
    setup = StepSetup(platform, graphdef, config, remat, scan, backend, optimizer, schedule)
    params = abstract_params(declared, layout, jnp.dtype(config.master_dtype))
    state = _abstract_state(optimizer, params, everywhere)
    # Pinned: a state that came back placed differently would be compiled for a second time.
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    return _Programs(
        setup,
        state,
        init=jax.jit(optimizer.init, out_shardings=placement.opt_state),
        step=jax.jit(partial(train_step, setup), donate_argnums=0, out_shardings=(placement, everywhere)),
        score=jax.jit(partial(score_step, setup), out_shardings=everywhere),
        measure=jax.jit(partial(measure_step, setup), out_shardings=everywhere),
    )


def _abstract_state(optimizer: optax.GradientTransformation, params: dict[str, Any], rest: Any) -> TrainState:
    """Shapes, dtypes and placements of the state; each moment lies where its parameter lies."""
    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rest),
    )
    return TrainState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32, sharding=rest))


@final
class Trainer:
    """A policy with its optimizer on a mesh: the one place where jit, shardings and donation are applied."""

    def __init__(
        self,
        graphdef: Any,
        declared: dict[str, Any],
        layout: Layout,
        config: TrainConfig,
        remat: str,
        total_steps: int,
        attention: str = "auto",
        scan_layers: bool | None = None,
    ) -> None:
        self.layout = layout
        # The rest follows from these: the model's sizes are part of its code.
        settings = (config, remat, total_steps, attention, scan_layers)
        build = partial(_build_programs, graphdef, declared, layout, *settings)
        programs = recall("trainer", (graphdef, layout.key, *settings), build)
        self.setup, self.abstract_state, self.jitted_init, self.jitted_step = programs[:4]
        self.jitted_score, self.jitted_measure = programs.score, programs.measure
        self._shapes_before = self._shapes()

    def init_state(self, params: dict[str, Any]) -> TrainState:
        """Fresh optimizer state around the given parameters."""
        return self.state_at(0, params, self.jitted_init(params))

    def state_at(self, step: int, params: dict[str, Any], opt_state: optax.OptState) -> TrainState:
        """The state after `step` updates, from restored parts."""
        return TrainState(params, opt_state, put(np.int32(step), replicated(self.layout)))

    def step(self, state: TrainState, batch: PairBatch) -> tuple[TrainState, Metrics]:
        """One update. `state` is donated: it cannot be used again."""
        with use_layout(self.layout):
            return self.jitted_step(state, put_batch(batch, self.layout))

    def compiled_shapes(self) -> int:
        """How many programs the update was compiled to by this trainer: one per row length, no more."""
        return self._shapes() - self._shapes_before

    def compile_tokens(self, flops_per_weight: float) -> int:
        """`packing.tokens_per_compilation` of this model on these devices."""
        weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract_state.params))
        return tokens_per_compilation(self.layout.platform, self.layout.devices, weights, flops_per_weight)

    def _shapes(self) -> int:
        return self.jitted_step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]

    def score_pairs(
        self,
        params: dict[str, Any],
        loader: PairLoader,
        on_batch: Callable[[int], None] | None = None,
        as_trained: bool = False,
        known: KnownScores | None = None,
    ) -> PairScores:
        """Scores of all pairs of a loader in the order of its pairs, on the host in float64.

        Args:
          as_trained: in the batches of the first epoch instead of by length (see `PairLoader.first_epoch`).
          known: batches that were scored before are passed over, and their scores are NaN.
        """
        count = len(loader.pairs)
        scores = PairScores(*(np.full(shape, np.nan) for shape in ((count, 2), (count, 2), count, count)))

        def collect(rows: Int[np.ndarray, "R"], parts: PairScores) -> None:
            for column, part in zip(scores, jax.device_get(parts), strict=True):
                column[rows] = part[: len(rows)]
            if known is not None:
                known.keep(rows, PairScores(*(column[rows] for column in scores)))
            if on_batch is not None:
                on_batch(len(rows))

        waiting: list[tuple[Int[np.ndarray, "R"], PairScores]] = []
        for rows, batch in loader.first_epoch() if as_trained else loader.by_length():
            if known is not None and known.pairs[rows].all():
                if on_batch is not None:
                    on_batch(len(rows))
                continue
            with use_layout(self.layout):
                waiting.append((rows, self.jitted_score(params, put_batch(batch, self.layout))))
            # One batch behind, so that the device always has the next one.
            if len(waiting) > 1:
                collect(*waiting.pop(0))
        for rows, parts in waiting:
            collect(rows, parts)
        return scores

    def measure_pairs(
        self, params: dict[str, Any], loader: PairLoader, on_pair: Callable[[int], None] | None = None
    ) -> PairGradients:
        """Of each pair of a loader of single pairs, in their order, on the host."""
        count = len(loader.pairs)
        found = PairGradients(np.empty((count, 2)), np.empty(count))
        for (row,), batch in loader.by_length():
            with use_layout(self.layout):
                # One after the other: each holds a set of gradients.
                logps, norm = jax.device_get(self.jitted_measure(params, put_batch(batch, self.layout)))
            found.logps[row], found.norms[row] = logps, norm
            if on_pair is not None:
                on_pair(1)
        return found

    def fit(
        self, state: TrainState, loader: PairLoader, total_steps: int
    ) -> Iterator[tuple[TrainState, int, Metrics, int]]:
        """Yields (state, updates done, metrics, real tokens of the batch) after each update.

        Starts at `state.step`, so a restored state goes on with the batch that comes next. The metrics are still
        on their way from the device: whoever reads them one update late never keeps the device waiting.
        """
        first = int(state.step)

        def send(step: int) -> tuple[int, PairBatch]:
            batch = loader.shuffled(step)
            return count_tokens(batch), put_batch(batch, self.layout)

        ahead = send(first) if first < total_steps else None
        for step in range(first, total_steps):
            assert ahead is not None
            tokens, batch = ahead
            with use_layout(self.layout):
                state, metrics = self.jitted_step(state, batch)
            # The next batch is packed and sent while the device computes this one.
            ahead = send(step + 1) if step + 1 < total_steps else None
            yield state, step + 1, metrics, tokens


def evaluate_scores(scores: PairScores, ref_logps: Float[np.ndarray, "N 2"], config: TrainConfig) -> dict[str, float]:
    """TRL's `eval_*` metrics of held-out pairs, each pair counting the same (rule 9 of losses.py)."""
    logps, ref = jnp.asarray(scores.logps, jnp.float32), jnp.asarray(ref_logps, jnp.float32)
    metrics = host_metrics(_held_out_metrics(logps, ref, config))
    nll = float(scores.nll.sum() / scores.tokens.sum())
    metrics = {"loss": metrics.pop("dpo_loss") + config.rpo_alpha * nll, "nll_loss": nll} | metrics
    return {f"eval_{name}": value for name, value in metrics.items()}


@partial(jax.jit, static_argnums=2)
def _held_out_metrics(logps: Float[Array, "N 2"], ref: Float[Array, "N 2"], config: TrainConfig) -> Metrics:
    shares = jnp.full(len(logps), 1.0 / len(logps))
    loss = dpo_losses(logps, ref, config.beta, config.label_smoothing).mean()
    return {"dpo_loss": loss} | preference_metrics(logps, ref, shares, config.beta)


def host_metrics(metrics: Metrics) -> dict[str, float]:
    """Waits for the device and brings the metrics over."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
