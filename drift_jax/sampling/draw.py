"""Drawing one token per row on the device: temperature, top-k, top-p, and a key that knows only its own row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32


def row_words(requests: Iterable[tuple[str, int]]) -> UInt32[np.ndarray, "B 2"]:
    """(row id, sample index) -> two words to fold into a key; the same on every machine and in every batch."""
    digests = [hashlib.sha256(f"{sample}:{row_id}".encode()).digest() for row_id, sample in requests]
    return np.array([np.frombuffer(digest[:8], "<u4") for digest in digests], np.uint32).reshape(-1, 2)


def row_keys(seed: int, words: UInt32[Array, "B 2"]) -> Key[Array, "B"]:
    """A key per row from (seed, row id, sample)."""

    def one(pair: UInt32[Array, "2"]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), pair[0]), pair[1])

    return jax.vmap(one)(words)


def keep_mask(probabilities: Float[Array, "B V"], top_k: int, top_p: float) -> Bool[Array, "B V"]:
    """Which tokens may be drawn: the top_k most likely (0: all), of these the smallest set that holds top_p.

    Tokens as likely as the last one kept are kept as well. As in transformers, top-p looks at the probabilities
    renormalised after top-k.
    """
    keep = jnp.ones(probabilities.shape, bool)
    if top_k:
        keep &= probabilities >= _largest_threshold(probabilities, lambda above: above.sum(-1), float(top_k))
    if top_p < 1.0:
        kept = jnp.where(keep, probabilities, 0.0)
        total = kept.sum(-1)
        # 1 - 1e-6: rounding of the sum must not ask for more than there is.
        target = jnp.minimum(top_p, 1 - 1e-6) * total
        keep &= probabilities >= _largest_threshold(
            probabilities, lambda above: jnp.where(above, kept, 0.0).sum(-1), target
        )
    return keep


def _largest_threshold(
    values: Float[Array, "B V"],
    measure: Callable[[Bool[Array, "B V"]], Array],
    target: float | Float[Array, "B"],
) -> Float[Array, "B 1"]:
    """The largest t per row with measure(values >= t) >= target, for values >= 0 in float32.

    Found bit by bit: non-negative floats are ordered like their bit patterns, so 31 passes over the row are exact
    and cost less than sorting a vocabulary.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)

    def one_bit(i: Int[Array, ""], found: Int[Array, "B"]) -> Int[Array, "B"]:
        candidate = found | (1 << (30 - i))
        return jnp.where(measure(bits >= candidate[:, None]) >= target, candidate, found)

    found = jax.lax.fori_loop(0, 31, one_bit, jnp.zeros(values.shape[0], jnp.int32))
    return jax.lax.bitcast_convert_type(found, jnp.float32)[:, None]


def draw_tokens(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    temperature: float,
    top_k: int,
    top_p: float,
) -> Int[Array, "B"]:
    """One token per row; each row's noise comes from its own key."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    keep = keep_mask(jax.nn.softmax(logits, axis=-1), top_k, top_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(jnp.where(keep, logits + noise, -jnp.inf), axis=-1).astype(jnp.int32)
