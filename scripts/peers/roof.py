"""What a device can do at best, measured: the bound that a sampler's speed is held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from drift_jax.models.architecture import QwenConfig
from drift_jax.plan.flops import forward_flops

_REPEATS = 8
_LONGEST_SIDE = {"cpu": 2048}  # of a product that is timed; elsewhere 8192
_LARGEST = {"cpu": 2**28}  # bytes that are read at a time; elsewhere 4 GiB


class Roof(NamedTuple):
    """Rates of one device."""

    flops_per_s: float  # of a product of two large square matrices
    bytes_per_s: float  # of summing a large array


def measure_roof(dtype: str) -> Roof:
    """The best of a few turns on the first device; nothing else should run."""
    platform = jax.devices()[0].platform
    side = _LONGEST_SIDE.get(platform, 8192)
    square = jnp.ones((side, side), dtype)
    # float32 in any case: converting bfloat16 takes a CPU longer than reading it.
    many = jnp.ones(_LARGEST.get(platform, 2**32) // 4, jnp.float32)
    product, read = _best(jax.jit(lambda x: x @ x), square), _best(jax.jit(jnp.sum), many)
    return Roof(2 * side**3 / product, many.nbytes / read)


def _best(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    jax.block_until_ready(function(x))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(x))
        times.append(time.perf_counter() - start)
    return min(times)


def bound_prefill_s(roof: Roof, config: QwenConfig, prompts: list[int], itemsize: int) -> float:
    """Seconds that prompts of these lengths take at least: the layers' products, and each of their weights once."""
    flops = sum(forward_flops(config, length) for length in prompts)
    return max(flops / roof.flops_per_s, itemsize * _layer_weights(config) / roof.bytes_per_s)


def bound_decode_s(roof: Roof, config: QwenConfig, prompts: list[int], steps: int, itemsize: int) -> float:
    """Seconds that `steps` more tokens of each prompt take at least.

    A step reads every weight and the keys and values of all rows so far, and multiplies each row with each weight.
    """
    weights = _layer_weights(config) + config.vocab_size * config.embed
    kept = 2 * config.layers * config.kv_heads * config.head_dim  # numbers a token, in the cache
    seconds = 0.0
    for step in range(1, steps + 1):
        cached = sum(length + step for length in prompts)
        scores = 4 * config.layers * config.heads * config.head_dim * cached
        flops = 2 * weights * len(prompts) + scores
        seconds += max(itemsize * (weights + kept * cached) / roof.bytes_per_s, flops / roof.flops_per_s)
    return seconds


def _layer_weights(config: QwenConfig) -> int:
    return int(forward_flops(config, 1) - 4 * config.layers * config.heads * config.head_dim) // 2
