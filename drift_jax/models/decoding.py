"""The model as a sampler uses it: keys and values of many rows in a cache, and one more token of each row at a time.

A row is a slot of the cache. Prompts are packed into rows of tokens, go through the layers together, and what attention
keeps of them is copied into their slots. In a decoding step each layer writes the new tokens' keys and values into the
cache before it reads it: in a loop on the device nothing but these is ever copied.

The layers are either one program for all of them, with weights and cache stacked on a leading dim (`params["blocks"]`
is a dict), or one for each (it is a tuple of dicts). Compilers for CPU and GPU copy a layer out of a stack before they
use it, which doubles what a step reads; TPU's does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from drift_jax.models.architecture import QwenConfig
from drift_jax.models.attention import AttentionBackend, attend_one
from drift_jax.models.intervals import KeyIntervals, KeySpans
from drift_jax.models.policy import bind
from drift_jax.models.qwen import Qwen, build_rope
from drift_jax.sharding import Dims, Layout, build_sharding, constrain

# The last dim of both is the one that the product with them does not sum over: no compiler turns them round then.
KEY_DIMS: Dims = ("batch", "kv_heads", "head_dim", None)
VALUE_DIMS: Dims = ("batch", "kv_heads", None, "head_dim")


class KVCache(NamedTuple):
    """Keys [B K H S] and values [B K S H] of B rows with room for S tokens each: an array per layer, or one [L ...]."""

    keys: Any
    values: Any

    @property
    def slots(self) -> int:
        """Tokens that a row has room for."""
        return jax.tree.leaves(self.keys)[0].shape[-1]

    @staticmethod
    def placed(keys: Any, values: Any) -> KVCache:
        """Split over the mesh in force."""
        return KVCache(jax.tree.map(partial(_place, KEY_DIMS), keys), jax.tree.map(partial(_place, VALUE_DIMS), values))


def _place(dims: Dims, x: Array) -> Array:
    return constrain(x, *(dims if x.ndim == len(dims) else (None, *dims)))


# Weights that `split_layers` stores in another order of dims, and that order: a product that sums over the last dims of
# its weights makes CPU's compiler turn them round in every step.
_TURNED = {("attention", "o"): (1, 2, 0)}


@partial(jax.jit, static_argnums=1)
def _unstack(stack: Array, order: tuple[int, ...] | None) -> tuple[Array, ...]:
    """The layers of a stack, each with its dims in another order. One function for all samplers: it compiles once."""
    return tuple(layer if order is None else layer.transpose(order) for layer in stack)


def split_layers(params: dict[str, Any], consume: bool = False) -> dict[str, Any]:
    """Parameters with an array per layer, in place of stacks.

    Args:
      consume: whether the stacks are deleted, one after the other, so that no more than one of them is there twice.
    """
    stacked = params["blocks"]
    count = len(jax.tree.leaves(stacked)[0])

    def unstack(path: tuple[Any, ...], leaf: Array) -> tuple[Array, ...]:
        layers = _unstack(leaf, _TURNED.get(tuple(key.key for key in path)))
        if consume:
            jax.block_until_ready(layers)
            leaf.delete()
        return layers

    split = jax.tree_util.tree_map_with_path(unstack, stacked)
    layers = tuple(jax.tree.map(itemgetter(i), split, is_leaf=lambda node: type(node) is tuple) for i in range(count))
    return {**params, "blocks": layers}


def split_abstract(params: dict[str, Any]) -> dict[str, Any]:
    """`split_layers` of `jax.ShapeDtypeStruct`s with shardings."""
    count = jax.tree.leaves(params["blocks"])[0].shape[0]

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape, spec = leaf.shape[1:], (*leaf.sharding.spec, *(None,) * leaf.ndim)[1 : leaf.ndim]  # pyright: ignore
        order = _TURNED.get(tuple(key.key for key in path), tuple(range(len(shape))))
        placed = NamedSharding(leaf.sharding.mesh, PartitionSpec(*(spec[dim] for dim in order)))  # pyright: ignore
        return jax.ShapeDtypeStruct(tuple(shape[dim] for dim in order), leaf.dtype, sharding=placed)

    return {**params, "blocks": (jax.tree_util.tree_map_with_path(one, params["blocks"]),) * count}


def _turn_back(weights: dict[str, Any]) -> dict[str, Any]:
    """A layer of `split_layers` as declared; the compiler makes it a part of the product."""
    weights = {part: dict(own) if isinstance(own, dict) else own for part, own in weights.items()}
    for (part, name), order in _TURNED.items():
        back = [order.index(dim) for dim in range(len(order))]
        weights[part][name] = weights[part][name].transpose(back)
    return weights


def _cache_shape(config: QwenConfig, dims: Dims, rows: int, slots: int) -> tuple[int, ...]:
    """Of the keys or values of one layer."""
    sizes = {"batch": rows, "kv_heads": config.kv_heads, "head_dim": config.head_dim, None: slots}
    return tuple(sizes[dim] for dim in dims)


def init_cache(config: QwenConfig, rows: int, slots: int, dtype: DTypeLike, stacked: bool) -> KVCache:
    def empty(dims: Dims) -> Any:
        shape = _cache_shape(config, dims, rows, slots)
        if stacked:
            return jnp.zeros((config.layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))

    return KVCache.placed(empty(KEY_DIMS), empty(VALUE_DIMS))


def cache_shardings(config: QwenConfig, layout: Layout, rows: int, stacked: bool) -> KVCache:
    """How a cache lies on the mesh, whatever room it has. Raises `ConfigError` where the rows cannot be split."""

    def place(dims: Dims) -> Any:
        shape = _cache_shape(config, dims, rows, 1)
        if stacked:
            return build_sharding(layout, (None, *dims), (config.layers, *shape), "KV cache")
        return (build_sharding(layout, dims, shape, "KV cache"),) * config.layers

    return KVCache(place(KEY_DIMS), place(VALUE_DIMS))


def cache_bytes(config: QwenConfig, slots: int, dtype: DTypeLike) -> int:
    """Bytes that the keys and values of a row with room for so many tokens take, over all devices."""
    return 2 * config.layers * config.kv_heads * slots * config.head_dim * jnp.dtype(dtype).itemsize


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The same rows with room for more tokens."""

    def grow(axis: int, x: Array) -> Array:
        width = [(0, 0)] * x.ndim
        width[axis] = (0, slots - x.shape[axis])
        return jnp.pad(x, width)

    return KVCache.placed(*(jax.tree.map(partial(grow, axis), x) for axis, x in zip((-1, -2), cache, strict=True)))


def _bind(graphdef: Any, params: dict[str, Any]) -> tuple[Qwen, Any]:
    """(the model, the code of a layer). The model's own layers are there for their code only."""
    blocks = params["blocks"]
    model = bind(graphdef, {**params, "blocks": blocks[0] if isinstance(blocks, tuple) else blocks})
    return model, nnx.split(model.blocks)[0]


def compute_dtype(graphdef: Any, params: dict[str, Any]) -> Any:
    """Of activations, and so of keys and values."""
    return _bind(graphdef, params)[0].dtype


def decode(
    graphdef: Any,
    params: dict[str, Any],
    cache: KVCache,
    ids: Int[Array, " B"],
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits behind one more token of each row, and the cache with that token's key and value.

    Args:
      lengths: tokens of each row that the cache holds; the new one goes to that place. The logits of a row that is
        full (`lengths` is `cache.slots`) mean nothing.
    """
    model, code = _bind(graphdef, params)
    rope = build_rope(lengths[:, None], model.config.head_dim, model.config.rope_theta)

    def go_through(weights: Any, x: Array, cache: KVCache, layer: tuple[Array, ...]) -> tuple[Array, KVCache]:
        """`layer`: the index of the layer in a cache that holds all of them, or nothing."""
        written: list[KVCache] = []

        def attend(query: Array, key: Array, value: Array) -> Array:
            written.append(_write_token(cache, key[:, 0], value[:, 0], lengths, layer))
            keys, values = (jax.lax.dynamic_index_in_dim(x, *layer, keepdims=False) if layer else x for x in written[0])
            return attend_one(query, keys, values, lengths + 1)

        x, _ = nnx.merge(code, weights)(x, rope, attend)
        return x, written[0]

    x, blocks = model.embed_tokens(ids[:, None]), params["blocks"]
    if isinstance(blocks, tuple):
        layers = []
        for weights, keys, values in zip(blocks, cache.keys, cache.values, strict=True):
            x, kept = go_through(_turn_back(weights), x, KVCache(keys, values), ())
            layers.append(kept)
        cache = KVCache(tuple(kept.keys for kept in layers), tuple(kept.values for kept in layers))
    else:

        def one(carry: tuple[Array, KVCache], xs: tuple[Any, Array]) -> tuple[tuple[Array, KVCache], None]:
            return go_through(xs[0], *carry, (xs[1],)), None

        (x, cache), _ = jax.lax.scan(one, (x, cache), (blocks, jnp.arange(model.config.layers)))
    return model.logits(model.finish(x)[:, 0]), cache


def _write_token(
    cache: KVCache,
    key: Float[Array, "B K H"],
    value: Float[Array, "B K H"],
    places: Int[Array, " B"],
    layer: tuple[Array, ...],
) -> KVCache:
    if len(key) == 1:
        # The compiler makes a slice of a scatter of one row, and copies the cache to check its bounds.
        ones, at = (1,) * len(layer), (*layer, 0)
        keys, values = key.reshape(*ones, *key.shape, 1), value.reshape(*ones, *value.shape[:2], 1, -1)
        keys = jax.lax.dynamic_update_slice(cache.keys, keys, (*at, 0, 0, places[0]))
        return KVCache.placed(keys, jax.lax.dynamic_update_slice(cache.values, values, (*at, 0, places[0], 0)))
    rows, everything = jnp.arange(len(key)), slice(None)
    keys = cache.keys.at[(*layer, rows, everything, everything, places)].set(key)
    return KVCache.placed(keys, cache.values.at[(*layer, rows, everything, places)].set(value))


class Prompts(NamedTuple):
    """Keys and values of packed prompts, R rows of T tokens: an array per layer [R T K H], or one [L R T K H]."""

    keys: Any
    values: Any


def prefill(
    backend: AttentionBackend,
    graphdef: Any,
    params: dict[str, Any],
    ids: Int[Array, "R T"],
    positions: Int[Array, "R T"],
) -> Prompts:
    """What attention keeps of packed prompts.

    Args:
      positions: of each token in its prompt. A prompt starts where it is 0; padding is prompts of one token.
    """
    model, code = _bind(graphdef, params)
    rope = build_rope(positions, model.config.head_dim, model.config.rope_theta)
    places = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    start = places - positions
    seen = KeyIntervals(start, places + 1) if backend.intervals else KeySpans(start, start, start)

    def one(x: Array, weights: Any) -> tuple[Array, tuple[Array, Array]]:
        return nnx.merge(code, weights)(x, rope, partial(backend.attend, seen=seen))

    x, blocks = model.embed_tokens(ids), params["blocks"]
    if not isinstance(blocks, tuple):
        return Prompts(*jax.lax.scan(one, x, blocks)[1])
    layers = []
    for weights in blocks:
        x, kept = one(x, _turn_back(weights))
        layers.append(kept)
    return Prompts(tuple(keys for keys, _ in layers), tuple(values for _, values in layers))


def insert(
    cache: KVCache,
    prompts: Prompts,
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
    room = cache.slots
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, room), (0, 0), (0, 0)]), prompts)

    def one(i: Array, cache: KVCache) -> KVCache:
        def write(to_cache: str, old: Array, new: Array) -> Array:
            pieces = jnp.einsum(to_cache, _slices(new, starts[:, i], room))
            return _write(old, pieces, slots[:, i])

        keys = jax.tree.map(_over_layers(partial(write, "rskh->rkhs")), cache.keys, padded.keys)
        values = jax.tree.map(_over_layers(partial(write, "rskh->rksh")), cache.values, padded.values)
        return KVCache.placed(keys, values)

    return jax.lax.fori_loop(0, count, one, cache)


def copy_slots(
    cache: KVCache, sources: Int[Array, "R F"], targets: Int[Array, "R F"], count: Int[Array, ""]
) -> KVCache:
    """The cache with slots copied within their part, one after the other; a target that is not there takes nothing."""
    parts = len(sources)

    def one(i: Array, cache: KVCache) -> KVCache:
        def copy(old: Array) -> Array:
            pieces = _slices(old.reshape(parts, -1, *old.shape[1:]), sources[:, i], 1)[:, 0]
            return _write(old, pieces, targets[:, i])

        return KVCache.placed(*(jax.tree.map(_over_layers(copy), x) for x in cache))

    return jax.lax.fori_loop(0, count, one, cache)


def _over_layers(function: Callable[..., Array]) -> Callable[..., Array]:
    """For an array of one layer, or of all of them."""
    return lambda old, *more: (function if old.ndim == len(KEY_DIMS) else jax.vmap(function))(old, *more)


def _slices(x: Array, starts: Int[Array, " R"], size: int) -> Array:
    """Of each x[r] `size` elements from its own start."""
    if len(starts) == 1:  # one device: a slice, where several have to gather
        return jax.lax.dynamic_slice_in_dim(x, starts[0], size, axis=1)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))(x, starts)


def _write(old: Array, pieces: Array, slots: Int[Array, " R"]) -> Array:
    """A piece into a slot of each part of the rows."""
    parts = old.reshape(len(slots), -1, *old.shape[1:])
    if len(slots) == 1:
        there = slots[0] < parts.shape[1]
        slot = jnp.where(there, slots[0], 0)
        kept = jax.lax.dynamic_slice_in_dim(parts, slot, 1, axis=1)
        parts = jax.lax.dynamic_update_slice_in_dim(parts, jnp.where(there, pieces[:, None], kept), slot, axis=1)
    else:
        parts = parts.at[jnp.arange(len(slots)), slots].set(pieces)
    return parts.reshape(old.shape)
