"""The loop around the DPO step: programs on a mesh, batches sent ahead, scores of whole data sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from drift_jax.compiled import recall
from drift_jax.config import TrainConfig
from drift_jax.data.batches import PairBatch, PairLoader, count_tokens, put_batch
from drift_jax.data.packing import tokens_per_compilation
from drift_jax.losses import dpo_losses, preference_metrics
from drift_jax.models.attention import resolve_attention
from drift_jax.models.qwen import abstract_params
from drift_jax.models.stack import resolve_scan
from drift_jax.optim import build_optimizer, build_schedule
from drift_jax.sharding import Layout, put, replicated, use_layout
from drift_jax.step import (
    KnownScores,
    Metrics,
    PairScores,
    StepSetup,
    TrainState,
    measure_step,
    score_step,
    train_step,
)
from drift_jax.theory import PairGradients


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
    loss, metrics = jax.device_get(_held_out_metrics(logps, ref, config))
    nll = scores.nll.sum() / scores.tokens.sum()
    metrics = {"loss": loss + config.rpo_alpha * nll, "nll_loss": nll} | metrics
    return {f"eval_{name}": float(value) for name, value in metrics.items()}


@partial(jax.jit, static_argnums=2)
def _held_out_metrics(
    logps: Float[Array, "N 2"], ref: Float[Array, "N 2"], config: TrainConfig
) -> tuple[Float[Array, ""], Metrics]:
    """The loss without its NLL term, and what does not depend on that."""
    shares = jnp.full(len(logps), 1.0 / len(logps))
    loss = dpo_losses(logps, ref, config.beta, config.label_smoothing).mean()
    return loss, preference_metrics(logps, ref, shares, config.beta)


def host_metrics(metrics: Metrics) -> dict[str, float]:
    """Waits for the device and brings the metrics over."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
