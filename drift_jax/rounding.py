"""bfloat16 weights and moments that learn: each new value is rounded up or down by chance, and is right on average.

Around |w| = 0.02 neighbouring bfloat16 values are 1.2e-4 apart. Rounding to nearest drops every update below half
of that; rounding up with the probability "distance from the lower neighbour / spacing" keeps each one in
expectation (Gupta et al. 2015, arXiv 1502.02551). A moment is no better off: 0.99 v + 0.01 g**2 differs from v by less
than half a spacing (1/512 to 1/256 of v) as soon as g**2 is within a fifth of v. Weights and moments are chosen apart;
each then takes 2 bytes instead of 4, and every update is computed in float32.

What is exact, and what is not:
 1. The value that is rounded is the float32 sum of weight and update, what a float32 master would hold.
 2. `stochastic_round` adds 16 random bits to the 16 bits that bfloat16 has not, and cuts them off. A float is
    sign and magnitude, so the carry moves away from 0 for either sign with probability k / 2**16 exactly, where k
    are the 16 bits: without bias, neighbours only, a bfloat16 unchanged. Beyond the largest bfloat16 the outer
    neighbour is infinity. NaN and infinity are rounded as usual: a carry would make a number of a NaN.
 3. `optax.apply_updates` adds the returned u = float32(r - p) to the old weight p and rounds to bfloat16. The
    result is the rounded value r, for finite normal numbers. Say 2**e <= |p| < 2**(e + 1):
     a. |r| < 2**-15 |p|. The unrounded x, p plus the inner optimizer's update, is so small next to p that this sum
        is exact and a multiple of q = 2**(e - 24), or of q = 2**(e - 23) where the update is not below 2**e. So is
        r, which lies between such multiples or is x. r - p then has at most 24 bits: u is exact, and so is p + u.
        (Where the compiler fuses a product into the sum, x may have more digits and p + u miss r by q / 2.)
     b. 2**-15 |p| <= |r| <= 2**15 |p|. Both are multiples of the spacing of the smaller one, and their difference is
        below 2**24 times that: u is exact, and so is p + u.
     c. 2**15 |p| < |r|. u misses by about 2**-24 |r|, and p + u once more by as much; half way to the neighbours of
        r is at least 2**-9 |r|, so the rounding to bfloat16 finds r.
    Where r = p, u is 0, also for infinity. Zero may lose its sign. Hardware that flushes subnormal float32 numbers
    flushes them here too.
 4. The random bits come from (seed, weight or moment, updates done, index of the leaf, index of the element) alone: not
    from the mesh, because indices are global, and a resumed run draws what it would have drawn. Elements of one leaf
    that are 2**32 apart draw the same bits.
 5. They are a hash of the element's index and a key, not `jax.random.bits`: XLA loops over the 20 rounds of threefry on
    CPUs, through temporary arrays of up to 11 bytes per parameter. The hash is fused into the update everywhere.
 6. An update uses the moment before it is rounded; only what the next one starts from is. The noise adds up over
    1 / (1 - decay) updates to a standard deviation of about 2.3 % of v at decay 0.99, 7 % at 0.999, 0.7 % of m at 0.9.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int32, Key, PyTree, UInt32

Params = PyTree  # of arrays


_MOMENTS = 2**32 - 1  # folded in where weights have the number of updates, an int32: never the same key


class StochasticRoundingState(NamedTuple):
    """`inner` is the state of the wrapped optimizer, which sees float32 parameters."""

    count: Int32[Any, ""]  # updates done
    inner: optax.OptState


class StochasticMomentsState(NamedTuple):
    """`inner` is the state of the wrapped optimizer, its moments bfloat16 and shaped like the parameters."""

    count: Int32[Any, ""]  # updates done
    inner: optax.OptState


def stochastic_rounding(optimizer: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """Wraps an optimizer for bfloat16 parameters: it computes in float32, its result is rounded stochastically.

    The inner optimizer sees gradients and parameters in float32. The updates are float32 differences for which
    `optax.apply_updates` gives exactly the rounded values.

    Args:
      seed: any integer; the same one gives the same run.

    Raises:
      ValueError: (from `update`) the parameters were not passed.
    """

    def init(params: Params) -> StochasticRoundingState:
        return StochasticRoundingState(jnp.zeros([], jnp.int32), optimizer.init(_to_float32(params)))

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, StochasticRoundingState]:
        if params is None:
            raise ValueError("stochastic rounding needs the parameters: pass them to update.")
        params = _to_float32(params)
        wanted, inner = optimizer.update(_to_float32(updates), state.inner, params)
        key = jax.random.fold_in(_seed_key(seed), state.count)
        leaves, structure = jax.tree.flatten(params)
        pairs = enumerate(zip(leaves, structure.flatten_up_to(wanted), strict=True))
        rounded = [_rounded_update(p, u, jax.random.fold_in(key, leaf)) for leaf, (p, u) in pairs]
        return structure.unflatten(rounded), StochasticRoundingState(optax.safe_increment(state.count), inner)

    return optax.GradientTransformation(init, update)


def stochastic_moments(optimizer: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """Wraps an optimizer so that every float of its state is kept in bfloat16, rounded stochastically.

    The inner optimizer computes in float32, and its updates are those of the moments before rounding.

    Args:
      seed: any integer; the same one gives the same run. The bits are not those of `stochastic_rounding`.
    """

    def init(params: Params) -> StochasticMomentsState:
        narrow = jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16) if _is_float(leaf) else leaf, optimizer.init(params)
        )
        return StochasticMomentsState(jnp.zeros([], jnp.int32), narrow)

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, StochasticMomentsState]:
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if _is_float(leaf) else leaf, state.inner)
        updates, wide = optimizer.update(updates, wide, params)
        key = jax.random.fold_in(jax.random.fold_in(_seed_key(seed), _MOMENTS), state.count)
        leaves, structure = jax.tree.flatten(wide)
        rounded = [
            stochastic_round(leaf.astype(jnp.float32), jax.random.fold_in(key, index)) if _is_float(leaf) else leaf
            for index, leaf in enumerate(leaves)
        ]
        return updates, StochasticMomentsState(optax.safe_increment(state.count), structure.unflatten(rounded))

    return optax.GradientTransformation(init, update)


def stochastic_round(x: Float32[Array, "*dims"], key: Key[Array, ""]) -> BFloat16[Array, "*dims"]:
    """One of the two bfloat16 neighbours of each element: the expectation is the element."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = _random_bits(key, x.shape) >> 16
    rounded = jax.lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _random_bits(key: Key[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "*dims"]:
    """Uniform bits, each element's a hash of its index (row-major, modulo 2**32) and the two words of the key."""
    first, second = jax.random.key_data(key)
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return _mix(_mix(index ^ first) + second)


def _mix(x: UInt32[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    """A bijection of 32 bits in which each input bit flips each output bit half of the time.

    The shifts and factors are those of MurmurHash3's finalizer (Austin Appleby, public domain).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _seed_key(seed: int) -> Key[Array, ""]:
    # The implementation is named because a process may choose another default, whose bits depend on the mesh.
    return jax.random.key(seed % 2**32, impl="threefry2x32")


def _rounded_update(
    param: Float32[Array, "*dims"], update: Float32[Array, "*dims"], key: Key[Array, ""]
) -> Float32[Array, "*dims"]:
    rounded = stochastic_round(param + update, key).astype(jnp.float32)
    return jnp.where(rounded == param, 0.0, rounded - param)


def _to_float32(tree: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
