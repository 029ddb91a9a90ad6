"""NVIDIA GPUs that are not there: XLA's GPU compiler, which comes with JAX's CUDA plugin, compiles for a described one.

What it needs to know of a GPU is a `GpuTargetConfigProto` of XLA, here as text. No GPU, driver or CUDA is needed; what
only a GPU can say (which of several algorithms is the fastest) the compiler then decides by rule.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from drift_jax.errors import ConfigError

_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")

# Of Hopper chips; the sizes are those of the CUDA programming guide, table "technical specifications".
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 minor: 0 patch: 0 }}
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""

TARGETS = {
    "h100": _HOPPER.format(name="NVIDIA H100 80GB HBM3", bandwidth=3_352_320_000_000, memory=84_942_979_072),
    "h200": _HOPPER.format(name="NVIDIA H200", bandwidth=4_800_000_000_000, memory=150_754_820_096),
}


def describe_gpus(kind: str, hosts: int, gpus: int) -> Sequence[Any]:
    """Devices to compile for: `hosts` machines with `gpus` GPUs each; `kind` is a key of `TARGETS`.

    Raises:
      ConfigError: the plugin with the compiler is not installed.
    """
    if not any(importlib.util.find_spec(name) for name in _PLUGINS):
        raise ConfigError(
            f"--topology {kind} needs XLA's GPU compiler, which is not installed (no GPU is needed). "
            "pip install 'drift-jax[plan-gpu]', or plan for devices of this machine with --devices."
        )
    from jax.experimental import topologies

    shape = f"1x{hosts}x{gpus}"
    target = TARGETS[kind]
    return topologies.get_topology_desc("", platform="cuda", topology=shape, target_config=target).devices
