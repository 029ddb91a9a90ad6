"""Slices of TPUs and machines with GPUs that are not there, and what a chip of each generation can do.

`open_slice("v5e:4x4")` and `open_slice("h100:8")` give devices to compile for, `open_local(8)` local ones. Both set
what has to be set before JAX looks for devices.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_jax.errors import ConfigError
from drift_jax.plan.gpus import describe_gpus

EXAMPLES = (
    "v5e:2x2",
    "v5e:4x4",
    "v5e:8x8",
    "v5p:2x2x1",
    "v5p:2x2x2",
    "v5p:2x2x4",
    "v6e:2x2",
    "v6e:4x4",
    "v6e:8x8",
    "h100:8",
    "h100:2x8",
)
_HOST = "2x2x1"  # chips of a host, as the compiler lays slices out
_NAME = re.compile(r"(v\w+):(\d+(?:x\d+)+)")
_GPU_NAME = re.compile(r"(h\d+):(?:([1-9]\d*)x)?([1-9]\d*)")
_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator. Peaks are those of the makers' data sheets, dense, without sparsity."""

    name: str
    limit_gib: float | None  # what programs can use, in GiB; None: unknown
    peak_flops: float  # bfloat16 FLOPs a second
    clock_hz: float | None  # of the cycles that the compiler counts; None: it counts none
    link_bytes: float  # bytes a second between neighbours on one mesh axis, each way
    limit_from: str  # where the limit comes from


# HBM as the compiler counts it: from its message where a program does not fit. Without v4, of which the compiler only
# offers the two cores of a chip apart, with half of its memory each. Clocks and links as Google publishes
# them and the "How to Scale Your Model" book has them (jax-ml.github.io/scaling-book/tpus).
CHIPS: dict[str, Chip] = {
    "v5e": Chip("TPU v5e", 15.75, 197e12, 1.5e9, 45e9, "TPU compiler"),
    "v5p": Chip("TPU v5p", 95.74, 459e12, 1.75e9, 90e9, "TPU compiler"),
    "v6e": Chip("TPU v6e", 31.25, 918e12, 1.75e9, 90e9, "TPU compiler"),
}
# 80 GB as NVIDIA counts them are 74.5 GiB; what CUDA and the libraries keep for themselves is not taken off.
H100 = Chip("H100 80GB", 80e9 / _GIB, 989e12, None, 450e9, "80 GB")
GPUS = {"h100": H100, "h200": Chip("H200", 141e9 / _GIB, 989e12, None, 450e9, "141 GB")}


@dataclass(frozen=True)
class Slice:
    """Devices that a mesh is made of."""

    name: str
    devices: Sequence[Any]
    chip: Chip
    note: str  # what a reader of the figures must know about them
    host: Sequence[Any] = ()  # those of one of several hosts, as a slice of their own; empty: there is one host


def open_slice(topology: str) -> Slice:
    """The devices of a TPU slice by its generation and shape, or of machines with GPUs by their number.

    Neither need be there; the TPU compiler or XLA's GPU compiler must be.

    Raises:
      ConfigError: no such slice, or its compiler is not installed.
    """
    gpus = _GPU_NAME.fullmatch(topology.lower())
    if gpus is not None and gpus[1] in GPUS:
        return _open_gpus(topology.lower(), gpus[1], int(gpus[2] or 1), int(gpus[3]))
    found = _NAME.fullmatch(topology)
    if found is None or found[1] not in CHIPS:
        raise ConfigError(
            f"--topology {topology!r} is no slice that can be planned for. It is a generation of TPUs "
            f"({', '.join(CHIPS)}) and the chips along each side, or a GPU ({', '.join(GPUS)}) and how many, or hosts "
            f"x GPUs of each: {', '.join(EXAMPLES)}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology {topology} needs the TPU compiler, which is not installed (no TPU is needed). "
            "pip install 'drift-jax[plan]', or plan for devices of this machine with --devices."
        )
    # libtpu reads these when it is loaded: without them it waits for the metadata server of a TPU machine.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", _accelerator_type(found[1], found[2]))
    if not _has_tpu():
        # Compiling takes no TPU away from anyone: several processes may.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax

    _use_cpu(jax)
    from jax.experimental import topologies

    try:
        devices = _describe_slice(topologies, topology)
        hosts = len({device.process_index for device in devices})
        # For a part of a slice the compiler cannot compile: it stops the process.
        host = _describe_slice(topologies, f"{found[1]}:{_HOST}") if hosts > 1 else ()
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        if "lockfile" in str(error):
            raise ConfigError(
                f"--topology {topology}: another process has the TPU or its compiler ({str(error).splitlines()[0]}). "
                "Wait for it to end, or plan on a machine without a TPU."
            ) from None
        raise ConfigError(
            f"--topology {topology}: the TPU compiler refuses it ({str(error).splitlines()[0]}). "
            f"Slices are for example {', '.join(EXAMPLES)}."
        ) from None
    note = f"compiled by the TPU compiler for {len(devices)} devices on {hosts} host{'s' * (hosts > 1)}"
    return Slice(topology, devices, CHIPS[found[1]], note, host)


def _open_gpus(topology: str, kind: str, hosts: int, count: int) -> Slice:
    import jax

    _use_cpu(jax)
    devices, chip = describe_gpus(kind, hosts, count), GPUS[kind]
    note = (
        f"compiled by XLA's GPU compiler for {hosts * count} {chip.name} on {hosts} host{'s' * (hosts > 1)}, against "
        f"{chip.limit_gib:.1f} GiB ({chip.limit_from}); time from FLOPs at half of the peak and bytes over NVLink"
    )
    return Slice(topology, devices, chip, note, describe_gpus(kind, 1, count) if hosts > 1 else ())


def _describe_slice(topologies: Any, name: str) -> Sequence[Any]:
    sides = set(name.partition(":")[2].split("x"))
    options = {"chips_per_host_bounds": (1, 1, 1)} if sides == {"1"} else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def _accelerator_type(generation: str, shape: str) -> str:
    """The name that a TPU machine of the slice would have; libtpu only wants to find one."""
    chips = 1
    for side in shape.split("x"):
        chips *= int(side)
    return {"v5e": f"v5litepod-{chips}", "v6e": f"v6e-{chips}"}.get(generation, f"{generation}-{2 * chips}")


def open_local(count: int, hbm_gib: float | None = None) -> Slice:
    """`count` devices of this machine; on a CPU as many fake ones.

    Args:
      hbm_gib: the budget of a device; None: that of an H100.

    Raises:
      ConfigError: there are fewer devices, or JAX has started with another number of fake ones.
    """
    import jax

    settings: Any = jax.config  # its attributes are not declared
    if not (settings.jax_platforms or _has_gpu() or _has_tpu()):
        _use_cpu(jax)  # an installed libtpu would look for its TPU for minutes
    with contextlib.suppress(RuntimeError):  # JAX has started: what is there is checked below
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise ConfigError(
            f"--devices {count}: {len(devices)} {devices[0].platform} devices are here. Ask for as many or fewer, or "
            "run it in a fresh process with JAX_PLATFORMS=cpu, which fakes any number of them."
        )
    platform = devices[0].platform
    limit = H100.limit_gib if hbm_gib is None else hbm_gib
    source = "--hbm-gib" if hbm_gib is not None else H100.limit_from
    chip = Chip(platform, limit, H100.peak_flops, None, H100.link_bytes, source)
    note = (
        f"memory and collectives as the {platform} compiler makes them, against {limit:.1f} GiB ({source}); time from "
        "FLOPs and bytes at the peaks of an H100"
    )
    return Slice(f"{count} x {platform}", devices[:count], chip, note)


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _has_tpu() -> bool:
    """Whether this machine has TPUs, by the devices that their drivers make."""
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _use_cpu(jax: Any) -> None:
    """Nothing is run: JAX must neither look for a TPU nor hold a GPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
