"""Several processes as one run: JAX's own multi-controller runtime, and the few words its processes exchange.

Every process runs the same program. What is read or written once (manifest, metrics, the run folder's files) is process
0's work, and the others get its result or its error; what is divided (tokenising, sampling) is gathered. All of these
are collectives: every process must come to them, in the same order. So an error on one process is raised on all, and
so is `Stopped`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from drift_jax import stopping
from drift_jax.errors import ConfigError, DriftError, PeerError
from drift_jax.stopping import Stopped

# A process that is gone is noticed after this many seconds without a sign of life; the others then end as well.
_HEARTBEAT_S = 30
_START_S = 300  # how long processes wait for each other at the start
# Messages travel over the devices in pieces: one of each size is one program to compile. All processes' pieces lie in
# each device's memory at once.
_SMALL, _LARGE = 1 << 12, 1 << 22

T = TypeVar("T")
Mode = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Processes:
    """How the processes of a run find each other; None: by what JAX finds out about the cluster."""

    mode: Mode = "auto"
    coordinator: str | None = None  # HOST:PORT of process 0
    count: int | None = None
    index: int | None = None


def start_processes(processes: Processes, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of a run; must come before the first use of a device. Does nothing for a single process.

    Raises:
      ConfigError: only some of coordinator, count and index are given, or they do not fit; the others did not come.
    """
    given = {
        "--coordinator": processes.coordinator,
        "--num-processes": processes.count,
        "--process-id": processes.index,
    }
    missing = [name for name, value in given.items() if value is None]
    if processes.mode == "off" or (processes.mode == "auto" and len(missing) == 3 and not _has_peers(environment)):
        return
    if 0 < len(missing) < 3:
        raise ConfigError(
            f"{', '.join(missing)} must be given too: --coordinator, --num-processes and --process-id belong together. "
            "Without any of them JAX asks the cluster (Slurm, TPU pods, GKE, Open MPI)."
        )
    if processes.count is not None and not 0 <= (processes.index or 0) < processes.count:
        raise ConfigError(
            f"--process-id {processes.index} must be from 0 to {processes.count - 1} (--num-processes - 1)."
        )
    # Signals to end are heeded by stopping.py; JAX's service would take SIGTERM away from it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            local_device_ids=_all_gpus(environment),
            initialization_timeout=_START_S,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_HEARTBEAT_S,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the processes of the run did not find each other: {error}. Start the same command on every host, and "
            "name --coordinator HOST:PORT of process 0, --num-processes and --process-id, or --distributed off for "
            "one process."
        ) from error


def _has_peers(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this process is one of several, in a way that JAX can ask further."""
    # In a script of sbatch or a shell of salloc, outside of srun, there is no step: that is one process.
    slurm = environment.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in environment else "1"
    if not {slurm, environment.get("OMPI_COMM_WORLD_SIZE", "1")} <= {"", "1"}:
        return True
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or bool(environment.get("JAX_COORDINATOR_ADDRESS"))


def _all_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """All GPUs of a node for its only task; JAX would take the one that is numbered like the task."""
    alone = environment.get("SLURM_NTASKS_PER_NODE", environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")) == "1"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(list(Path("/dev").glob("nvidia[0-9]*"))) if visible is None else len(visible.split(",")) * bool(visible)
    return list(range(count)) if alone and count and not environment.get("JAX_LOCAL_DEVICE_IDS") else None


# How XLA, gloo and the coordination service speak of a process that is gone.
_LOST = ("heartbeat", "unavailable", "deadline_exceeded", "aborted", "gloo", "connection", "barrier")


def is_lost_peer(error: Exception) -> bool:
    """Whether an error of JAX, or of a library that waits with it, means that another process of the run is gone."""
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    of_jax = isinstance(error, jax.errors.JaxRuntimeError | TimeoutError)
    return several and of_jax and any(word.lower() in str(error).lower() for word in _LOST)


def is_main() -> bool:
    """Whether this is the process that reads and writes what is there once."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """A JSON value of every process, in the order of the processes, on all of them."""
    return [json.loads(text) for text in gather_bytes(json.dumps(value).encode())]


def gather_bytes(data: bytes) -> list[bytes]:
    """Bytes of every process, in the order of the processes, on all of them."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.array([len(data) >> 24, len(data) & 0xFFFFFF], np.int32))
    lengths = [(int(high) << 24) + int(low) for high, low in sizes]
    pieces: list[list[bytes]] = [[] for _ in lengths]
    start = 0
    while start < max(lengths):
        size = _SMALL if max(lengths) - start <= _SMALL else _LARGE
        part = np.frombuffer(data[start : start + size].ljust(size, b"\0"), np.uint8)
        for of_process, piece in zip(pieces, multihost_utils.process_allgather(part), strict=True):
            of_process.append(piece.tobytes())
        start += size
    return [b"".join(parts)[:length] for parts, length in zip(pieces, lengths, strict=True)]


def gather_packed(value: T, pack: Callable[[T], bytes], unpack: Callable[[bytes], T]) -> list[T]:
    """A value of every process, in the order of the processes, on all of them; one process packs nothing."""
    return [value] if jax.process_count() == 1 else [unpack(data) for data in gather_bytes(pack(value))]


def on_main(work: Callable[[], T]) -> T:
    """`work()` on process 0 alone; its result, a JSON value, on every process. Its `DriftError` is raised on all."""
    if jax.process_count() == 1:
        return work()
    result, error = _attempt(work if is_main() else lambda: None)
    answers = gather(_answer(error) | {"result": result})
    _raise_first(error, answers)
    return answers[0]["result"]


def on_each(work: Callable[[], T]) -> T:
    """`work()` on every process, its own result on each. A `DriftError` on one of them is raised on all."""
    if jax.process_count() == 1:
        return work()
    result, error = _attempt(work)
    _raise_first(error, gather(_answer(error)))
    return result  # pyright: ignore[reportReturnType]


def send_bytes(make: Callable[[], bytes | None]) -> bytes | None:
    """`make()` of process 0 on every process. Its `DriftError` is raised on all."""
    if jax.process_count() == 1:
        return make()
    data, error = _attempt(make if is_main() else lambda: None)
    answers = gather(_answer(error) | {"there": data is not None})
    _raise_first(error, answers)
    return gather_bytes(data or b"")[0] if answers[0]["there"] else None


def send(make: Callable[[], T | None], pack: Callable[[T], bytes], unpack: Callable[[bytes], T]) -> T | None:
    """`send_bytes` for values that can be packed; one process packs nothing."""
    if jax.process_count() == 1:
        return make()

    def make_bytes() -> bytes | None:
        value = make()
        return None if value is None else pack(value)

    data = send_bytes(make_bytes)
    return None if data is None else unpack(data)


def _attempt(work: Callable[[], T]) -> tuple[T | None, DriftError | Stopped | None]:
    try:
        with stopping.local():
            return work(), None
    except (DriftError, Stopped) as error:
        return None, error


def _answer(error: DriftError | Stopped | None) -> dict[str, Any]:
    """What the other processes are told of one's own attempt."""
    problem = str(error) if isinstance(error, DriftError) else None
    return {"problem": problem, "stopped": isinstance(error, Stopped) or stopping.shared()}


def _raise_first(own: DriftError | Stopped | None, answers: list[dict[str, Any]]) -> None:
    """The process that has an error raises it; the others one that says whose it is, also if they have the same.

    Where any process is to stop, all do.
    """
    if isinstance(own, DriftError) and (is_main() or str(own) != answers[0]["problem"]):
        raise own
    for index, answer in enumerate(answers):
        if answer["problem"] is not None:
            raise PeerError(answer["problem"], index)
    if any(answer["stopped"] for answer in answers):
        raise Stopped
