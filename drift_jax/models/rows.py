"""Rows of arrays that lie on a mesh, in and out: nothing moves between devices, and no array is there twice.

Rows count along the first dim (layers, words), and from the start of each device's own part of it: rows 2 to 4 of an
array whose first dim is split four ways are three rows each of four parts.

Numbers are moved as integers of the same width, so that they arrive as they are: not even a NaN changes. And XLA's CPU
compiler does anything with bfloat16 in float32; it would convert a whole array for a row of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

# As much of an array is moved at a time, or one row. More is no faster, and lies in memory several times over: mapped
# pages, the array that is made of them, and the devices' copy.
PIECE_BYTES = 16 * 2**20


def count_rows(shape: Sequence[int], sharding: NamedSharding) -> tuple[int, int]:
    """(parts that a sharding makes of the first dim, rows of each)."""
    rows = sharding.shard_shape(tuple(shape))[0]
    return shape[0] // rows, rows


def cut_rows(shape: Sequence[int], sharding: NamedSharding, itemsize: int) -> list[tuple[int, int]]:
    """Start and stop of the pieces in which an array is moved."""
    _, rows = count_rows(shape, sharding)
    bytes_of_row = math.prod(shape) // rows * itemsize
    group = _group_size(shape, sharding)
    step = max(1, PIECE_BYTES // (bytes_of_row * group)) * group
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _group_size(shape: Sequence[int], sharding: NamedSharding) -> int:
    """How many rows of a table are seen as one, of two dims, while it is written.

    XLA's CPU compiler writes a row in its place where rows have two dims; where they have one it goes through the
    whole table for it.
    """
    if len(shape) != 2:
        return 1
    _, rows = count_rows(shape, sharding)
    return next((size for size in (64, 32, 16, 8, 4, 2) if rows % size == 0), 1)


def _grouped_spec(sharding: NamedSharding, ndim: int) -> PartitionSpec:
    """Where the dims lie of an array with a dim more, of the rows in a group."""
    first, *rest = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))
    return PartitionSpec(first, None, *rest)


def _to_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


@final
class Assembly:
    """An array on a mesh in the making: its rows are written into it, piece by piece."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype, sharding: NamedSharding) -> None:
        self._sharding, self._group = sharding, _group_size(shape, sharding)
        grouped = (shape[0] // self._group, self._group, *shape[1:])
        spec = _grouped_spec(sharding, len(shape))
        self._array = jnp.zeros(grouped, dtype, device=NamedSharding(sharding.mesh, spec))

    def write(self, rows: jax.Array, start: int) -> None:
        """Rows from `start` on, placed like the array; returns when they are there."""
        array = _write(self._array, rows, np.int32(start // self._group), self._sharding)
        self._array = jax.block_until_ready(array)  # without waiting, pieces would pile up

    def finish(self) -> jax.Array:
        array = _ungroup(self._array, self._sharding)
        shards = [shard.data for shard in array.addressable_shards]
        # The same memory: jit may write a placement in other words, and what takes the array would be compiled again.
        return jax.make_array_from_single_device_arrays(array.shape, self._sharding, shards)


# Arrays are donated and written in place. The first row is an argument of the program, so that there is one program for
# all layers of a parameter.
@partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def _write(array: jax.Array, rows: jax.Array, start: ArrayLike, sharding: NamedSharding) -> jax.Array:
    def write(array: jax.Array, rows: jax.Array, start: ArrayLike) -> jax.Array:
        bits = _to_bits(rows.reshape(-1, *array.shape[1:]))
        bits = jax.lax.dynamic_update_slice_in_dim(_to_bits(array), bits, start, 0)
        return jax.lax.bitcast_convert_type(bits, array.dtype)

    grouped = _grouped_spec(sharding, rows.ndim)
    in_specs = (grouped, sharding.spec, PartitionSpec())
    return jax.shard_map(write, mesh=sharding.mesh, in_specs=in_specs, out_specs=grouped)(array, rows, start)


@partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def _ungroup(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    def ungroup(array: jax.Array) -> jax.Array:
        return array.reshape(-1, *array.shape[2:])

    grouped = _grouped_spec(sharding, array.ndim - 1)
    return jax.shard_map(ungroup, mesh=sharding.mesh, in_specs=grouped, out_specs=sharding.spec)(array)


@partial(jax.jit, static_argnames=("count", "sharding", "everywhere"))
def read_rows(array: jax.Array, start: ArrayLike, count: int, sharding: NamedSharding, everywhere: bool) -> jax.Array:
    """`count` rows from row `start` on, where they are, or (`everywhere`) all of them on every device."""

    def read(array: jax.Array, start: ArrayLike) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(_to_bits(array), start, count, 0)

    in_specs = (sharding.spec, PartitionSpec())
    bits = jax.shard_map(read, mesh=sharding.mesh, in_specs=in_specs, out_specs=sharding.spec)(array, start)
    if everywhere:
        bits = jax.lax.with_sharding_constraint(bits, NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.lax.bitcast_convert_type(bits, array.dtype)
