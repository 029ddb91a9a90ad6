"""Which keys each query of a packed row sees, in the two forms that attention back ends take.

A row is `[prompt | chosen | rejected]` of one pair, then of the next, then padding. `KeySpans` describes it as it is:
two spans of keys per query. Written as `[chosen reversed | prompt | rejected]` the keys of every query are one
interval: a chosen token sees from itself to the end of the prompt, a prompt or rejected token from the start of the
prompt to itself. Kernels mask and skip by that; positions, and with them the rotation, move with the tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from drift_jax.errors import ConfigError

LANES = 128  # kernels want rows of a multiple of this many tokens


class KeySpans(NamedTuple):
    """Which keys of its row each query of a packed row may look at.

    Query t sees key s <= t when `prompt_start[t] <= s < prompt_stop[t]` (the prompt of its pair) or `s >= own_start[t]`
    (its own side up to itself). A prompt token's own span starts where its prompt does; a padding token sees itself.
    """

    prompt_start: Int[Any, "*A B T"]
    prompt_stop: Int[Any, "*A B T"]
    own_start: Int[Any, "*A B T"]


class KeyIntervals(NamedTuple):
    """Query t sees key s when `start[t] <= s < stop[t]`; that always includes t itself, also for padding.

    On a device that has a part of a row's queries, T is the length of that part; keys are counted over the whole row.
    """

    start: Int[Array, "B T"]
    stop: Int[Array, "B T"]


def to_intervals(spans: KeySpans) -> tuple[Int[Array, "B T"], KeyIntervals]:
    """(new place of every token, what the queries of the new row see).

    The places are a permutation of each row: `place_tokens(x, places)` writes a row anew, and
    `jnp.take_along_axis(y, places, axis=1)` reads results in the old order. Empty prompts and sides are allowed.
    """
    first, last, own = spans
    length = own.shape[1]
    at = jnp.broadcast_to(jnp.arange(length, dtype=own.dtype), own.shape)
    # Where the segment of token t ends: the next place where `own_start` changes.
    changes = jnp.pad(own[:, 1:] != own[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    segment_stop = jax.lax.cummin(jnp.where(changes, at + 1, length), axis=1, reverse=True)

    # The chosen side stands right after the prompt, unless it is empty and the next pair or padding stands there.
    after = jnp.minimum(last, length - 1)
    there, there_first, there_own = (jnp.take_along_axis(x, after, axis=1) for x in (segment_stop, first, own))
    chosen_stop = jnp.where((last < length) & (there_first == first) & (there_own == last), there, last)

    prompt, chosen = at < last, (at >= last) & (own == last)
    new_first, new_last = first + chosen_stop - last, chosen_stop
    new = jnp.where(chosen, first + chosen_stop - 1 - at, jnp.where(prompt, at + chosen_stop - last, at))
    intervals = KeyIntervals(jnp.where(chosen, new, new_first), jnp.where(chosen, new_last, new + 1))
    return new, KeyIntervals(*(place_tokens(bound, new) for bound in intervals))


def place_tokens(values: Int[Array, "B T"], places: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Rows written anew: the value of token t stands at `places[t]`."""
    return jax.vmap(lambda row, to: jnp.zeros_like(row).at[to].set(row, unique_indices=True))(values, places)


def find_overlap(intervals: KeyIntervals, query_block: int, key_block: int, key_length: int) -> Bool[Array, "B I J"]:
    """Whether some query of block i sees some key of block j, for rows of `key_length` keys and T of their queries.

    Every query sees itself, so what a block of queries sees is one interval: from its first start to its last stop.
    """
    batch = len(intervals.start)
    first = intervals.start.reshape(batch, -1, query_block).min(axis=2)[:, :, None]
    last = intervals.stop.reshape(batch, -1, query_block).max(axis=2)[:, :, None]
    keys = jnp.arange(0, key_length, key_block)
    return (first < keys + key_block) & (last > keys)


def check_row_length(length: int, name: str, limit: int | None = None) -> None:
    """Raises `ConfigError` when the kernel of back end `name` cannot take rows of `length` tokens."""
    if length % LANES:
        raise ConfigError(
            f"attention back end {name!r}: rows of {length} tokens; the kernel takes multiples of {LANES}. "
            "Set the row lengths to such, or attention: xla."
        )
    if limit is not None and length > limit:
        raise ConfigError(
            f"attention back end {name!r}: rows of {length} tokens; the kernel takes at most {limit}. "
            "Choose shorter rows, or attention: xla."
        )
