"""The model as a sampler uses it: keys and values of many rows in a cache, and one more token of each row at a time.

A row is a slot of the cache. Prompts are packed into rows of tokens, go through the layers together, and what attention
keeps of them is copied into their slots. A decoding step reads the cache, and writes the new tokens' keys and values
once all layers are done: in a loop on the device nothing but these is ever copied.

The layers are either one program for all of them, with weights and cache stacked on a leading dim (`layers` is a dict),
or one for each (`layers` is a tuple of dicts). Compilers for CPU and GPU copy a layer out of a stack before they use
it, which doubles what a step reads; TPU's does not.
"""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from drift_jax.models.architecture import QwenConfig
from drift_jax.models.attention import AttentionBackend
from drift_jax.models.intervals import KeyIntervals, KeySpans
from drift_jax.models.policy import bind
from drift_jax.models.qwen import Block, Qwen, build_rope
from drift_jax.sharding import Dims, constrain

CACHE_DIMS: Dims = ("batch", "kv_heads", None, "head_dim")


class KVCache(NamedTuple):
    """Keys and values of B rows with room for S tokens each: an array per layer [B K S H], or one [L B K S H]."""

    keys: Any
    values: Any

    @property
    def slots(self) -> int:
        """Tokens that a row has room for."""
        return jax.tree.leaves(self.keys)[0].shape[-2]


def split_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with an array per layer, in place of stacks. What they were split from is not changed."""
    stacked = params["blocks"]
    count = len(jax.tree.leaves(stacked)[0])
    unstack = jax.jit(lambda x: tuple(x[i] for i in range(count)))
    leaves, structure = jax.tree.flatten(stacked)
    split = [unstack(leaf) for leaf in leaves]  # one parameter at a time: it is twice in memory
    layers = tuple(jax.tree.unflatten(structure, [leaf[i] for leaf in split]) for i in range(count))
    return {**params, "blocks": layers}


def init_cache(config: QwenConfig, rows: int, slots: int, dtype: DTypeLike, stacked: bool) -> KVCache:
    shape = (rows, config.kv_heads, slots, config.head_dim)

    def empty() -> Any:
        if stacked:
            return constrain(jnp.zeros((config.layers, *shape), dtype), None, *CACHE_DIMS)
        return tuple(constrain(jnp.zeros(shape, dtype), *CACHE_DIMS) for _ in range(config.layers))

    return KVCache(empty(), empty())


def cache_bytes(config: QwenConfig, slots: int, dtype: DTypeLike) -> int:
    """Bytes that the keys and values of a row with room for so many tokens take, over all devices."""
    return 2 * config.layers * config.kv_heads * slots * config.head_dim * jnp.dtype(dtype).itemsize


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The same rows with room for more tokens."""

    def grow(x: Array) -> Array:
        width = [(0, 0)] * x.ndim
        width[-2] = (0, slots - x.shape[-2])
        return _place(jnp.pad(x, width))

    return jax.tree.map(grow, cache)


def _place(x: Array) -> Array:
    return constrain(x, *(CACHE_DIMS if x.ndim == 4 else (None, *CACHE_DIMS)))


def _bind(graphdef: Any, params: dict[str, Any]) -> tuple[Qwen, Any]:
    """(the model, the code of a layer). The model's own layers are there for their code only."""
    blocks = params["blocks"]
    model = bind(graphdef, {**params, "blocks": blocks[0] if isinstance(blocks, tuple) else blocks})
    return model, nnx.split(model.blocks)[0]


def _through_layers(code: Any, blocks: Any, x: Array, caches: Any, step: Any) -> tuple[Array, Any]:
    """`step(layer, x, what belongs to it of caches) -> (x, kept)` through all layers; what is kept of each, alike."""
    if isinstance(blocks, tuple):
        kept = []
        for i, weights in enumerate(blocks):
            x, of_layer = step(nnx.merge(code, weights), x, jax.tree.map(itemgetter(i), caches, is_leaf=_is_tuple))
            kept.append(of_layer)
        return x, jax.tree.map(lambda *leaves: leaves, *kept)

    def one(x: Array, xs: tuple[Any, Any]) -> tuple[Array, Any]:
        return step(nnx.merge(code, xs[0]), x, xs[1])

    return jax.lax.scan(one, x, (blocks, caches))


def _is_tuple(node: Any) -> bool:
    return type(node) is tuple


def decode(
    graphdef: Any,
    params: dict[str, Any],
    cache: KVCache,
    ids: Int[Array, " B"],
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits behind one more token of each row, and the cache with that token's keys and values.

    Args:
      lengths: tokens of each row that the cache holds; the new one goes to that place. A row that is full (`lengths` is
        `cache.slots`) keeps what it has, and its logits mean nothing.
    """
    model, code = _bind(graphdef, params)
    rope = build_rope(lengths[:, None], model.config.head_dim, model.config.rope_theta)

    def step(layer: Block, x: Array, cache: KVCache) -> tuple[Array, KVCache]:
        x, own = layer.decode(x, rope, cache.keys, cache.values, lengths)
        return x, KVCache(*own)

    x, new = _through_layers(code, params["blocks"], model.embed_tokens(ids[:, None]), cache, step)
    rows = jnp.arange(len(ids))

    def write(old: Array, token: Array) -> Array:
        if old.ndim == 4:
            return _place(old.at[rows, :, lengths].set(token[:, 0]))
        return _place(old.at[:, rows, :, lengths].set(token[:, :, 0].swapaxes(0, 1)))

    return model.logits(model.finish(x)[:, 0]), jax.tree.map(write, cache, new)


def prefill(
    backend: AttentionBackend,
    graphdef: Any,
    params: dict[str, Any],
    ids: Int[Array, "R T"],
    positions: Int[Array, "R T"],
) -> KVCache:
    """Keys and values of packed prompts: for each layer [R T K H].

    Args:
      positions: of each token in its prompt. A prompt starts where it is 0; padding is prompts of one token.
    """
    model, code = _bind(graphdef, params)
    rope = build_rope(positions, model.config.head_dim, model.config.rope_theta)
    places = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    start = places - positions
    seen = KeyIntervals(start, places + 1) if backend.intervals else KeySpans(start, start, start)

    def step(layer: Block, x: Array, _: None) -> tuple[Array, KVCache]:
        x, kept = layer(x, rope, partial(backend.attend, seen=seen))
        return x, KVCache(*kept)

    _, kept = _through_layers(code, params["blocks"], model.embed_tokens(ids), None, step)
    return kept


def insert(
    cache: KVCache,
    prompts: KVCache,
    slots: Int[Array, "R F"],
    starts: Int[Array, "R F"],
    count: Int[Array, ""],
) -> KVCache:
    """The cache with prompts in it: of each row of packed prompts up to F, into slots of the same part of the cache.

    Rows of the cache are R equal parts, as devices hold them, one for each row of packed prompts.

    Args:
      slots: of a prompt within its part; one that is not there (the part's size) takes nothing.
      starts: where the prompt begins in its row of tokens. As much as the slot has room for is copied; what comes after
        the prompt is written over by its completion.
      count: how many of the F are used, at most.
    """
    groups = slots.shape[0]
    room = cache.slots
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, room), (0, 0), (0, 0)]), prompts)

    def one(i: Array, cache: KVCache) -> KVCache:
        def write(old: Array, new: Array) -> Array:
            if old.ndim == 5:
                return jax.vmap(write)(old, new)
            pieces = _slices(new, starts[:, i], room).swapaxes(1, 2)
            parts = _write(old.reshape(groups, -1, *old.shape[1:]), pieces, slots[:, i])
            return _place(parts.reshape(old.shape))

        return jax.tree.map(write, cache, padded)

    return jax.lax.fori_loop(0, count, one, cache)


def copy_slots(
    cache: KVCache, sources: Int[Array, "R F"], targets: Int[Array, "R F"], count: Int[Array, ""]
) -> KVCache:
    """The cache with slots copied within their part, one after the other; a target that is not there takes nothing."""
    groups = sources.shape[0]

    def one(i: Array, cache: KVCache) -> KVCache:
        def write(old: Array) -> Array:
            if old.ndim == 5:
                return jax.vmap(write)(old)
            parts = old.reshape(groups, -1, *old.shape[1:])
            pieces = _slices(parts, sources[:, i], 1)[:, 0]
            return _place(_write(parts, pieces, targets[:, i]).reshape(old.shape))

        return jax.tree.map(write, cache)

    return jax.lax.fori_loop(0, count, one, cache)


def _slices(x: Array, starts: Int[Array, " R"], size: int) -> Array:
    """Of each x[r] `size` elements from its own start."""
    if len(starts) == 1:  # one device: a slice, where several have to gather
        return jax.lax.dynamic_slice_in_dim(x, starts[0], size, axis=1)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))(x, starts)


def _write(parts: Array, pieces: Array, slots: Int[Array, " R"]) -> Array:
    """x[r] of each part r into its slot."""
    if len(slots) == 1:
        there = slots[0] < parts.shape[1]
        slot = jnp.where(there, slots[0], 0)
        kept = jax.lax.dynamic_slice_in_dim(parts, slot, 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(parts, jnp.where(there, pieces[:, None], kept), slot, axis=1)
    return parts.at[jnp.arange(len(slots)), slots].set(pieces)
