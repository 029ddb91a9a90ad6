"""A stack of equal layers with a hand-written backward pass, and parameters whose gradients add up in place.

Gradient accumulation by `jax.grad` holds two sets of gradients: the sum so far, and the one being added. Here the
backward pass is given the sum and adds each layer's gradient to its place in it. A function of this file that takes
`grads` therefore sends the gradient of its parameters there: the cotangent of `grads` is, by design, `grads` plus the
gradient of the parameters, in the dtype of `grads`, and that of the parameters themselves is zero. Differentiate with
respect to `grads` then. Without `grads` (None) the parameters have their ordinary gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drift_jax.models.remat import keep_named
from drift_jax.sharding import constrain

# (weights of one layer, x, context) -> x
Layer = Callable[[Any, Float[Array, "B T D"], Any], Float[Array, "B T D"]]


class Remat(NamedTuple):
    """What a layer's forward pass keeps, and how its backward pass goes on from that."""

    keep: Callable[[Layer, Any, Array, Any], tuple[Array, Any]]  # (layer, weights, x, context) -> (x, kept)
    back: Callable[[Layer, Any, Any, Any, Array], tuple[Any, Array]]  # (layer, weights, kept, context, dx) -> (dw, dx)


def _keep_input(layer: Layer, weights: Any, x: Array, context: Any) -> tuple[Array, Any]:
    return layer(weights, x, context), x


def _run_again(layer: Layer, weights: Any, kept: Any, context: Any, grad: Array) -> tuple[Any, Array]:
    return jax.vjp(lambda w, x: layer(w, x, context), weights, kept)[1](grad)


def _keep_input_on_host(layer: Layer, weights: Any, x: Array, context: Any) -> tuple[Array, Any]:
    return layer(weights, x, context), jax.device_put(x, jax.memory.Space.Host)


def _run_again_from_host(layer: Layer, weights: Any, kept: Any, context: Any, grad: Array) -> tuple[Any, Array]:
    return _run_again(layer, weights, jax.device_put(kept, jax.memory.Space.Device), context, grad)


def _keep_by(saved: Callable[..., Any], layer: Layer, weights: Any, x: Array, context: Any) -> tuple[Array, Any]:
    """Keeps what `jax.vjp` keeps of `saved(layer)`, but for weights and context: the backward pass has them anyway."""
    out, pull = jax.vjp(saved(lambda w, x: layer(w, x, context)), weights, x)
    leaves, structure = jax.tree.flatten(pull)
    own = jax.tree.leaves((weights, context))
    places = tuple(next((i for i, w in enumerate(own) if w is leaf), None) for leaf in leaves)
    kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
    return out, jax.tree_util.Partial(partial(_pull_back, structure, places), kept)


def _pull_back(
    structure: Any, places: tuple[int | None, ...], kept: list[Array], weights: Any, context: Any, grad: Array
) -> Any:
    rest, own = iter(kept), jax.tree.leaves((weights, context))
    leaves = [next(rest) if place is None else own[place] for place in places]
    return jax.tree.unflatten(structure, leaves)(grad)


def _go_on(layer: Layer, weights: Any, kept: Any, context: Any, grad: Array) -> tuple[Any, Array]:
    return kept(weights, context, grad)


REMAT: dict[str, Remat] = {
    "none": Remat(partial(_keep_by, lambda layer: layer), _go_on),
    "dots": Remat(partial(_keep_by, partial(jax.checkpoint, policy=keep_named)), _go_on),
    "layer": Remat(_keep_input, _run_again),
    "offload": Remat(_keep_input_on_host, _run_again_from_host),
}


def resolve_scan(scan_layers: bool | None, remat: str, platform: str, devices: int) -> bool:
    """What `model.scan_layers` means on so many devices of `platform` (`jax.Device.platform`).

    On a GPU the copies into and out of a scan's stack take a tenth of a step that keeps products (DESIGN.md). Without a
    scan the compiler also keeps weights in the dtype of the matmuls from the forward to the backward pass: 2 bytes a
    parameter on one device, but what was gathered on several, so these scan.
    """
    if scan_layers is not None:
        return scan_layers
    return not (platform == "gpu" and devices == 1 and remat in ("none", "dots"))


def apply_layers(
    layer: Layer,
    remat: str,
    weights: Any,
    grads: Any,
    x: Float[Array, "B T D"],
    context: Any,
    scan: bool = True,
) -> Float[Array, "B T D"]:
    """x through all layers.

    Args:
      remat: a key of `REMAT`.
      weights: pytree of the layers' parameters, stacked along dim 0.
      grads: None, or gradients of `weights` so far; see the head of this file.
      context: what every layer reads besides (positions, spans); it has no gradient.
      scan: one layer's program for all of them; False: with a backward pass, a program that grows with depth.
    """
    return jnp.asarray(_apply(layer, remat, _scan if scan else _unroll, weights, grads, x, context))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _apply(
    layer: Layer, remat: str, loop: _Loop, weights: Any, grads: Any, x: Float[Array, "B T D"], context: Any
) -> Float[Array, "B T D"]:
    def one(x: Array, xs: _OfLayer) -> tuple[Array, None]:
        return layer(_cast(xs.weights, xs.index, x.dtype), x, context), None

    # Without a backward pass nothing is kept, and a scan costs nothing.
    return _scan(one, x, weights, None)[0]


def _apply_forward(
    layer: Layer, remat: str, loop: _Loop, weights: Any, grads: Any, x: Array, context: Any
) -> tuple[Array, Any]:
    def one(x: Array, xs: _OfLayer) -> tuple[Array, Any]:
        return REMAT[remat].keep(layer, _cast(xs.weights, xs.index, x.dtype), x, context)

    x, kept = loop(one, x, weights, None)
    return x, (weights, grads, kept, context)


def _apply_backward(layer: Layer, remat: str, loop: _Loop, residuals: Any, grad: Array) -> tuple[Any, ...]:
    weights, grads, kept, context = residuals

    def one(carry: tuple[Array, Any], xs: _OfLayer) -> tuple[tuple[Array, Any], Any]:
        grad, total = carry
        dw, grad = REMAT[remat].back(layer, _cast(xs.weights, xs.index, grad.dtype), xs.kept, context, grad)
        if total is None:
            return (grad, None), jax.tree.map(lambda more, w: more.astype(w.dtype), dw, xs.weights)
        return (grad, jax.tree.map(partial(_add_at, xs.index), total, dw)), None

    (grad, total), own = loop(one, (grad, grads), weights, kept, reverse=True)
    if isinstance(own, list):
        own = jax.tree.map(lambda *layers: jnp.stack(layers), *own)
    return own, total, grad, None


class _OfLayer(NamedTuple):
    """What a loop hands to each layer."""

    weights: Any
    kept: Any
    index: Int[Array, ""] | int


# (function, carry, weights, kept) -> (carry, results): of every layer, stacked or as a list, as `kept` is again.
_Loop = Callable[..., tuple[Any, Any]]


def _scan(function: Callable[..., Any], carry: Any, weights: Any, kept: Any, reverse: bool = False) -> tuple[Any, Any]:
    indices = jnp.arange(_count(weights))
    return jax.lax.scan(function, carry, _OfLayer(weights, kept, indices), reverse=reverse)


def _unroll(
    function: Callable[..., Any], carry: Any, weights: Any, kept: Any, reverse: bool = False
) -> tuple[Any, Any]:
    """What is kept stays where it was made: a scan copies it into a stack, and out of it again."""
    results: list[Any] = [None] * _count(weights)
    for i in sorted(range(len(results)), reverse=reverse):
        of_layer = jax.tree.map(lambda w, i=i: w[i], weights)
        # The barrier: in one program with the forward pass, what is to be made again would be shared with it instead.
        mine = None if kept is None else jax.lax.optimization_barrier(kept[i])
        carry, results[i] = function(carry, _OfLayer(of_layer, mine, i))
    return carry, results


def _count(weights: Any) -> int:
    return jax.tree.leaves(weights)[0].shape[0]


def _cast(weights: Any, index: Array | int, dtype: Any) -> Any:
    """One layer's weights in the dtype of the activations.

    In a scan the factor is 1 at every index, which the compiler does not know: else it would cast the weights of all
    layers ahead of the loop and hold a second copy of them (it looks through `optimization_barrier`). Unrolled, it
    does hold one.
    """
    one = 1 + jnp.float32(index) * 1e-30
    return jax.tree.map(lambda w: w if w.dtype == dtype else (w * one).astype(dtype), weights)


def _add_at(index: Array | int, total: Array, more: Array) -> Array:
    """total[index] += more, added in float32 or wider.

    Written as what XLA's GPU compiler makes one kernel of, which reads and writes that layer's slice alone: with an
    index that it knows, its kernel goes through the slices of all layers; with a slice of another rank, it copies it.
    """
    if isinstance(index, int):
        index = jax.lax.optimization_barrier(jnp.uint32(index))
    so_far = jax.lax.dynamic_slice_in_dim(total, index, 1)
    return jax.lax.dynamic_update_slice_in_dim(total, _add(so_far, more[None]), index, 0)


def _add(total: Array, more: Array) -> Array:
    wide = jnp.promote_types(total.dtype, jnp.float32)
    return (total.astype(wide) + more.astype(wide)).astype(total.dtype)


_apply.defvjp(_apply_forward, _apply_backward)


@jax.custom_vjp
def track(weight: Array, grads: Array | None) -> Array:
    """The weight; its gradient goes to `grads`, if there are any."""
    return weight


def _track_backward(grads: Array | None, grad: Array) -> tuple[Array | None, Array | None]:
    return (grad, None) if grads is None else (None, _add(grads, grad))


track.defvjp(lambda weight, grads: (weight, grads), _track_backward)


@jax.custom_vjp
def from_zero(grads: Array) -> Array:
    """Zeros whose cotangent goes to `grads`: for the second use of a parameter, the first of which adds the sum."""
    return jnp.zeros_like(grads)


from_zero.defvjp(lambda grads: (jnp.zeros_like(grads), None), lambda _, grad: (grad,))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(
    dtype: Any, table: Float[Array, "V D"], grads: Float[Array, "V D"] | None, ids: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Rows of a table in `dtype`.

    Each device looks up its slice of D for the tokens of all devices that share the table, and only then are the rows
    split: what travels is activations, not the table and its gradient.
    """
    found = constrain(table.astype(dtype)[ids], "rows", None, "embed")
    # In two steps, each of which the compiler can do by exchanging parts: first rows, then tokens.
    found = constrain(found, "batch", None, "embed_of_batch")
    return constrain(found, "batch", "length", "hidden")


def _look_up_backward(dtype: Any, kept: Any, grad: Array) -> tuple[Array | None, ...]:
    table, grads, ids = kept
    grad = constrain(grad, "batch", None, "embed_of_batch")
    grad = constrain(grad, "rows", None, "embed")
    start = jnp.zeros_like(table) if grads is None else grads.astype(jnp.promote_types(grads.dtype, jnp.float32))
    total = constrain(start.at[ids].add(grad.astype(start.dtype)), "vocab", "embed")
    return (total, None, None) if grads is None else (None, total.astype(grads.dtype), None)


def _look_up_forward(dtype: Any, table: Array, grads: Array | None, ids: Array) -> tuple[Array, Any]:
    return look_up(dtype, table, grads, ids), (table, grads, ids)


look_up.defvjp(_look_up_forward, _look_up_backward)
