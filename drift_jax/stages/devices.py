"""Which devices a stage samples on, and how they share the policy and the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from drift_jax.config import MeshConfig, RunConfig
from drift_jax.distributed import gather
from drift_jax.errors import ConfigError
from drift_jax.models.architecture import QwenConfig
from drift_jax.models.decoding import cache_bytes
from drift_jax.models.hf import load_qwen_config
from drift_jax.sampling.slots import round_length
from drift_jax.sharding import Layout, build_layout, check_sampling_batch

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
      ConfigError: `sampling.batch_size` cannot be split over the devices, or the policy over `tensor_parallel` of them.
    """
    model, limits = load_qwen_config(model_dir), device_limits()
    per_host = jax.process_count() > 1 and config.sampling.per_host is not False
    if per_host and config.sampling.per_host is None:
        per_host = all(gather(fits_one_host(config, model, limits)))
    if per_host:
        layout = split_for_sampling(config, model, jax.local_devices(), limits)
    else:
        layout = layout_of_all(config, model)
    check_sampling_batch(layout, config.sampling.batch_size)
    return layout, per_host


def layout_of_all(config: RunConfig, model: QwenConfig) -> Layout:
    """How all devices of all hosts sample together. Raises `ConfigError` as `split_for_sampling`."""
    limits = [limit for of_host in gather(device_limits()) for limit in of_host]
    return split_for_sampling(config, model, jax.devices(), limits)


def split_for_sampling(
    config: RunConfig, model: QwenConfig, devices: Sequence[jax.Device], limits: Sequence[float | None]
) -> Layout:
    """How a sampler splits policy and rows over its devices, whatever the mesh that trains.

    Every new token needs all weights. Devices that share heads and MLP read their part of them and send each other
    activations of a few rows; devices that share weights by `fsdp` would send each other all the weights. So `tensor`
    is as many as kv heads and MLP can be divided over, among devices that a fast network links; what is left has rows
    of its own, and gathers weights only as far as it has no room for them.

    Args:
      limits: bytes of each device; None where it does not say, and is taken to have room.

    Raises:
      ConfigError: `sampling.tensor_parallel` does not divide the devices, the heads or the MLP.
    """
    tensor, together = config.sampling.tensor_parallel, linked(devices)
    if tensor is None:
        tensor = max(n for n in _divisors(together) if _divides(n, model.kv_heads, model.mlp))
    elif not _divides(tensor, len(devices), model.heads, model.mlp):
        fitting = max(n for n in _divisors(len(devices)) if n <= tensor and _divides(n, model.heads, model.mlp))
        raise ConfigError(
            f"sampling.tensor_parallel ({tensor}) must divide the number of devices that sample ({len(devices)}), that "
            f"of the model's heads ({model.heads}) and the width of its MLP ({model.mlp}). {fitting} would do; null "
            "chooses."
        )
    rest, weights = len(devices) // tensor, _weight_bytes(config, model) / tensor
    room = min((limit for limit in limits if limit is not None), default=float("inf"))
    # Between slices only rows can be split: one of the two axes has as many parts as there are slices, or a multiple.
    slices = len(devices) // together if devices[0].platform == "tpu" else 1
    fitting = [n for n in _divisors(rest) if model.embed % n == 0 and (n % slices == 0 or rest // n % slices == 0)]
    fsdp = next((n for n in fitting if weights / n < _MOST_WEIGHTS * room), fitting[-1] if fitting else 1)
    return build_layout(MeshConfig(data=rest // fsdp, fsdp=fsdp, tensor=tensor), devices)


def describe_split(layout: Layout, rows: int) -> str:
    """A line for the user: how the devices share the work, which no key has to say."""
    axes = ", ".join(f"{axis} {size}" for axis, size in layout.sizes.items() if size > 1)
    devices = f"{layout.devices} devices ({axes})" if axes else "one device"
    return f"the sampler decodes {rows} rows at a time on {devices}"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _divides(ways: int, *sizes: int) -> bool:
    return all(size % ways == 0 for size in sizes)


def linked(devices: Sequence[Any]) -> int:
    """How many devices a fast network links: those of a slice of TPUs, of one host otherwise."""
    place = "slice_index" if devices[0].platform == "tpu" else "process_index"
    places = [getattr(device, place, 0) for device in devices]
    return places.count(places[0])


def rows_that_fit(config: RunConfig, layout: Layout, model: QwenConfig, free: float) -> int:
    """How many rows are decoded together when `sampling.batch_size` is null.

    Args:
      layout: of `split_for_sampling`.
      free: bytes that each device has left beside the weights.
    """
    ways, kv_ways = layout.ways("batch"), layout.ways("kv_heads")
    kv_ways = kv_ways if model.kv_heads % kv_ways == 0 else 1
    room = round_length(config.sampling.max_input_length + config.sampling.max_new_tokens)
    # A cache that grows is there twice: with the room it had, two thirds at least, and with that of the longest rows.
    # In the loop that TPU's compiler makes it may be there twice all the time.
    times = 2 if layout.platform == "tpu" else 5 / 3
    row = times * cache_bytes(model, room, config.sampling.compute_dtype) / kv_ways
    most = _MOST_ROWS_ON_CPU if layout.platform == "cpu" else _MOST_ROWS
    return ways * max(1, int(min(_MOST_CACHE * free / row, most // ways)))


def free_memory() -> float:
    """Bytes that every local device has left; where it does not say, its share of what the host can give."""
    devices = jax.local_devices()
    stats = [device.memory_stats() for device in devices]
    if any(not of_device or "bytes_limit" not in of_device for of_device in stats):
        return _MOST_OF_HOST * psutil.virtual_memory().available / len(devices)
    return min(of_device["bytes_limit"] - of_device["bytes_in_use"] for of_device in stats if of_device)


def device_limits() -> list[float | None]:
    """Bytes of each local device; None where it does not say."""
    return [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]


def fits_one_host(config: RunConfig, model: QwenConfig, limits: Sequence[float | None]) -> bool:
    """Whether the policy fits on a host's devices of so many bytes each.

    Where a device does not say how much memory it has, it is the host's, and a policy is taken to fit.
    """
    weights = _weight_bytes(config, model)
    return all(limit is None or weights / len(limits) < _MOST_WEIGHTS * limit for limit in limits)


def _weight_bytes(config: RunConfig, model: QwenConfig) -> int:
    return model.num_parameters * np.dtype(config.sampling.compute_dtype).itemsize
