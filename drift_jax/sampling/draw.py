"""Drawing one token per row on the device: temperature, top-k, top-p, and numbers that know only their own row.

A token is drawn by inverting the distribution function of the softmax at a uniform number. Whether it is among those
that top-p keeps is one more pass over the row (the mass of what is likelier); one that is not is drawn again. That is
the distribution over the kept tokens, exactly, without sorting the vocabulary. The vocabulary is summed as a table of
128 columns: by columns, which vectorises, then over them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

_COLUMNS = 128
_NEARLY_ALL = 1 - 1e-6  # of the mass: rounding of its sum must not ask for more than there is
_SMALL_TOP_P = 0.5
_TRIES = 2  # tokens drawn at a time


class Drawn(NamedTuple):
    """A token of each row, and its log-prob in nats before temperature, top-k and top-p."""

    ids: Int[Array, " B"]
    logps: Float[Array, " B"]


def row_words(requests: Iterable[tuple[str, int]]) -> UInt32[np.ndarray, "B 2"]:
    """(row id, sample index) -> two words to fold into a key; the same on every machine and in every batch."""
    digests = [hashlib.sha256(f"{sample}:{row_id}".encode()).digest() for row_id, sample in requests]
    return np.array([np.frombuffer(digest[:8], "<u4") for digest in digests], np.uint32).reshape(-1, 2)


def row_keys(seed: int | Int[Array, ""], words: UInt32[Array, "B 2"]) -> Key[Array, "B"]:
    """A key per row from (seed, row id, sample)."""

    def one(pair: UInt32[Array, "2"]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), pair[0]), pair[1])

    return jax.vmap(one)(words)


def draw_tokens(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], temperature: float, top_k: int, top_p: float
) -> Drawn:
    """One token per row, from its own key.

    Of tokens the top_k most likely may be drawn (0: all), of these the smallest set that holds top_p of their mass;
    tokens as likely as the last one kept are kept as well. As in transformers, top-p looks at the probabilities
    renormalised after top-k. Temperature 0 is greedy: the first of the most likely.
    """
    rows = len(logits)
    table = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % _COLUMNS)), constant_values=-jnp.inf)
    table = table.reshape(rows, -1, _COLUMNS)
    largest = table.max(axis=1).max(axis=1)
    above = table - largest[:, None, None]
    norm = jnp.log(_sum(jnp.exp(above)))
    if temperature == 0:
        place = jnp.arange(table.shape[1])[:, None] * _COLUMNS + jnp.arange(_COLUMNS)
        ids = jnp.where(above == 0, place, table[0].size).min(axis=1).min(axis=1)
        return Drawn(ids.astype(jnp.int32), -norm)
    weights = jnp.exp(above / temperature)
    if top_k:
        weights = jnp.where(weights >= _kth_largest(weights, top_k)[:, None, None], weights, 0.0)
    if top_p < _SMALL_TOP_P:  # most draws would be left out: what is kept is found first
        target = min(top_p, _NEARLY_ALL) * _sum(weights)
        weights = jnp.where(weights >= _least_kept(weights, target)[:, None, None], weights, 0.0)
        top_p = 1.0
    ids = _draw_kept(weights, keys, top_p, broken=~jnp.isfinite(norm))
    logps = jnp.take_along_axis(above.reshape(rows, -1), ids[:, None], axis=1)[:, 0] - norm
    return Drawn(ids, logps)


def _kth_largest(weights: Float[Array, "B R C"], k: int) -> Float[Array, " B"]:
    """The k-th largest of each row's weights. A third of the time of `jax.lax.top_k` on a CPU."""
    return _threshold(weights, lambda above: above.astype(jnp.int32).sum(axis=1).sum(axis=1) >= k)


def _least_kept(weights: Float[Array, "B R C"], target: Float[Array, " B"]) -> Float[Array, " B"]:
    """The largest weight of each row such that it and those above sum to `target`."""
    return _threshold(weights, lambda above: _sum(jnp.where(above, weights, 0.0)) >= target)


def _threshold(
    weights: Float[Array, "B R C"], enough: Callable[[Bool[Array, "B R C"]], Bool[Array, " B"]]
) -> Float[Array, " B"]:
    """The largest t of each row for which `enough(weights >= t)`, of weights that are not negative.

    Found bit by bit: such floats are ordered like their bit patterns, so 31 passes over the row are exact.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def one_bit(i: Int[Array, ""], found: Int[Array, " B"]) -> Int[Array, " B"]:
        candidate = found | (1 << (30 - i))
        return jnp.where(enough(bits >= candidate[:, None, None]), candidate, found)

    found = jax.lax.fori_loop(0, 31, one_bit, jnp.zeros(len(weights), jnp.int32))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


class _Tries(NamedTuple):
    count: Int[Array, ""]
    ids: Int[Array, " B"]
    kept: Bool[Array, " B"]


def _draw_kept(
    weights: Float[Array, "B R C"], keys: Key[Array, "B"], top_p: float, broken: Bool[Array, " B"]
) -> Int[Array, " B"]:
    """`broken`: rows that nothing can be drawn from, which get token 0."""
    columns = weights.sum(axis=1)
    below = jnp.cumsum(columns, axis=1)
    total = below[:, -1]

    def attempt(state: _Tries) -> _Tries:
        found, kept = state.ids, state.kept
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.count), (_TRIES,)))(keys)
        for i in range(_TRIES if top_p < 1 else 1):
            ids, weight = _invert(weights, columns, below, uniform[:, i] * total)
            mass = _sum(jnp.where(weights > weight[:, None, None], weights, 0.0)) if top_p < 1 else jnp.zeros(())
            fits = (mass < min(top_p, _NEARLY_ALL) * total) & (weight > 0)
            found = jnp.where(kept | ~fits, found, ids)
            kept |= fits
        return _Tries(state.count + 1, found, kept)

    rows = len(weights)
    start = _Tries(jnp.int32(0), jnp.zeros(rows, jnp.int32), broken)
    return jax.lax.while_loop(lambda state: ~jnp.all(state.kept), attempt, start).ids


def _invert(
    weights: Float[Array, "B R C"], columns: Float[Array, "B C"], below: Float[Array, "B C"], at: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """(the token at which the sum of weights passes `at`, its weight). Tokens are in the order of columns."""
    column = jnp.minimum((below <= at[:, None]).sum(axis=1), columns.shape[1] - 1)
    start = jnp.take_along_axis(below - columns, column[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(weights, column[:, None, None], axis=2)[:, :, 0]
    row = jnp.minimum((jnp.cumsum(inside, axis=1) <= (at - start)[:, None]).sum(axis=1), inside.shape[1] - 1)
    weight = jnp.take_along_axis(inside, row[:, None], axis=1)[:, 0]
    return (row * columns.shape[1] + column).astype(jnp.int32), weight


def _sum(table: Float[Array, "B R C"]) -> Float[Array, " B"]:
    return table.sum(axis=1).sum(axis=1)
