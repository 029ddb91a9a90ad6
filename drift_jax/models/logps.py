"""Token log-probabilities from hidden states, without the logits of all positions in memory at once.

Every loss, reward and metric reads this one function: a second, "fast" implementation would drift from it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drift_jax.sharding import constrain

# Positions whose logits live at the same time. 64 positions of 16 sequences over 152k tokens are 0.6 GB in fp32.
CHUNK = 64


def token_logps(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "R T"],
    chunk: int = CHUNK,
) -> Float[Array, "R T"]:
    """log p(targets[r, t] | hidden[r, t]) in float32, for R sequences.

    The matmul runs in the dtype of `hidden` and accumulates in float32; log-softmax is float32. Logits are
    made for `chunk` positions at a time and made again in the backward pass.
    """
    rows, length, _ = hidden.shape
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    padding = chunks * chunk - length
    # Chunks run over positions, not over flattened tokens: the sequence dim stays split over the mesh as it is.
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    head = head.astype(hidden.dtype)

    @jax.checkpoint
    def one_chunk(start: Array) -> Float[Array, "R C"]:
        h = jax.lax.dynamic_slice_in_dim(hidden, start, chunk, axis=1)
        t = jax.lax.dynamic_slice_in_dim(targets, start, chunk, axis=1)
        return _chunk_logps(h, head, t)

    logps = jax.lax.map(one_chunk, jnp.arange(chunks) * chunk)
    return logps.transpose(1, 0, 2).reshape(rows, chunks * chunk)[:, :length]


def _chunk_logps(
    hidden: Float[Array, "R C D"], head: Float[Array, "V D"], targets: Int[Array, "R C"]
) -> Float[Array, "R C"]:
    logits = jnp.einsum("rcd,vd->rcv", hidden, head, preferred_element_type=jnp.float32)
    logits = constrain(logits, "batch", "length", "vocab")
    # A masked sum instead of a gather: it stays local to the devices that hold a slice of the vocabulary.
    chosen = jnp.arange(head.shape[0]) == targets[..., None]
    target_logit = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return target_logit - jax.nn.logsumexp(logits, axis=-1)
