"""Attention over packed rows on GPU: a flash kernel in Pallas for Triton, forward and backward.

FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) with three changes:
1. The mask is the `KeyIntervals` of the row: two integers per query, compared with the index of the key.
2. A program goes only through the blocks that the mask leaves something of; which these are is computed before.
3. dK and dV of a kv head are summed over some of its query heads inside one program, and over the programs in float32
   afterwards; dQ has a kernel of its own. So no two programs add to the same place, and the result does not depend on
   their order.
Scores, softmax and sums are float32; of the softmax only the log-sum-exp of each query is kept for the backward pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from drift_jax.errors import ConfigError
from drift_jax.models.intervals import KeyIntervals, check_row_length, find_overlap
from drift_jax.models.remat import attach_backward


class Launch(NamedTuple):
    """How a kernel goes through a row: tokens of a block of each kind, and the GPU's resources for one program."""

    queries: int
    keys: int
    warps: int
    stages: int  # blocks on their way to shared memory at a time

    @property
    def params(self) -> plt.CompilerParams:
        return plt.CompilerParams(num_warps=self.warps, num_stages=self.stages)


class Launches(NamedTuple):
    forward: Launch
    query: Launch  # dQ
    key: Launch  # dK and dV
    # Query heads that one program of `key` adds up, or fewer that divide those of a kv head; None: all of these. Where
    # some are left for others, dK and dV lie in memory in float32 for each program.
    heads_per_program: int | None


# The fastest of those tried on an H100 (drift_jax/DESIGN.md). Blocks divide LANES, of which rows are multiples.
_LAUNCHES = Launches(Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), 2)
_OTHER_SHARED = 16 * 1024  # bytes of a program that are not blocks of queries or keys, at most
_MASKED = -1e30  # finite: a block may hold no key of a query
_LOG2_E = math.log2(math.e)  # 2**x is what the hardware has


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    intervals: KeyIntervals,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, scaled by H**-0.5, softmax in float32; `interpret` runs the kernels without a GPU.

    The keys are those of whole rows; the queries all of them or the part that this device has.

    Raises:
      ConfigError: T or S is not a multiple of 128, or H not a power of two of at least 16.
    """
    dim = query.shape[3]
    for length in (query.shape[1], key.shape[1]):
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
    launch = choose_launches(query).forward
    visits = _find_keys(intervals, launch)
    rows = pl.BlockSpec((None, launch.queries, None, dim), lambda i, b, n: (b, i, n, 0))
    keys = pl.BlockSpec((None, key.shape[1], None, dim), lambda i, b, n: (b, 0, n // groups, 0))
    bound = pl.BlockSpec((None, launch.queries), lambda i, b, n: (b, i))
    return pl.pallas_call(
        partial(_forward_kernel, scale=dim**-0.5, key_block=launch.keys),
        grid=(length // launch.queries, batch, heads),
        in_specs=[rows, keys, keys, bound, bound, pl.BlockSpec((None, None, 4), lambda i, b, n: (b, i, 0))],
        out_specs=[rows, pl.BlockSpec((None, None, launch.queries), lambda i, b, n: (b, n, i))],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, value.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=launch.params,
        interpret=interpret,
        name="pair_attention_forward",
    )(query, key, value, *intervals, visits)


def _backward(
    interpret: bool, query: Array, key: Array, value: Array, intervals: KeyIntervals, *rest: Array
) -> tuple[Array, Array, Array]:
    mixed, lse, d_mixed = rest
    delta = jnp.einsum("btnh,btnh->bnt", mixed, d_mixed, preferred_element_type=jnp.float32)
    inputs = (query, key, value, *intervals, d_mixed, lse, delta)
    return _backward_query(interpret, *inputs), *_backward_key(interpret, *inputs)


def _backward_query(interpret: bool, *inputs: Array) -> Array:
    query, key, _, start, stop, *_ = inputs
    batch, length, heads, dim = query.shape
    groups = heads // key.shape[2]
    launch = choose_launches(query).query
    visits = _find_keys(KeyIntervals(start, stop), launch)
    rows = pl.BlockSpec((None, launch.queries, None, dim), lambda i, b, n: (b, i, n, 0))
    keys = pl.BlockSpec((None, key.shape[1], None, dim), lambda i, b, n: (b, 0, n // groups, 0))
    bound = pl.BlockSpec((None, launch.queries), lambda i, b, n: (b, i))
    number = pl.BlockSpec((None, None, launch.queries), lambda i, b, n: (b, n, i))
    visit = pl.BlockSpec((None, None, 4), lambda i, b, n: (b, i, 0))
    return pl.pallas_call(
        partial(_backward_query_kernel, scale=dim**-0.5, key_block=launch.keys),
        grid=(length // launch.queries, batch, heads),
        in_specs=[rows, keys, keys, bound, bound, rows, number, number, visit],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=launch.params,
        interpret=interpret,
        name="pair_attention_backward_query",
    )(*inputs, visits)


def _backward_key(interpret: bool, *inputs: Array) -> tuple[Array, Array]:
    query, key, value, start, stop, *_ = inputs
    batch, length, heads, dim = query.shape
    groups = heads // key.shape[2]
    launches = choose_launches(query)
    launch, each = launches.key, math.gcd(launches.heads_per_program or groups, groups)
    parts = heads // each  # one program's sums each, in float32 where those of a kv head are added up afterwards
    visits = _find_queries(KeyIntervals(start, stop), launch, key.shape[1])
    rows = pl.BlockSpec((None, length, each, dim), lambda j, b, p: (b, 0, p, 0))
    keys = pl.BlockSpec((None, launch.keys, None, dim), lambda j, b, p: (b, j, p * each // groups, 0))
    sums = pl.BlockSpec((None, launch.keys, None, dim), lambda j, b, p: (b, j, p, 0))
    bound = pl.BlockSpec((None, length), lambda j, b, p: (b, 0))
    number = pl.BlockSpec((None, each, length), lambda j, b, p: (b, p, 0))
    visit = pl.BlockSpec((None, None, 4), lambda j, b, p: (b, j, 0))
    wide = jnp.float32 if each < groups else None
    out = [jax.ShapeDtypeStruct((batch, key.shape[1], parts, dim), wide or x.dtype) for x in (key, value)]
    found = pl.pallas_call(
        partial(_backward_key_kernel, scale=dim**-0.5, heads=each, query_block=launch.queries),
        grid=(key.shape[1] // launch.keys, batch, parts),
        in_specs=[rows, keys, keys, bound, bound, rows, number, number, visit],
        out_specs=[sums, sums],
        out_shape=out,
        compiler_params=launch.params,
        interpret=interpret,
        name="pair_attention_backward_key",
    )(*inputs, visits)
    d_key, d_value = (x.reshape(*key.shape[:3], -1, dim).sum(axis=3).astype(key.dtype) for x in found)
    return d_key, d_value


def choose_launches(query: Float[Array, "B T N H"]) -> Launches:
    """Those of an H100, with as many blocks on their way at a time as fit into shared memory."""
    token = query.shape[3] * query.dtype.itemsize

    def fit(launch: Launch) -> Launch:
        room = _shared_memory() - launch.queries * token - _OTHER_SHARED
        return launch._replace(stages=max(1, min(launch.stages, room // (2 * launch.keys * token))))

    kernels = _LAUNCHES
    return kernels._replace(forward=fit(kernels.forward), query=fit(kernels.query), key=fit(kernels.key))


def _shared_memory() -> int:
    """Bytes that a program may have, of an A100, H100 or B200; GPUs for desktops and inference have less."""
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    return (163 if capability in ("8.0", "8.7") or capability.startswith(("9.", "10.")) else 99) * 1024


def runs_here() -> bool:
    """Whether Pallas compiles for the GPU here, as it does from NVIDIA's Ampere on; True where there is none."""
    return re.fullmatch(r"[1-7]\.\d", str(getattr(jax.devices()[0], "compute_capability", ""))) is None


# --- which blocks ------------------------------------------------------------------------------------------


def _find_keys(intervals: KeyIntervals, launch: Launch) -> Int[Array, "B I 4"]:
    """Which blocks of keys each block of queries visits: (first, first and end of those that all see whole, end).

    What a block of queries sees is one interval. Where no block is seen whole by all, both numbers are the end.
    """
    start, stop = (bound.reshape(bound.shape[0], -1, launch.queries) for bound in intervals)
    first, end = start.min(axis=2) // launch.keys, -(-stop.max(axis=2) // launch.keys)
    first_whole, end_whole = -(-start.max(axis=2) // launch.keys), stop.min(axis=2) // launch.keys
    some = first_whole < end_whole
    return jnp.stack([first, jnp.where(some, first_whole, end), jnp.where(some, end_whole, end), end], axis=2)


def _find_queries(intervals: KeyIntervals, launch: Launch, key_length: int) -> Int[Array, "B J 4"]:
    """Which blocks of queries each block of keys visits: (first, how many before the gap, the one after it, in all).

    Keys late in a prompt have a gap: all of the chosen side sees them, the tokens of the prompt before them do not.
    Where this device has no query that sees a block, none is visited.
    """
    overlap = find_overlap(intervals, launch.queries, launch.keys, key_length).transpose(0, 2, 1)
    columns = overlap.shape[2]
    index = jnp.arange(columns, dtype=jnp.int32)

    def first_of(mask: Bool[Array, "B J I"]) -> Int[Array, "B J"]:
        return jnp.where(mask, index, columns).min(axis=2)

    first = first_of(overlap)
    gap = first_of(~overlap & (index >= first[:, :, None]))
    after = first_of(overlap & (index >= gap[:, :, None]))
    stop = jnp.where(overlap, index + 1, 0).max(axis=2)
    return jnp.stack([first, gap - first, after, gap - first + jnp.maximum(stop - after, 0)], axis=2)


T = TypeVar("T")


def _visit_keys(visits: Any, visit: Callable[[bool, Array, T], T], carry: T) -> T:
    """`visit(masked, block, carry)` for all blocks of a row of `_find_keys`; most are seen whole and need no mask.

    The row is read ahead of the loops: a load in them would hold up those of the blocks.
    """
    first, first_whole, end_whole, end = (visits[i] for i in range(4))
    carry = jax.lax.fori_loop(first, first_whole, partial(visit, True), carry)
    carry = jax.lax.fori_loop(first_whole, end_whole, partial(visit, False), carry)
    return jax.lax.fori_loop(end_whole, end, partial(visit, True), carry)


# --- kernels -----------------------------------------------------------------------------------------------


def _score(
    query: Array, key: Array, start: Array, stop: Array, first_key: Array, scale: float, masked: bool = True
) -> Array:
    """Scores of a block of queries and one of keys, times log2(e); `masked` where some of them are not seen."""
    scores = plt.dot(query, key, trans_b=True) * (scale * _LOG2_E)
    if not masked:
        return scores
    keys = first_key + jnp.arange(key.shape[0])
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
    key_block: int,
) -> None:
    query, start, stop = query_ref[...], start_ref[...], stop_ref[...]

    def visit(masked: bool, block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, top, total = carry
        first_key = block * key_block
        keys = pl.ds(first_key, key_block)
        scores = _score(query, key_ref[keys, :], start, stop, first_key, scale, masked)
        new_top = jnp.maximum(top, scores.max(axis=1))
        shrink, weights = jnp.exp2(top - new_top), jnp.exp2(scores - new_top[:, None])
        value = value_ref[keys, :]
        mixed = mixed * shrink[:, None] + plt.dot(weights.astype(value.dtype), value)
        return mixed, new_top, total * shrink + weights.sum(axis=1)

    # A block may show a query nothing; the weight 1 that it then gives every key shrinks to 0 with its first real one.
    nothing = jnp.zeros(query.shape, jnp.float32), jnp.full(start.shape, _MASKED), jnp.zeros(start.shape, jnp.float32)
    mixed, top, total = _visit_keys(visits, visit, nothing)
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
    key_block: int,
) -> None:
    query, start, stop, d_mixed = query_ref[...], start_ref[...], stop_ref[...], d_mixed_ref[...]
    lse, delta = lse_ref[...], delta_ref[...]

    def visit(masked: bool, block: Array, d_query: Array) -> Array:
        first_key = block * key_block
        keys = pl.ds(first_key, key_block)
        key, value = key_ref[keys, :], value_ref[keys, :]
        weights = jnp.exp2(_score(query, key, start, stop, first_key, scale, masked) - lse[:, None])
        d_scores = weights * (plt.dot(d_mixed, value, trans_b=True) - delta[:, None])
        return d_query + plt.dot(d_scores.astype(key.dtype), key)

    d_query = _visit_keys(visits, visit, jnp.zeros(query.shape, jnp.float32))
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
    heads: int,
    query_block: int,
) -> None:
    key, value = key_ref[...], value_ref[...]
    first, before, after_gap, count = (visits[i] for i in range(4))
    first_key = pl.program_id(0) * key.shape[0]

    def visit(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_key, d_value = carry
        head, visited = jax.lax.rem(step, heads), jax.lax.div(step, heads)
        block = jnp.where(visited < before, first + visited, after_gap + visited - before)
        queries = pl.ds(block * query_block, query_block)
        query, d_mixed = query_ref[queries, head, :], d_mixed_ref[queries, head, :]
        scores = _score(query, key, start_ref[queries], stop_ref[queries], first_key, scale)
        weights = jnp.exp2(scores - lse_ref[head, queries][:, None])
        d_value = d_value + plt.dot(weights.astype(d_mixed.dtype), d_mixed, trans_a=True)
        d_scores = weights * (plt.dot(d_mixed, value, trans_b=True) - delta_ref[head, queries][:, None])
        return d_key + plt.dot(d_scores.astype(query.dtype), query, trans_a=True), d_value

    nothing = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    d_key, d_value = jax.lax.fori_loop(0, count * heads, visit, nothing)
    d_key_ref[...] = (d_key * scale).astype(d_key_ref.dtype)
    d_value_ref[...] = d_value.astype(d_value_ref.dtype)
