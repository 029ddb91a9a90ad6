"""Attention over packed rows in plain XLA, for every platform: block by block, with a hand-written backward pass.

Only the blocks of keys that a block of queries may see are computed, from the first key of its pairs to its own end:
long rows of many pairs cost no more than short ones. The softmax is the running one of Milakov and Gimelshein
(arXiv 1805.02867), the backward pass that of FlashAttention (arXiv 2205.14135): it makes the scores again from one
log-sum-exp a query.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from drift_jax.models.intervals import KeySpans
from drift_jax.models.norms import sum_last
from drift_jax.models.remat import attach_backward

_BLOCK = 128
_MASKED = -1e30  # finite: the first block of a query's keys may be hidden from it


def attend_spans(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    seen: KeySpans,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention over packed rows, scaled by H**-0.5, softmax in float32."""
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    block = min(_BLOCK, length)
    padding = -length % block
    blocks = (length + padding) // block

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))

    # The queries that share a kv head are rows of one matrix: fewer and larger products.
    rows = pad(query * dim**-0.5).reshape(batch, blocks, block, kv_heads, -1, dim).transpose(1, 0, 3, 4, 2, 5)
    rows = rows.reshape(blocks, batch, kv_heads, -1, dim)
    keys, values = (pad(x).reshape(batch, blocks, block, kv_heads, dim).transpose(1, 0, 3, 2, 4) for x in (key, value))
    mixed = attach_backward(_attend, _backward, (rows, keys, values), _split_spans(seen, block, blocks))
    mixed = mixed.reshape(blocks, batch, kv_heads, -1, block, dim).transpose(1, 0, 4, 2, 3, 5)
    return mixed.reshape(batch, blocks * block, heads, dim)[:, :length]


class _Seen(NamedTuple):
    """`KeySpans` by blocks, the place of each query, and the first block of keys that a block of queries needs."""

    prompt_start: Int[Array, "I B Q"]
    prompt_stop: Int[Array, "I B Q"]
    own_start: Int[Array, "I B Q"]
    place: Int[Array, "I Q"]
    first: Int[Array, " I"]


def _split_spans(seen: KeySpans, block: int, blocks: int) -> _Seen:
    batch, length = seen.own_start.shape
    places = jnp.arange(blocks * block, dtype=seen.own_start.dtype)
    # Padding sees itself.
    rest = jnp.broadcast_to(places[length:], (batch, blocks * block - length))
    spans = (jnp.concatenate([bound, rest], 1).reshape(batch, blocks, block).swapaxes(0, 1) for bound in seen)
    start, stop, own = spans
    lowest = jnp.minimum(own, jnp.where(start < stop, start, own)).min(axis=(1, 2))
    return _Seen(start, stop, own, places.reshape(blocks, block), lowest // block)


def _sees(seen: _Seen, index: Int[Array, ""]) -> Bool[Array, "B 1 1 Q S"]:
    """Which keys of block `index` each query of one block (`seen` without its first dim) may look at."""
    size = seen.place.shape[-1]
    keys = index * size + jnp.arange(size)
    start, stop, own = (bound[..., None] for bound in seen[:3])
    mask = (keys <= seen.place[:, None]) & ((keys >= own) | ((keys >= start) & (keys < stop)))
    return mask[:, None, None]


def _scores(
    rows: Float[Array, "B K R H"], keys: Float[Array, "B K S H"], mask: Bool[Array, "B 1 1 Q S"]
) -> Float[Array, "B K R S"]:
    scores = jnp.einsum("bkrh,bksh->bkrs", rows, keys, preferred_element_type=jnp.float32)
    by_query = scores.reshape(*scores.shape[:2], -1, *mask.shape[3:])
    return jnp.where(mask, by_query, _MASKED).reshape(scores.shape)


def _attend(
    rows: Float[Array, "I B K R H"], keys: Float[Array, "I B K S H"], values: Float[Array, "I B K S H"], seen: _Seen
) -> tuple[Float[Array, "I B K R H"], Float[Array, "I B K R"]]:
    """Blocks of queries (R: all that share a kv head) over the blocks of keys before them; and their log-sum-exps."""

    def one_block(_: None, xs: tuple[Array, _Seen, Array]) -> tuple[None, tuple[Array, Array]]:
        q, mine, index = xs

        def one(j: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, mixed = sums
            scores = _scores(q, keys[j], _sees(mine, j))
            new_largest = jnp.maximum(largest, scores.max(axis=-1))
            weights = jnp.exp(scores - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            more = jnp.einsum(
                "bkrs,bksh->bkrh", weights.astype(values.dtype), values[j], preferred_element_type=jnp.float32
            )
            return new_largest, total * shrink + weights.sum(axis=-1), mixed * shrink[..., None] + more

        zeros = jnp.zeros(q.shape[:-1], jnp.float32)
        start = (zeros + _MASKED, zeros, jnp.zeros(q.shape, jnp.float32))
        largest, total, mixed = jax.lax.fori_loop(mine.first, index + 1, one, start)
        return None, ((mixed / total[..., None]).astype(q.dtype), largest + jnp.log(total))

    return jax.lax.scan(one_block, None, (rows, seen, jnp.arange(len(rows))))[1]


def _backward(
    rows: Array, keys: Array, values: Array, seen: _Seen, mixed: Array, norms: Array, grad: Array
) -> tuple[Array, Array, Array]:
    deltas = sum_last(grad.astype(jnp.float32) * mixed.astype(jnp.float32))

    def one_block(carry: tuple[Array, Array], xs: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
        q, mine, index, g, norm, delta = xs

        def one(j: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_keys, d_values = sums
            weights = jnp.exp(_scores(q, keys[j], _sees(mine, j)) - norm[..., None])
            d_weights = jnp.einsum("bkrh,bksh->bkrs", g, values[j], preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - delta[..., None])).astype(q.dtype)
            d_value = _mix(weights.astype(g.dtype), g)
            d_q = d_q + jnp.einsum("bkrs,bksh->bkrh", d_scores, keys[j], preferred_element_type=jnp.float32)
            return d_q, d_keys.at[j].add(_mix(d_scores, q)), d_values.at[j].add(d_value)

        start = (jnp.zeros(q.shape, jnp.float32), *carry)
        d_q, d_keys, d_values = jax.lax.fori_loop(mine.first, index + 1, one, start)
        return (d_keys, d_values), d_q.astype(q.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    xs = (rows, seen, jnp.arange(len(rows)), grad, norms, deltas)
    (d_keys, d_values), d_rows = jax.lax.scan(one_block, (zeros, zeros), xs)
    return d_rows, d_keys.astype(keys.dtype), d_values.astype(values.dtype)


_mix = partial(jnp.einsum, "bkrs,bkrh->bksh", preferred_element_type=jnp.float32)
