"""Attention over packed rows on TPU: the splash kernel that comes with JAX, with a mask made while the step runs.

The library makes its masks from numpy arrays, before tracing. Its kernels only read a `MaskInfo`: here the one of every
row is computed from the row's `KeyIntervals`. Blocks that nothing sees are skipped forward and backward; within a
block the mask is computed from one int32 per query, which holds the query's interval.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    BlockSizes,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from drift_jax.models.intervals import LANES, KeyIntervals, check_row_length, find_overlap

# An interval is one int32: its start in the upper 16 bits and its stop in the lower ones.
_BITS = 16
LONGEST_ROW = 2 ** (_BITS - 1)
_LARGEST_BLOCK = 4 * LANES


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    intervals: KeyIntervals,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, scaled by H**-0.5, softmax in float32; `interpret` runs the kernel without a TPU.

    S is a multiple of T: the keys of whole rows, and all of their queries or the part that this device has.

    Raises:
      ConfigError: T is not a multiple of 128, or S longer than `LONGEST_ROW`.
    """
    length, dim = query.shape[1], query.shape[3]
    check_row_length(length, "splash")
    check_row_length(key.shape[1], "splash", LONGEST_ROW)
    block = max(size for size in range(LANES, _LARGEST_BLOCK + 1, LANES) if length % size == 0)
    overlap = find_overlap(intervals, block, block, key.shape[1])
    packed = (intervals.start << _BITS) | intervals.stop

    def attend_row(row: tuple[Array, ...]) -> Float[Array, "N T H"]:
        *qkv, overlap, packed = row
        return cast(Array, _build_kernel(overlap, packed, block, interpret)(*qkv))

    # Heads outermost, as the kernel has them. One row after the other: blocks of all rows at once cannot be skipped
    # apart, and the kernel's log-sum-exp is 128 times as wide as what is kept of it.
    qkv = (x.transpose(0, 2, 1, 3) for x in (query * dim**-0.5, key, value))
    return jax.lax.map(attend_row, (*qkv, overlap, packed)).transpose(0, 2, 1, 3)


def _build_kernel(
    overlap: Bool[Array, "I J"], packed: Int[Array, "T"], block: int, interpret: bool
) -> SplashAttentionKernel:
    sequence: Any = packed  # declared as a numpy array
    by_key = MaskInfo(_find_next(overlap, axis=1)[None], None, overlap[None].astype(jnp.int32), None, sequence)
    by_query = by_key._replace(data_next=_find_next(overlap, axis=0)[None])
    return SplashAttentionKernel(
        fwd_mask_info=by_key,
        dq_mask_info=by_key,
        dkv_mask_info=by_query,
        block_sizes=BlockSizes(block, block, block, block, block, block, block, block),
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_sees,
        interpret=interpret,
    )


def _sees(packed: Int[Array, "*B"], keys: Int[Array, "*B"]) -> Bool[Array, "*B"]:
    return (keys >= packed >> _BITS) & (keys < packed & (2**_BITS - 1))


def _find_next(overlap: Bool[Array, "I J"], axis: int) -> Int[Array, "I J"]:
    """The block to have in memory at each step: at a skipped one the next that is needed, after the last one the last.

    A block is fetched when this number changes, so skipped steps fetch nothing in vain.
    """
    count = overlap.shape[axis]
    index = jax.lax.broadcasted_iota(jnp.int32, overlap.shape, axis)
    last = jnp.where(overlap, index, 0).max(axis=axis, keepdims=True)
    return jnp.minimum(jax.lax.cummin(jnp.where(overlap, index, count), axis=axis, reverse=True), last)
