"""The DPO step as plainly as it can be written: the oracle of the packed one.

Every side of every pair is a row of its own, prompt and completion, padded on the right: ids `[B, 2, T]`. Attention is
a softmax over all of `[T, T]`, the layers are a Python loop, all logits are in memory, and gradients are `jax.grad`'s.
Of drift_jax only the layer's own arithmetic is used (`models/qwen.py`), which tests/models compare with transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drift_jax.config import TrainConfig
from drift_jax.data.pairs import TokenizedPair
from drift_jax.models.norms import rms_norm
from drift_jax.models.policy import bind
from drift_jax.models.qwen import build_rope


class PlainBatch(NamedTuple):
    """B pairs; the last ones may be padding."""

    ids: np.ndarray  # [B, 2, T]
    prompts: np.ndarray  # [B], tokens of each prompt
    sizes: np.ndarray  # [B, 2], tokens of prompt and completion
    counted: np.ndarray  # [B, 2, T], the completion tokens that count
    real: np.ndarray  # [B]
    ref_logps: np.ndarray  # [B, 2]


class PlainScores(NamedTuple):
    logps: Any  # [B, 2]
    last_logps: Any  # [B, 2]
    rewards: Any  # [B, 2]


def plain_batch(
    pairs: Sequence[TokenizedPair], ref_logps: np.ndarray, size: int, length: int, lost_ends: np.ndarray | None = None
) -> PlainBatch:
    """The pairs and as much padding as `size` needs, in rows of `length`.

    Args:
      lost_ends: [pairs, 2], whose last token does not count.
    """
    ids = np.zeros((size, 2, length), np.int32)
    sizes, prompts = np.ones((size, 2), np.int32), np.ones(size, np.int32)
    real, refs = np.arange(size) < len(pairs), np.zeros((size, 2), np.float32)
    refs[: len(pairs)] = ref_logps
    for b, pair in enumerate(pairs):
        prompts[b] = len(pair.prompt_ids)
        for side, completion in enumerate((pair.chosen_ids, pair.rejected_ids)):
            row = np.concatenate([pair.prompt_ids, completion])
            ids[b, side, : len(row)], sizes[b, side] = row, len(row)
    ends = sizes.copy()
    if lost_ends is not None:
        ends[: len(pairs)] -= lost_ends
    at = np.arange(length)
    counted = (at >= prompts[:, None, None]) & (at < ends[..., None]) & real[:, None, None]
    return PlainBatch(ids, prompts, sizes, counted, real, refs)


def plain_token_logps(graphdef: Any, params: dict[str, Any], ids: jax.Array) -> jax.Array:
    """log p(token | all before it in its row), 0 for the first: [B, T]."""
    model = bind(graphdef, params)
    config, length = model.config, ids.shape[1]
    x = params["embed"][ids]
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    rope = build_rope(positions, config.head_dim, config.rope_theta)
    for layer in range(config.layers):
        weights = {**params, "blocks": jax.tree.map(lambda w, i=layer: w[i], params["blocks"])}
        x, _ = bind(graphdef, weights).blocks(x, rope, _attend)
    x = rms_norm(x, params["norm"], config.norm_eps)
    table = params["embed" if config.tied else "head"]
    logps = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", x, table)[:, :-1], axis=-1)
    return jnp.pad(jnp.take_along_axis(logps, ids[:, 1:, None], axis=-1)[..., 0], ((0, 0), (1, 0)))


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    length, groups = query.shape[1], query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    scores = jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), value)


def plain_loss(
    graphdef: Any, config: TrainConfig, params: dict[str, Any], batch: PlainBatch
) -> tuple[jax.Array, tuple[dict[str, jax.Array], PlainScores]]:
    """Loss; metrics under TRL's names, and scores of the pairs."""
    length = batch.ids.shape[-1]
    token_logps = plain_token_logps(graphdef, params, batch.ids.reshape(-1, length)).reshape(batch.ids.shape)
    logps = jnp.where(batch.counted, token_logps, 0.0).sum(-1)
    last = (jnp.arange(length) == batch.sizes[..., None] - 1) & batch.counted
    rewards = config.beta * (logps - batch.ref_logps)
    scores = PlainScores(logps, jnp.where(last, token_logps, 0.0).sum(-1), rewards)
    margins = rewards[:, 0] - rewards[:, 1]
    # log(1 + exp(-x)) is -log sigmoid(x).
    losses = (1 - config.label_smoothing) * jnp.logaddexp(0.0, -margins)
    losses += config.label_smoothing * jnp.logaddexp(0.0, margins)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.where(batch.real, values, 0.0).sum() / batch.real.sum()

    counted = batch.counted[:, 0]
    if config.nll_tokens == "nonzero":
        counted = counted & (batch.ids[:, 0] != 0)
    nll, tokens = -jnp.where(counted, token_logps[:, 0], 0.0).sum(-1), counted.sum(-1)
    nll_loss = _REDUCTIONS[config.nll_reduction](nll, tokens, config.group_size)
    loss = mean(losses) + config.rpo_alpha * nll_loss
    metrics = {"loss": loss, "nll_loss": nll_loss, "rewards/margins": mean(margins)}
    metrics["rewards/accuracies"] = mean((margins > 0).astype(jnp.float32))
    for side, name in enumerate(("chosen", "rejected")):
        metrics |= {f"rewards/{name}": mean(rewards[:, side]), f"logps/{name}": mean(logps[:, side])}
    return loss, (metrics, scores)


def _mean_over(parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Of (sum of nll, tokens) the mean of those means that have a token."""
    some = jnp.stack([tokens > 0 for _, tokens in parts])
    means = jnp.stack([nll / jnp.maximum(tokens, 1) for nll, tokens in parts])
    return jnp.where(some, means, 0.0).sum() / jnp.maximum(some.sum(), 1)


_REDUCTIONS = {
    "global_token_mean": lambda nll, tokens, group: _mean_over([(nll.sum(), tokens.sum())]),
    "sequence_mean": lambda nll, tokens, group: _mean_over(list(zip(nll, tokens, strict=True))),
    "group_token_mean": lambda nll, tokens, group: _mean_over(
        [(nll[i : i + group].sum(), tokens[i : i + group].sum()) for i in range(0, len(nll), group)]
    ),
}


def plain_step(graphdef: Any, config: TrainConfig) -> Any:
    """A compiled function (params, PlainBatch) -> (metrics, gradients, scores)."""

    @jax.jit
    def step(params: dict[str, Any], batch: PlainBatch) -> tuple[dict[str, jax.Array], Any, PlainScores]:
        grads, (metrics, scores) = jax.grad(partial(plain_loss, graphdef, config), has_aux=True)(params, batch)
        return metrics, grads, scores

    return step
