"""Attention over packed rows on GPU: a flash kernel in Pallas for Triton, forward and backward.

FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) with three changes:
1. The mask is the `KeyIntervals` of the row: two integers per query, compared with the index of the key.
2. A program goes only through the blocks that the mask leaves something of; which these are is computed before.
3. dK and dV of a kv head are summed over its query heads inside one program; dQ has a kernel of its own, so that no
   two programs add to the same place and the result does not depend on their order.
Scores, softmax and sums are float32; of the softmax only the log-sum-exp of each query is kept for the backward pass.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from drift_jax.errors import ConfigError
from drift_jax.models.intervals import KeyIntervals, check_row_length, find_overlap
from drift_jax.models.remat import attach_backward

_QUERY_BLOCK, _KEY_BLOCK = 128, 64  # forward
_BACKWARD_BLOCK = 64  # queries and keys
_MASKED = -1e30  # finite: a block may hold no key of a query
_LOG2_E = math.log2(math.e)  # 2**x is what the hardware has


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    intervals: KeyIntervals,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, scaled by H**-0.5, softmax in float32; `interpret` runs the kernels without a GPU.

    Raises:
      ConfigError: T is not a multiple of 128, or H not a power of two of at least 16.
    """
    length, dim = query.shape[1], query.shape[3]
    check_row_length(length, "triton")
    if dim < 16 or dim & (dim - 1):
        raise ConfigError(
            f"attention back end 'triton': heads of {dim} numbers; the kernel takes powers of two from 16. "
            "Set attention: xla."
        )
    return attach_backward(partial(_forward, interpret), partial(_backward, interpret), (query, key, value), intervals)


def _forward(
    interpret: bool, query: Array, key: Array, value: Array, intervals: KeyIntervals
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    batch, length, heads, dim = query.shape
    groups = heads // key.shape[2]
    visits = _find_visits(find_overlap(intervals, _QUERY_BLOCK, _KEY_BLOCK), _QUERY_BLOCK, _KEY_BLOCK)
    rows = pl.BlockSpec((None, _QUERY_BLOCK, None, dim), lambda i, b, n: (b, i, n, 0))
    keys = pl.BlockSpec((None, length, None, dim), lambda i, b, n: (b, 0, n // groups, 0))
    bound = pl.BlockSpec((None, _QUERY_BLOCK), lambda i, b, n: (b, i))
    return pl.pallas_call(
        partial(_forward_kernel, scale=dim**-0.5),
        grid=(length // _QUERY_BLOCK, batch, heads),
        in_specs=[rows, keys, keys, bound, bound, pl.BlockSpec((None, None, 4), lambda i, b, n: (b, i, 0))],
        out_specs=[rows, pl.BlockSpec((None, None, _QUERY_BLOCK), lambda i, b, n: (b, n, i))],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, value.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=_choose_resources(query),
        interpret=interpret,
        name="pair_attention_forward",
    )(query, key, value, *intervals, visits)


def _backward(
    interpret: bool, query: Array, key: Array, value: Array, intervals: KeyIntervals, *rest: Array
) -> tuple[Array, Array, Array]:
    (start, stop), (mixed, lse, d_mixed) = intervals, rest
    delta = jnp.einsum("btnh,btnh->bnt", mixed, d_mixed, preferred_element_type=jnp.float32)
    overlap = find_overlap(KeyIntervals(start, stop), _BACKWARD_BLOCK, _BACKWARD_BLOCK)
    inputs = (query, key, value, start, stop, d_mixed, lse, delta)
    d_query = _backward_query(interpret, *inputs, overlap)
    d_key, d_value = _backward_key(interpret, *inputs, overlap)
    return d_query, d_key, d_value


def _backward_query(interpret: bool, *inputs: Array) -> Array:
    query, key, *_, overlap = inputs
    batch, length, heads, dim = query.shape
    groups = heads // key.shape[2]
    visits = _find_visits(overlap, _BACKWARD_BLOCK, _BACKWARD_BLOCK)
    rows = pl.BlockSpec((None, _BACKWARD_BLOCK, None, dim), lambda i, b, n: (b, i, n, 0))
    keys = pl.BlockSpec((None, length, None, dim), lambda i, b, n: (b, 0, n // groups, 0))
    bound = pl.BlockSpec((None, _BACKWARD_BLOCK), lambda i, b, n: (b, i))
    number = pl.BlockSpec((None, None, _BACKWARD_BLOCK), lambda i, b, n: (b, n, i))
    visit = pl.BlockSpec((None, None, 4), lambda i, b, n: (b, i, 0))
    return pl.pallas_call(
        partial(_backward_query_kernel, scale=dim**-0.5),
        grid=(length // _BACKWARD_BLOCK, batch, heads),
        in_specs=[rows, keys, keys, bound, bound, rows, number, number, visit],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=_choose_resources(query),
        interpret=interpret,
        name="pair_attention_backward_query",
    )(*inputs[:-1], visits)


def _backward_key(interpret: bool, *inputs: Array) -> tuple[Array, Array]:
    query, key, value, *_, overlap = inputs
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    visits = _find_visits(overlap.transpose(0, 2, 1), _BACKWARD_BLOCK, _BACKWARD_BLOCK)
    rows = pl.BlockSpec((None, length, groups, dim), lambda j, b, k: (b, 0, k, 0))
    keys = pl.BlockSpec((None, _BACKWARD_BLOCK, None, dim), lambda j, b, k: (b, j, k, 0))
    bound = pl.BlockSpec((None, length), lambda j, b, k: (b, 0))
    number = pl.BlockSpec((None, groups, length), lambda j, b, k: (b, k, 0))
    visit = pl.BlockSpec((None, None, 4), lambda j, b, k: (b, j, 0))
    d_key, d_value = pl.pallas_call(
        partial(_backward_key_kernel, scale=dim**-0.5, groups=groups),
        grid=(length // _BACKWARD_BLOCK, batch, kv_heads),
        in_specs=[rows, keys, keys, bound, bound, rows, number, number, visit],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        compiler_params=_choose_resources(query),
        interpret=interpret,
        name="pair_attention_backward_key",
    )(*inputs[:-1], visits)
    return d_key, d_value


def _choose_resources(query: Array) -> plt.CompilerParams:
    """Two blocks on their way at a time, one where two would not fit into an A100's 163 KiB of shared memory."""
    dim = query.shape[3]
    return plt.CompilerParams(num_warps=4 if dim <= 64 else 8, num_stages=2 if dim * query.dtype.itemsize <= 256 else 1)


# --- which blocks ------------------------------------------------------------------------------------------


def _find_visits(overlap: Bool[Array, "B I J"], row_block: int, column_block: int) -> Int[Array, "B I 4"]:
    """Per row of blocks: (first column, columns before the gap, column after the gap, columns in all).

    The gap ends at the diagonal, which is never empty. Keys late in a prompt have one: all of the chosen side sees
    them, the tokens of the prompt before them do not.
    """
    rows, columns = overlap.shape[1:]
    index = jnp.arange(columns, dtype=jnp.int32)
    diagonal = jnp.arange(rows, dtype=jnp.int32) * row_block // column_block
    first = jnp.where(overlap, index, columns).min(axis=2)
    gap = jnp.where(overlap & (index < diagonal[:, None]), index + 1, first[:, :, None]).max(axis=2)
    stop = jnp.where(overlap, index + 1, 0).max(axis=2)
    before = gap - first
    diagonal = jnp.broadcast_to(diagonal, first.shape)
    return jnp.stack([first, before, diagonal, before + stop - diagonal], axis=2)


def _pick_block(visits: Any, step: Array) -> Array:
    first, before, after_gap = visits[0], visits[1], visits[2]
    return jnp.where(step < before, first + step, after_gap + step - before)


# --- kernels -----------------------------------------------------------------------------------------------


def _score(query: Array, key: Array, start: Array, stop: Array, first_key: Array, scale: float) -> Array:
    """Masked scores of a block of queries and one of keys, times log2(e)."""
    keys = first_key + jnp.arange(key.shape[0])
    scores = plt.dot(query, key, trans_b=True) * (scale * _LOG2_E)
    return jnp.where((keys >= start[:, None]) & (keys < stop[:, None]), scores, _MASKED)


def _forward_kernel(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    start_ref: Any,
    stop_ref: Any,
    visits: Any,
    mixed_ref: Any,
    lse_ref: Any,
    scale: float,
) -> None:
    query, start, stop = query_ref[...], start_ref[...], stop_ref[...]

    def visit(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, top, total = carry
        first_key = _pick_block(visits, step) * _KEY_BLOCK
        keys = pl.ds(first_key, _KEY_BLOCK)
        scores = _score(query, key_ref[keys, :], start, stop, first_key, scale)
        new_top = jnp.maximum(top, scores.max(axis=1))
        shrink, weights = jnp.exp2(top - new_top), jnp.exp2(scores - new_top[:, None])
        value = value_ref[keys, :]
        mixed = mixed * shrink[:, None] + plt.dot(weights.astype(value.dtype), value)
        return mixed, new_top, total * shrink + weights.sum(axis=1)

    # A block may show a query nothing; the weight 1 that it then gives every key shrinks to 0 with its first real one.
    nothing = jnp.zeros(query.shape, jnp.float32), jnp.full(start.shape, _MASKED), jnp.zeros(start.shape, jnp.float32)
    mixed, top, total = jax.lax.fori_loop(0, visits[3], visit, nothing)
    mixed_ref[...] = (mixed / total[:, None]).astype(mixed_ref.dtype)
    lse_ref[...] = top + jnp.log2(total)


def _backward_query_kernel(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    start_ref: Any,
    stop_ref: Any,
    d_mixed_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    visits: Any,
    d_query_ref: Any,
    scale: float,
) -> None:
    query, start, stop, d_mixed = query_ref[...], start_ref[...], stop_ref[...], d_mixed_ref[...]
    lse, delta = lse_ref[...], delta_ref[...]

    def visit(step: Array, d_query: Array) -> Array:
        first_key = _pick_block(visits, step) * _BACKWARD_BLOCK
        keys = pl.ds(first_key, _BACKWARD_BLOCK)
        key, value = key_ref[keys, :], value_ref[keys, :]
        weights = jnp.exp2(_score(query, key, start, stop, first_key, scale) - lse[:, None])
        d_scores = weights * (plt.dot(d_mixed, value, trans_b=True) - delta[:, None])
        return d_query + plt.dot(d_scores.astype(key.dtype), key)

    d_query = jax.lax.fori_loop(0, visits[3], visit, jnp.zeros(query.shape, jnp.float32))
    d_query_ref[...] = (d_query * scale).astype(d_query_ref.dtype)


def _backward_key_kernel(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    start_ref: Any,
    stop_ref: Any,
    d_mixed_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    visits: Any,
    d_key_ref: Any,
    d_value_ref: Any,
    scale: float,
    groups: int,
) -> None:
    key, value = key_ref[...], value_ref[...]
    first_key = pl.program_id(0) * _BACKWARD_BLOCK

    def visit(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_key, d_value = carry
        group = jax.lax.rem(step, groups)
        queries = pl.ds(_pick_block(visits, jax.lax.div(step, groups)) * _BACKWARD_BLOCK, _BACKWARD_BLOCK)
        query, d_mixed = query_ref[queries, group, :], d_mixed_ref[queries, group, :]
        scores = _score(query, key, start_ref[queries], stop_ref[queries], first_key, scale)
        weights = jnp.exp2(scores - lse_ref[group, queries][:, None])
        d_value = d_value + plt.dot(weights.astype(d_mixed.dtype), d_mixed, trans_a=True)
        d_scores = weights * (plt.dot(d_mixed, value, trans_b=True) - delta_ref[group, queries][:, None])
        return d_key + plt.dot(d_scores.astype(query.dtype), query, trans_a=True), d_value

    nothing = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    d_key, d_value = jax.lax.fori_loop(0, visits[3] * groups, visit, nothing)
    d_key_ref[...] = (d_key * scale).astype(d_key_ref.dtype)
    d_value_ref[...] = d_value.astype(d_value_ref.dtype)
