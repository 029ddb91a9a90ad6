"""Rows of arrays that lie on a mesh, in and out: nothing moves between devices, and no array is there twice.

Rows count along the first dim (layers, words), and from the start of each device's own part of it: rows 2 to 4 of an
array whose first dim is split four ways are three rows each of four parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
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
    step = max(1, PIECE_BYTES // max(1, bytes_of_row))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


# The array is donated and written in place. Its first row is an argument of the program, so that there is one program
# for all layers of a parameter.
@partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def write_rows(array: jax.Array, rows: jax.Array, start: ArrayLike, sharding: NamedSharding) -> jax.Array:
    """`array` with `rows` from row `start` on; both lie as `sharding` says. `array` cannot be used afterwards."""
    spec = sharding.spec
    write = jax.shard_map(
        lambda to, part, at: jax.lax.dynamic_update_slice_in_dim(to, part, at, 0),
        mesh=sharding.mesh,
        in_specs=(spec, spec, PartitionSpec()),
        out_specs=spec,
    )
    return write(array, rows, start)


@partial(jax.jit, static_argnames=("count", "sharding", "everywhere"))
def read_rows(array: jax.Array, start: ArrayLike, count: int, sharding: NamedSharding, everywhere: bool) -> jax.Array:
    """`count` rows from row `start` on, where they are, or (`everywhere`) all of them on every device."""
    spec = sharding.spec
    read = jax.shard_map(
        lambda part, at: jax.lax.dynamic_slice_in_dim(part, at, count, 0),
        mesh=sharding.mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=spec,
    )
    rows = read(array, start)
    if everywhere:
        rows = jax.lax.with_sharding_constraint(rows, NamedSharding(sharding.mesh, PartitionSpec()))
    return rows
