"""Which devices a stage samples on, where a run has several hosts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import psutil

from drift_jax.config import RunConfig
from drift_jax.distributed import gather
from drift_jax.models.architecture import QwenConfig
from drift_jax.models.decoding import cache_bytes
from drift_jax.models.hf import load_qwen_config
from drift_jax.sampling.slots import round_length
from drift_jax.sharding import Layout, build_layout, check_sampling_batch, for_sampling

# Of a device's memory the weights may take so much; the rest is for keys, values and logits.
_MOST_WEIGHTS = 0.6
_MOST_CACHE = 0.8  # of what is left beside them, keys and values; the rest is for prompts and logits
_MOST_OF_HOST = 0.5  # of a host's memory, where that is the devices'
_MOST_ROWS, _MOST_ROWS_ON_CPU = 256, 32  # more gain little, and end later than each of them would


def sampling_layout(config: RunConfig, model_dir: Path) -> tuple[Layout, bool]:
    """(the layout to sample with, whether every host samples a share of its own).

    A host that has the whole policy on its own devices waits for no other. A policy that does not fit there is
    sampled from by all devices together, every host with the same rows.

    Raises:
      ConfigError: `sampling.batch_size` cannot be split over the devices.
    """
    whole = build_layout(config.mesh)
    per_host = jax.process_count() > 1 and config.sampling.per_host is not False
    if per_host and config.sampling.per_host is None:
        per_host = all(gather(_fits_here(config, model_dir)))
    if per_host:
        layout = layout_of_host(whole, config, jax.local_devices())
    else:
        layout = for_sampling(whole)
    check_sampling_batch(layout, config.sampling.batch_size)
    return layout, per_host


def layout_of_host(whole: Layout, config: RunConfig, local: Sequence[jax.Device]) -> Layout:
    """How a host that samples a share of its own splits policy and rows over its devices, out of those of `whole`."""
    tensor = whole.sizes["tensor"]
    tensor = tensor if len(local) % tensor == 0 else 1
    mesh = dataclasses.replace(config.mesh, data=1, fsdp=-1, tensor=tensor, sequence=1, strategy="auto")
    return for_sampling(build_layout(mesh, local))


def rows_that_fit(config: RunConfig, layout: Layout, model: QwenConfig, free: float) -> int:
    """How many rows are decoded together when `sampling.batch_size` is null.

    Args:
      layout: of `for_sampling`.
      free: bytes that each device has left beside the weights.
    """
    ways, kv_ways = layout.ways("batch"), layout.ways("kv_heads")
    kv_ways = kv_ways if model.kv_heads % kv_ways == 0 else 1
    room = round_length(config.sampling.max_input_length + config.sampling.max_new_tokens)
    # A cache that grows is there twice: with the room it had, two thirds at least, and with that of the longest rows.
    row = 5 / 3 * cache_bytes(model, room, config.sampling.compute_dtype) / kv_ways
    most = _MOST_ROWS_ON_CPU if layout.platform == "cpu" else _MOST_ROWS
    return ways * max(1, int(min(_MOST_CACHE * free / row, most // ways)))


def free_memory() -> float:
    """Bytes that every local device has left; where it does not say, its share of what the host can give."""
    devices = jax.local_devices()
    stats = [device.memory_stats() for device in devices]
    if any(not of_device or "bytes_limit" not in of_device for of_device in stats):
        return _MOST_OF_HOST * psutil.virtual_memory().available / len(devices)
    return min(of_device["bytes_limit"] - of_device["bytes_in_use"] for of_device in stats if of_device)


def fits_one_host(config: RunConfig, model: QwenConfig, limits: Sequence[float | None]) -> bool:
    """Whether the policy fits on a host's devices of so many bytes each.

    Where a device does not say how much memory it has, it is the host's, and a policy is taken to fit.
    """
    weights = model.num_parameters * np.dtype(config.sampling.compute_dtype).itemsize
    return all(limit is None or weights / len(limits) < _MOST_WEIGHTS * limit for limit in limits)


def _fits_here(config: RunConfig, model_dir: Path) -> bool:
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return fits_one_host(config, load_qwen_config(model_dir), limits)
