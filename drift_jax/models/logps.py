"""Token log-probabilities from hidden states, without the logits of all positions in memory at once.

Every loss, reward and metric reads this one function: a second, "fast" implementation would drift from it.

The logits of some tokens and a block of the vocabulary are made, reduced to numbers per token, and forgotten; the
backward pass makes them again. In both passes each device holds a slice of the vocabulary and sees the tokens of all
devices that share the rest (rows are split like dim "rows", the table like "vocab_slice"): what travels is hidden
states, not the table and its gradient, which with 152k tokens of vocabulary are larger than the tokens of an update.
A vocabulary that the devices do not divide is filled up with words that do not count.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from drift_jax.sharding import constrain, split_ways

_SMALLEST_CHUNK = 32
_MASKED = -1e30


class Tile(NamedTuple):
    """The logits that live at the same time."""

    tokens: int  # of each group of rows
    words: int  # of the vocabulary, over all devices


# Logits on one device. A CPU is fastest where they stay in its cache. An accelerator wants large matrices, and many
# tokens for each time that it reads and writes the gradient of the table: 128 MiB of them in float32. A GPU also waits
# some 70 us for the host at each turn of a loop whose length is known at run time only: 512 MiB.
_TILES = {"cpu": Tile(256, 4096), "gpu": Tile(2048, 65536)}
_LARGE_TILE = Tile(1024, 32768)
_WORD_MULTIPLE = 128


def choose_tile(platform: str, groups: int, vocab: int) -> Tile:
    """For devices of `platform` (`jax.Device.platform`), the mesh in force and groups of rows over all of it.

    A vocabulary that is split over devices is not cut further: a tile is the slice of each, and more or fewer tokens.
    """
    each = _TILES.get(platform, _LARGE_TILE)
    ways = split_ways("vocab_slice")
    blocks = 1 if ways > 1 else -(-vocab // each.words)
    # Blocks of one size, since the last one reaches back into the one before it.
    words = vocab if blocks == 1 else -(-vocab // blocks // _WORD_MULTIPLE) * _WORD_MULTIPLE
    per_token = groups * words // (split_ways("rows") * ways)
    fitting = max(_SMALLEST_CHUNK, each.tokens * each.words // max(1, per_token))
    return Tile(1 << (fitting.bit_length() - 1), words)


def token_logps(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "V D"],
    sources: Int[Array, "G C"],
    targets: Int[Array, "G C"],
    listed: Int[Array, ""],
    head_grads: Float[Array, "V D"] | None = None,
    tile: Tile | None = None,
) -> Float[Array, "G C"]:
    """log p(targets[g, c] | state) in float32 for c < listed; 0 beyond the last chunk begun.

    The state is number sources[g, c] of group g: R // G rows, one after the other. The matmul runs in the dtype of
    `hidden` and accumulates in float32; log-softmax is float32. Nothing is computed for the chunks beyond `listed`,
    the longest list of a group.

    Args:
      head_grads: None, or gradients of `head` so far, to which its gradient goes (see models/stack.py).
      tile: by default that of a TPU.
    """
    dim, (groups, length) = hidden.shape[2], sources.shape
    tile = tile or choose_tile("", groups, head.shape[0])
    chunk, block = min(tile.tokens, length), min(tile.words, head.shape[0])
    if block == head.shape[0]:
        block += _missing_words(block)
    padding = -length % chunk
    sources, targets = (jnp.pad(x, ((0, 0), (0, padding))) for x in (sources, targets))
    hidden = constrain(hidden, "batch", None, None).reshape(groups, -1, dim)
    states = constrain(jnp.take_along_axis(hidden, sources[..., None], axis=1), "batch", None, None)
    chunks = -(-listed // chunk)
    shape = (groups, sources.shape[1] // chunk, chunk)
    states, targets = states.reshape(*shape, dim), targets.reshape(shape)
    logps = jnp.asarray(_chunked(block, states, head, head_grads, targets, chunks))
    return logps.reshape(groups, -1)[:, :length]


def _missing_words(vocab: int) -> int:
    """How many words a table lacks that the mesh in force can cut evenly."""
    return -vocab % split_ways("vocab_slice")


def _table(head: Float[Array, "V D"]) -> Float[Array, "W D"]:
    """The table as it meets tokens: filled up with zeros, and split over all devices that share the tokens."""
    return constrain(jnp.pad(head, ((0, _missing_words(head.shape[0])), (0, 0))), "vocab_slice", None)


def _logits(states: Float[Array, "G C D"], table: Float[Array, "W D"]) -> Float[Array, "G C W"]:
    logits = jnp.einsum("rcd,vd->rcv", constrain(states, "rows", None, None), table, preferred_element_type=jnp.float32)
    return constrain(logits, "rows", None, "vocab_slice")


class _Block(NamedTuple):
    """A part of the vocabulary: its table, its ids, and which of them no earlier block had."""

    start: Int[Array, ""]
    table: Float[Array, "W D"]
    ids: Int[Array, " W"]
    new: Any  # bool [W]; True: all of them


def _take_block(table: Float[Array, "V D"], vocab: int, index: Int[Array, ""], size: int) -> _Block:
    """Block `index`; the last one reaches back to be as long as the others. A single block is never sliced.

    Args:
      vocab: words of the model; the table may have more, to fill it up.
    """
    words = table.shape[0]
    if size == words:
        ids = jnp.arange(words)
        return _Block(jnp.int32(0), table, ids, True if words == vocab else ids < vocab)
    start = jnp.minimum(index * size, words - size)
    ids = start + jnp.arange(size)
    new = (ids >= index * size) & (ids < vocab)
    return _Block(start, jax.lax.dynamic_slice_in_dim(table, start, size), ids, new)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    block: int,
    states: Float[Array, "G K C D"],
    head: Float[Array, "V D"],
    head_grads: Float[Array, "V D"] | None,
    targets: Int[Array, "G K C"],
    chunks: Int[Array, ""],
) -> Float[Array, "G K C"]:
    """Log-probs of K chunks of C tokens, of which the first `chunks` are computed, by blocks of the vocabulary."""
    return _forward(block, states, head, head_grads, targets, chunks)[0]


class _Sums(NamedTuple):
    """Of each token so far: the largest logit, the sum of exp(logit - largest), the logit of its target."""

    largest: Float[Array, "G *K C"]
    total: Float[Array, "G *K C"]
    target: Float[Array, "G *K C"]


def _sum_up(so_far: _Sums, logits: Float[Array, "G C W"], new: Any, mine: Bool[Array, "G C W"]) -> _Sums:
    """The sums with a further block of logits, of which only the `new` ones count; `mine`: that of the target."""

    def in_passes(so_far: _Sums, logits: Array, new: Any, mine: Array) -> _Sums:
        masked = jnp.where(new, logits, _MASKED)
        largest = jnp.maximum(so_far.largest, masked.max(axis=-1))
        total = so_far.total * jnp.exp(so_far.largest - largest)
        total = total + jnp.sum(jnp.exp(masked - largest[..., None]), axis=-1)
        # A masked sum instead of a gather: it stays local to the devices that hold a slice of the vocabulary.
        return _Sums(largest, total, so_far.target + jnp.sum(jnp.where(mine, logits, 0.0), axis=-1))

    # A GPU reads the logits from memory for every pass.
    return jax.lax.platform_dependent(so_far, logits, new, mine, cuda=sum_up_at_once, default=in_passes)


def sum_up_at_once(so_far: _Sums, logits: Float[Array, "G C W"], new: Any, mine: Bool[Array, "G C W"]) -> _Sums:
    """`_sum_up` in one pass over the logits, with the running softmax of Milakov and Gimelshein (arXiv 1805.02867)."""

    def add(a: _Sums, b: _Sums) -> _Sums:
        largest = jnp.maximum(a.largest, b.largest)
        total = a.total * jnp.exp(a.largest - largest) + b.total * jnp.exp(b.largest - largest)
        return _Sums(largest, total, a.target + b.target)

    each = _Sums(
        jnp.where(new, logits, _MASKED),
        jnp.broadcast_to(jnp.asarray(new), logits.shape).astype(jnp.float32),
        jnp.where(mine, logits, 0.0),
    )
    nothing = _Sums(*(jnp.float32(x) for x in (_MASKED, 0.0, 0.0)))
    block = jax.lax.reduce(each, nothing, lambda a, b: add(_Sums(*a), _Sums(*b)), (logits.ndim - 1,))
    return add(so_far, _Sums(*block))


def _forward(
    block: int, states: Array, head: Array, head_grads: Any, targets: Array, chunks: Array
) -> tuple[Array, Any]:
    table = _table(head.astype(states.dtype))

    def one_block(index: Array, sums: _Sums) -> _Sums:
        part = _take_block(table, head.shape[0], index, block)

        def one(k: Array, sums: _Sums) -> _Sums:
            so_far = _Sums(*(x[:, k] for x in sums))
            mine = part.new & (part.ids == targets[:, k, :, None])
            more = _sum_up(so_far, _logits(states[:, k], part.table), part.new, mine)
            return jax.tree.map(lambda x, row: x.at[:, k].set(row), sums, more)

        return jax.lax.fori_loop(0, chunks, one, sums)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    sums = jax.lax.fori_loop(0, -(-table.shape[0] // block), one_block, _Sums(zeros + _MASKED, zeros, zeros))
    done = (jnp.arange(targets.shape[1]) < chunks)[:, None]
    norms = jnp.where(done, sums.largest + jnp.log(jnp.where(done, sums.total, 1.0)), 0.0)
    return sums.target - norms, (states, head, head_grads, targets, chunks, norms)


def _backward(block: int, kept: Any, grads: Float[Array, "G K C"]) -> tuple[Array | None, ...]:
    states, head, head_grads, targets, chunks, norms = kept
    table = _table(head.astype(states.dtype))
    blocks = -(-table.shape[0] // block)

    def one_block(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        part = _take_block(table, head.shape[0], index, block)
        whole = carry[1]

        def one(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            d_states, d_part = carry
            softmax = jnp.exp(_logits(states[:, k], part.table) - norms[:, k, :, None])
            d_logits = grads[:, k, :, None] * ((part.ids == targets[:, k, :, None]) - softmax)
            d_logits = jnp.where(part.new, d_logits, 0.0).astype(states.dtype)
            d_logits = constrain(d_logits, "rows", None, "vocab_slice")
            d_k = jnp.einsum("rcv,vd->rcd", d_logits, part.table, preferred_element_type=jnp.float32)
            d_k = constrain(d_k, "batch", None, None).astype(d_states.dtype)
            more = jnp.einsum("rcv,rcd->vd", d_logits, states[:, k], preferred_element_type=jnp.float32)
            return d_states.at[:, k].add(d_k), constrain(d_part + more, "vocab_slice", None)

        if blocks == 1:
            return jax.lax.fori_loop(0, chunks, one, carry)
        d_part = jax.lax.dynamic_slice_in_dim(whole, part.start, block)
        d_states, d_part = jax.lax.fori_loop(0, chunks, one, (carry[0], d_part))
        return d_states, jax.lax.dynamic_update_slice_in_dim(whole, d_part, part.start, 0)

    # Chunks add up in float32, also where gradients are kept in bfloat16; so do blocks, if there are several.
    start = head if head_grads is None else head_grads
    start = start.astype(jnp.promote_types(start.dtype, jnp.float32))
    start = _table(jnp.zeros_like(start) if head_grads is None else start)
    d_states = jnp.zeros(states.shape, states.dtype if blocks == 1 else jnp.float32)
    d_states, d_head = jax.lax.fori_loop(0, blocks, one_block, (d_states, start))
    d_head, d_states = constrain(d_head[: head.shape[0]], "vocab", "embed"), d_states.astype(states.dtype)
    if head_grads is None:
        return d_states, d_head.astype(head.dtype), None, None, None
    return d_states, None, d_head.astype(head_grads.dtype), None, None


_chunked.defvjp(_forward, _backward)
