"""Attention behind one function, so that a faster back end changes nothing around it."""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Float


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B #T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, scaled by H**-0.5, softmax in float32.

    Without a mask it is causal (T == S, positions in order); a right-padded row needs no mask then, because its
    padding comes after every real query. With a mask, True means "may look at".
    """
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=None if mask is None else mask[:, None],
        is_causal=mask is None,
        implementation="xla",
    )
