"""Attention over packed rows in plain XLA, for every platform: block by block, with a hand-written backward pass.

Only the blocks of keys of which a block of queries sees some, in any row of the batch, are computed: neither other
pairs nor, for rejected tokens, the chosen side. Long rows of many pairs cost no more than short ones. The softmax is
the running one of Milakov and Gimelshein (arXiv 1805.02867), the backward pass that of FlashAttention (arXiv
2205.14135): it makes the scores again from one log-sum-exp a query.
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


class PlacedSpans(NamedTuple):
    """`KeySpans` of queries and where in their row these stand: all of a row or, on this device, a part of it."""

    prompt_start: Int[Any, "B T"]
    prompt_stop: Int[Any, "B T"]
    own_start: Int[Any, "B T"]
    place: Int[Any, "B T"]


def place_spans(seen: KeySpans) -> PlacedSpans:
    """The spans of whole rows."""
    length = seen.own_start.shape[1]
    return PlacedSpans(*seen, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), seen.own_start.shape))


def attend_part(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    seen: PlacedSpans,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention over packed rows, scaled by H**-0.5, softmax in float32.

    For all queries of each row or some, next to each other, over all of its keys.
    """
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    block = min(_BLOCK, length)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
        return x.reshape(batch, -1, block, *x.shape[2:]).swapaxes(0, 1)

    # The queries that share a kv head are rows of one matrix: fewer and larger products.
    rows = split(query * dim**-0.5).reshape(-1, batch, block, kv_heads, heads // kv_heads, dim)
    rows = rows.transpose(0, 1, 3, 4, 2, 5).reshape(len(rows), batch, kv_heads, -1, dim)
    keys, values = (split(x).swapaxes(2, 3) for x in (key, value))
    mixed = attach_backward(_attend, _backward, (rows, keys, values), split_spans(seen, block, len(keys)))
    mixed = mixed.reshape(len(rows), batch, kv_heads, -1, block, dim).transpose(1, 0, 4, 2, 3, 5)
    return mixed.reshape(batch, len(rows) * block, heads, dim)[:, :length]


class SeenBlocks(NamedTuple):
    """`PlacedSpans` by blocks, and the blocks of keys that a block of queries needs."""

    prompt_start: Int[Array, "I B Q"]
    prompt_stop: Int[Array, "I B Q"]
    own_start: Int[Array, "I B Q"]
    place: Int[Array, "I B Q"]
    needed: Int[Array, "I J"]  # blocks of keys, ascending; those that are needed come first
    count: Int[Array, " I"]  # how many of them are needed


def split_spans(seen: PlacedSpans, block: int, key_blocks: int) -> SeenBlocks:
    """Spans by blocks of queries; what fills the last of these sees what the query before it sees."""
    batch, length = seen.place.shape
    filled = (jnp.pad(bound, ((0, 0), (0, -length % block)), mode="edge") for bound in seen)
    spans = PlacedSpans(*(bound.reshape(batch, -1, block).swapaxes(0, 1) for bound in filled))
    return SeenBlocks(*spans, *_find_needed(spans, key_blocks))


def _find_needed(seen: PlacedSpans, key_blocks: int) -> tuple[Int[Array, "I J"], Int[Array, " I"]]:
    """The last two fields of `SeenBlocks`: a block of keys is needed where one of the queries sees one of its keys."""
    size = seen.place.shape[2]
    left = jnp.arange(key_blocks, dtype=seen.place.dtype) * size
    start, stop, own, place = (bound[..., None] for bound in seen)
    prompt = (start < stop) & (start < left + size) & (left < stop)
    needs = ((prompt | (own < left + size)) & (left <= place)).any(axis=(1, 2))
    return jnp.argsort(~needs, axis=1), needs.sum(axis=1)


def _sees(seen: SeenBlocks, index: Int[Array, ""]) -> Bool[Array, "B 1 1 Q S"]:
    """Which keys of block `index` each query of one block (`seen` without its first dim) may look at."""
    size = seen.place.shape[-1]
    keys = index * size + jnp.arange(size)
    start, stop, own, place = (bound[..., None] for bound in seen[:4])
    mask = (keys <= place) & ((keys >= own) | ((keys >= start) & (keys < stop)))
    return mask[:, None, None]


def _scores(
    rows: Float[Array, "B K R H"], keys: Float[Array, "B K S H"], mask: Bool[Array, "B 1 1 Q S"]
) -> Float[Array, "B K R S"]:
    scores = jnp.einsum("bkrh,bksh->bkrs", rows, keys, preferred_element_type=jnp.float32)
    by_query = scores.reshape(*scores.shape[:2], -1, *mask.shape[3:])
    return jnp.where(mask, by_query, _MASKED).reshape(scores.shape)


def _attend(
    rows: Float[Array, "I B K R H"],
    keys: Float[Array, "J B K S H"],
    values: Float[Array, "J B K S H"],
    seen: SeenBlocks,
) -> tuple[Float[Array, "I B K R H"], Float[Array, "I B K R"]]:
    """Blocks of queries (R: all that share a kv head) over the blocks of keys before them; and their log-sum-exps."""

    def one_block(_: None, xs: tuple[Array, SeenBlocks]) -> tuple[None, tuple[Array, Array]]:
        q, mine = xs

        def one(n: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            j = mine.needed[n]
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
        largest, total, mixed = jax.lax.fori_loop(0, mine.count, one, start)
        return None, ((mixed / total[..., None]).astype(q.dtype), largest + jnp.log(total))

    return jax.lax.scan(one_block, None, (rows, seen))[1]


def _backward(
    rows: Array, keys: Array, values: Array, seen: SeenBlocks, mixed: Array, norms: Array, grad: Array
) -> tuple[Array, Array, Array]:
    deltas = sum_last(grad.astype(jnp.float32) * mixed.astype(jnp.float32))

    def one_block(carry: tuple[Array, Array], xs: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
        q, mine, g, norm, delta = xs

        def one(n: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            j = mine.needed[n]
            d_q, d_keys, d_values = sums
            weights = jnp.exp(_scores(q, keys[j], _sees(mine, j)) - norm[..., None])
            d_weights = jnp.einsum("bkrh,bksh->bkrs", g, values[j], preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - delta[..., None])).astype(q.dtype)
            d_value = _mix(weights.astype(g.dtype), g)
            d_q = d_q + jnp.einsum("bkrs,bksh->bkrh", d_scores, keys[j], preferred_element_type=jnp.float32)
            return d_q, d_keys.at[j].add(_mix(d_scores, q)), d_values.at[j].add(d_value)

        start = (jnp.zeros(q.shape, jnp.float32), *carry)
        d_q, d_keys, d_values = jax.lax.fori_loop(0, mine.count, one, start)
        return (d_keys, d_values), d_q.astype(q.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    xs = (rows, seen, grad, norms, deltas)
    (d_keys, d_values), d_rows = jax.lax.scan(one_block, (zeros, zeros), xs)
    return d_rows, d_keys.astype(keys.dtype), d_values.astype(values.dtype)


_mix = partial(jnp.einsum, "bkrs,bkrh->bksh", preferred_element_type=jnp.float32)
