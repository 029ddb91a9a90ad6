"""Attention behind one function, so that a faster back end changes nothing around it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Causal attention goes through at most 8 blocks of queries of at least 128. A block looks at no key after its own
# end, which saves close to half of the work and of the memory that the scores need.
_MOST_BLOCKS = 8
_SMALLEST_BLOCK = 128
_MASKED = -1e30  # finite: a row that may look at nothing gives numbers, not NaN


class KeySpans(NamedTuple):
    """Which keys of its row each query of a packed row may look at.

    Query t sees key s <= t when `prompt_start[t] <= s < prompt_stop[t]` (the prompt of its pair) or `s >= own_start[t]`
    (its own side up to itself). A prompt token's own span starts where its prompt does; a padding token sees itself.
    """

    prompt_start: Int[Array, "B T"]
    prompt_stop: Int[Array, "B T"]
    own_start: Int[Array, "B T"]


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B #T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, scaled by H**-0.5, softmax in float32.

    Without a mask it is causal (T == S, positions in order); a right-padded row needs no mask then, because its
    padding comes after every real query. With a mask, True means "may look at".
    """
    if mask is not None:
        return _attend_block(query, key, value, mask[:, None])
    length = query.shape[1]
    block = max(_SMALLEST_BLOCK, -(-length // _MOST_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        causal = jnp.arange(stop) <= jnp.arange(start, stop)[:, None]
        outputs.append(_attend_block(query[:, start:stop], key[:, :stop], value[:, :stop], causal[None, None]))
    return jnp.concatenate(outputs, axis=1)


def attend_spans(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    spans: KeySpans,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention over packed rows, each query over the keys of `spans`; else as `attend`."""
    length = query.shape[1]
    block = max(_SMALLEST_BLOCK, -(-length // _MOST_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first, last, own = (bound[:, start:stop, None] for bound in spans)
        keys = jnp.arange(stop)
        causal = keys <= jnp.arange(start, stop)[:, None]
        mask = causal & ((keys >= own) | ((keys >= first) & (keys < last)))
        outputs.append(_attend_block(query[:, start:stop], key[:, :stop], value[:, :stop], mask[:, None]))
    return jnp.concatenate(outputs, axis=1)


def _attend_block(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "#B 1 #T S"],
) -> Float[Array, "B T N H"]:
    batch, length, heads, dim = query.shape
    groups = heads // key.shape[2]
    # The queries that share a kv head are rows of one matrix: G times fewer and larger products.
    rows = (query * dim**-0.5).reshape(batch, length, -1, groups, dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, -1, groups * length, dim)
    scores = jnp.einsum("bkrh,bskh->bkrs", rows, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, -1, groups, length, key.shape[1])
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, _MASKED), axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkrs,bskh->bkrh", weights.reshape(batch, -1, groups * length, key.shape[1]), value)
    return mixed.reshape(batch, -1, groups, length, dim).transpose(0, 3, 1, 2, 4).reshape(query.shape)
