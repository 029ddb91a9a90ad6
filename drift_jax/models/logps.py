"""Token log-probabilities from hidden states, without the logits of all positions in memory at once.

Every loss, reward and metric reads this one function: a second, "fast" implementation would drift from it.

The logits of a chunk of tokens are made, reduced to two numbers a token, and forgotten; the backward pass makes them
again. In both passes each device holds a slice of the vocabulary and sees the tokens of all devices that share the
rest (rows are split like dim "rows", the table like "vocab_slice"): what travels is hidden states, not the table and
its gradient, which with 152k tokens of vocabulary are larger than the tokens of an update.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drift_jax.sharding import constrain, split_ways

# Logits of a chunk on one device, in float32. Smaller chunks leave matrices too thin, larger ones only take memory.
_CHUNK_BYTES = 128 * 2**20
_SMALLEST_CHUNK = 32


def token_logps(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "V D"],
    sources: Int[Array, "R C"],
    targets: Int[Array, "R C"],
    listed: Int[Array, ""],
    head_grads: Float[Array, "V D"] | None = None,
    chunk: int | None = None,
) -> Float[Array, "R C"]:
    """log p(targets[r, c] | hidden[r, sources[r, c]]) in float32 for c < listed; 0 beyond the last chunk begun.

    The matmul runs in the dtype of `hidden` and accumulates in float32; log-softmax is float32. Nothing is computed
    for the chunks beyond `listed`, the longest list of a row.

    Args:
      head_grads: None, or gradients of `head` so far, to which its gradient goes (see models/stack.py).
      chunk: tokens per row whose logits live at the same time; by default by their size.
    """
    rows, _, dim = hidden.shape
    length = sources.shape[1]
    chunk = min(chunk or _chunk_length(rows, head.shape[0]), length)
    padding = -length % chunk
    sources, targets = (jnp.pad(x, ((0, 0), (0, padding))) for x in (sources, targets))
    states = constrain(jnp.take_along_axis(hidden, sources[..., None], axis=1), "batch", "length", None)
    chunks = -(-listed // chunk)
    shape = (rows, sources.shape[1] // chunk, chunk)
    states, targets = states.reshape(*shape, dim), targets.reshape(shape)
    return _chunked(states, head, head_grads, targets, chunks).reshape(rows, -1)[:, :length]


def _chunk_length(rows: int, vocab: int) -> int:
    """The largest power of two whose logits stay within `_CHUNK_BYTES` on each device."""
    per_token = 4 * rows * vocab // (split_ways("rows") * split_ways("vocab_slice"))
    fitting = max(_SMALLEST_CHUNK, _CHUNK_BYTES // max(1, per_token))
    return 1 << (fitting.bit_length() - 1)


def _split(vocab: int) -> tuple[str, str]:
    """How rows and vocabulary are split; a vocabulary that cannot be cut so finely keeps to its usual split."""
    return ("rows", "vocab_slice") if vocab % split_ways("vocab_slice") == 0 else ("batch", "vocab")


def _table(head: Float[Array, "V D"], dtype: Any) -> Float[Array, "V D"]:
    return constrain(head.astype(dtype), _split(head.shape[0])[1], None)


def _logits(states: Float[Array, "R C D"], table: Float[Array, "V D"]) -> Float[Array, "R C V"]:
    rows, vocab = _split(table.shape[0])
    logits = jnp.einsum(
        "rcd,vd->rcv", constrain(states, rows, "length", None), table, preferred_element_type=jnp.float32
    )
    return constrain(logits, rows, "length", vocab)


@jax.custom_vjp
def _chunked(
    states: Float[Array, "R K C D"],
    head: Float[Array, "V D"],
    head_grads: Float[Array, "V D"] | None,
    targets: Int[Array, "R K C"],
    chunks: Int[Array, ""],
) -> Float[Array, "R K C"]:
    """Log-probs of K chunks of C tokens, of which the first `chunks` are computed."""
    return _forward(states, head, head_grads, targets, chunks)[0]


def _forward(states: Array, head: Array, head_grads: Any, targets: Array, chunks: Array) -> tuple[Array, Any]:
    table = _table(head, states.dtype)
    vocab = jnp.arange(head.shape[0])

    def one(k: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = _logits(states[:, k], table)
        norm = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum instead of a gather: it stays local to the devices that hold a slice of the vocabulary.
        target_logit = jnp.sum(jnp.where(vocab == targets[:, k, :, None], logits, 0.0), axis=-1)
        logps, norms = found
        return logps.at[:, k].set(target_logit - norm), norms.at[:, k].set(norm)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    logps, norms = jax.lax.fori_loop(0, chunks, one, (zeros, zeros))
    return logps, (states, head, head_grads, targets, chunks, norms)


def _backward(kept: Any, grads: Float[Array, "R K C"]) -> tuple[Array | None, ...]:
    states, head, head_grads, targets, chunks, norms = kept
    table = _table(head, states.dtype)
    rows, vocab_dim = _split(head.shape[0])
    vocab = jnp.arange(head.shape[0])

    def one(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_states, d_head = carry
        softmax = jnp.exp(_logits(states[:, k], table) - norms[:, k, :, None])
        d_logits = grads[:, k, :, None] * ((vocab == targets[:, k, :, None]) - softmax)
        d_logits = constrain(d_logits.astype(states.dtype), rows, "length", vocab_dim)
        d_k = jnp.einsum("rcv,vd->rcd", d_logits, table, preferred_element_type=jnp.float32)
        d_k = constrain(d_k, "batch", "length", None).astype(states.dtype)
        more = jnp.einsum("rcv,rcd->vd", d_logits, states[:, k], preferred_element_type=jnp.float32)
        return d_states.at[:, k].set(d_k), constrain(d_head + more, vocab_dim, None)

    # Chunks add up in float32, also where gradients are kept in bfloat16.
    start = head if head_grads is None else head_grads
    start = start.astype(jnp.promote_types(start.dtype, jnp.float32))
    start = constrain(jnp.zeros_like(start) if head_grads is None else start, vocab_dim, None)
    d_states, d_head = jax.lax.fori_loop(0, chunks, one, (jnp.zeros_like(states), start))
    d_head = constrain(d_head, "vocab", "embed")
    if head_grads is None:
        return d_states, d_head.astype(head.dtype), None, None, None
    return d_states, None, d_head.astype(head_grads.dtype), None, None


_chunked.defvjp(_forward, _backward)
