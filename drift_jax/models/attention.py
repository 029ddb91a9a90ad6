"""Attention behind one function, so that a faster back end changes nothing around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from drift_jax.errors import ConfigError
from drift_jax.models import splash, triton, xla
from drift_jax.models.intervals import KeyIntervals, KeySpans
from drift_jax.sharding import Dims, run_per_device, split_ways

# Causal attention goes through at most 8 blocks of queries of at least 128. A block looks at no key after its own
# end, which saves close to half of the work and of the memory that the scores need.
_MOST_BLOCKS = 8
_SMALLEST_BLOCK = 128
_MASKED = -1e30  # finite: a row that may look at nothing gives numbers, not NaN


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
    return _attend_causal(query, key, value)


def attend_per_device(
    kernel: Callable[..., Float[Array, "B T N H"]],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    seen: xla.PlacedSpans | KeyIntervals,
) -> Float[Array, "B T N H"]:
    """`kernel(query, key, value, seen)` on every device for its queries, its heads and all keys of its rows.

    Where tokens of a row are split over devices, its keys and values are gathered: they are a few heads, and each
    device then knows what its queries see. Kv heads that the mesh does not divide are repeated until it does: a device
    then holds those its queries need.
    """
    queries: Dims = ("batch", "length", "heads", "head_dim")
    keys: Dims = ("batch", None, "heads", "head_dim")
    heads, kv_heads = query.shape[2], key.shape[2]
    split = math.lcm(kv_heads, split_ways("heads"))
    if heads % split == 0 and split > kv_heads:
        key, value = (jnp.repeat(x, split // kv_heads, axis=2) for x in (key, value))

    def attend_part(query: Array, key: Array, value: Array, *bounds: Array) -> Array:
        return kernel(query, key, value, type(seen)(*bounds))

    bounds: tuple[Dims, ...] = (("batch", "length"),) * len(seen)
    return run_per_device(attend_part, (query, key, value, *seen), (queries, keys, keys, *bounds), queries)


def attend_by_xla(
    query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], seen: KeySpans
) -> Float[Array, "B T N H"]:
    """Attention over packed rows in plain XLA, on every device for what it has."""
    return attend_per_device(xla.attend_part, query, key, value, xla.place_spans(seen))


def attend_one(
    query: Float[Array, "B 1 N H"],
    keys: Float[Array, "B K H S"],
    values: Float[Array, "B K S H"],
    lengths: Int[Array, " B"],
) -> Float[Array, "B 1 N H"]:
    """Grouped-query attention of one token a row over the first `lengths` of the row's keys, softmax in float32."""
    batch, _, heads, dim = query.shape
    kv_heads, slots = values.shape[1:3]
    rows = (query * dim**-0.5).reshape(batch, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bkgh,bkhs->bkgs", rows, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.arange(slots) < lengths[:, None, None, None], scores, _MASKED)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = jnp.einsum("bkgs,bksh->bkgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    mixed = mixed / weights.sum(axis=-1)[..., None]
    return mixed.astype(query.dtype).reshape(query.shape)


# --- back ends ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention over packed rows.

    `attend(query, key, value, seen)` takes `KeyIntervals` of rows that `intervals.to_intervals` put into their order
    when `intervals` is True, else `KeySpans` of rows as they are packed. `needs` is the platform; None: any.
    """

    name: str
    needs: str | None
    intervals: bool
    attend: Callable[..., Float[Array, "B T N H"]]


BACKENDS: dict[str, AttentionBackend] = {
    "xla": AttentionBackend("xla", None, False, attend_by_xla),
    "splash": AttentionBackend("splash", "tpu", True, partial(attend_per_device, splash.attend)),
    "triton": AttentionBackend("triton", "gpu", True, partial(attend_per_device, triton.attend)),
}
_AUTO = {"tpu": "splash", "gpu": "triton"}


def resolve_attention(name: str, platform: str) -> AttentionBackend:
    """The back end that `attention: name` means on devices of `platform` (`jax.Device.platform`: cpu, gpu, tpu).

    Raises:
      ConfigError: no such back end, or it does not run there.
    """
    fitting = _AUTO.get(platform, "xla")
    if fitting == "triton" and not triton.runs_here():
        fitting = "xla"
    backend = BACKENDS.get(fitting if name == "auto" else name)
    if backend is None:
        raise ConfigError(f"attention {name!r} is not known; choose one of {['auto', *BACKENDS]}.")
    if backend.needs not in (None, platform):
        raise ConfigError(
            f"attention {name!r} runs on {backend.needs} only, and the devices here are {platform}. "
            f"Set attention: auto (here {fitting})."
        )
    return backend


# --- plain rows --------------------------------------------------------------------------------------------


def _attend_causal(
    query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    length = query.shape[1]
    block = max(_SMALLEST_BLOCK, -(-length // _MOST_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        mask = jnp.arange(stop) <= jnp.arange(start, stop)[:, None]
        outputs.append(_attend_block(query[:, start:stop], key[:, :stop], value[:, :stop], mask[None, None]))
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
