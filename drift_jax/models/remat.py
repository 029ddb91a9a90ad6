"""What lies between the forward and the backward pass of a layer: names for it, and functions that keep it.

`jax.checkpoint` cannot look into a `custom_vjp`: what its forward rule keeps is always made again. So whatever is to
be kept has a name outside of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

# Of what has this name a backward pass makes nothing again under `remat: dots`.
_KEPT = "kept"
keep_named = jax.checkpoint_policies.save_only_these_names(_KEPT)


def keep(x: Array) -> Array:
    """x, named as something that costs more to make again than to keep."""
    return checkpoint_name(x, _KEPT)


def attach_backward(
    forward: Callable[..., tuple[Array, Array]],
    backward: Callable[..., tuple[Array, ...]],
    inputs: tuple[Array, ...],
    context: Any,
) -> Float[Array, "..."]:
    """The first result of `forward(*inputs, context)`, differentiated by `backward`.

    Both results are kept by name, for `backward(*inputs, context, *results, grad)`, which gives the gradients of the
    inputs. `context` has none.
    """
    results = forward(*(jax.lax.stop_gradient(x) for x in inputs), context)
    return _attached(backward, inputs, context, tuple(map(keep, results)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attached(backward: Callable[..., tuple[Array, ...]], inputs: Any, context: Any, results: Any) -> Array:
    return results[0]


def _attached_forward(backward: Any, inputs: Any, context: Any, results: Any) -> tuple[Array, Any]:
    return results[0], (inputs, context, results)


def _attached_backward(backward: Any, kept: Any, grad: Array) -> tuple[Any, ...]:
    inputs, context, results = kept
    return backward(*inputs, context, *results, grad), None, None


_attached.defvjp(_attached_forward, _attached_backward)
