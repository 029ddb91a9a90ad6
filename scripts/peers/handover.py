"""What `scripts/bench_step.py` hands to each side and gets back. Needs numpy only: peers have no drift_jax.

The task goes out as a JSON file; one line of JSON on stdout comes back, progress goes to stderr.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_BEGAN = time.monotonic()
PART_NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Task:
    """One epoch of DPO over `pairs`, in their order, after a reference pass; loss `sigmoid` without an NLL term.

    Optimizer rmsprop (decay 0.99, epsilon 1e-8), constant learning rate, gradients clipped to a norm of 1, float32
    weights.
    """

    model_dir: str
    pairs: list[dict[str, list[int]]]  # prompt_ids, chosen_ids, rejected_ids; cut already
    max_length: int  # tokens of prompt + completion that the ids were cut to
    batch_size: int  # pairs an update; divides the number of pairs
    micro_batch_size: int  # pairs that a peer has in memory at a time; divides batch_size
    dtype: str  # of activations and matmuls
    learning_rate: float
    beta: float
    seed: int  # of our order of the pairs
    precompute: bool = True  # TRL: reference log-probs before the epoch, instead of a second model in the step
    gradient_checkpointing: bool = False  # TRL
    overrides: list[str] = field(default_factory=list)  # of our config, `a.b=c`
    profiled_kernels: int = 0  # of ours, to be listed by their time; 0: no profile

    @property
    def steps(self) -> int:
        return len(self.pairs) // self.batch_size


@dataclass(frozen=True)
class Result:
    """What a side measured."""

    seconds: float  # reference pass + one epoch, compiled
    reference_seconds: float | None  # of these, the reference pass; None where it is part of the step
    compile_s: float
    loss: float  # nats, mean over the epoch
    logps_chosen: float  # nats, mean over the epoch
    computed_tokens: int | None  # token positions that one pass over the pairs runs through the model, padding included
    fed: str  # hash of the ids that the trainer got
    peak_device_gb: float | None
    device: str
    versions: dict[str, str]
    settings: str  # what matters for speed, in words


class FedIds:
    """The distinct pairs that a trainer got, wherever they stood in which batch."""

    def __init__(self) -> None:
        self._pairs: set[str] = set()

    def add(self, prompt: Iterable[int], chosen: Iterable[int], rejected: Iterable[int]) -> None:
        self._pairs.add(json.dumps([[int(i) for i in part] for part in (prompt, chosen, rejected)]))

    def digest(self) -> str:
        return hashlib.sha256("\n".join(sorted(self._pairs)).encode()).hexdigest()


def hash_pairs(pairs: Iterable[dict[str, list[int]]]) -> str:
    """The hash that every side must give back for these pairs."""
    fed = FedIds()
    for pair in pairs:
        fed.add(*(pair[name] for name in PART_NAMES))
    return fed.digest()


def pad_rows(rows: Sequence[Sequence[int]], length: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Ids [N, length] with zeros where there is none, and a mask [N, length] of the ids that are real."""
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def read_task() -> Task:
    """The task whose file is this program's only argument."""
    return Task(**json.loads(Path(sys.argv[1]).read_text()))


def write_result(result: Result) -> None:
    """The result as the last line of stdout, with the memory that this process had at most."""
    print(json.dumps(dataclasses.asdict(result) | {"peak_rss_gb": peak_rss_gb()}), flush=True)


def peak_rss_gb() -> float:
    """The most memory this process ever had resident, in GB (1e9 bytes); not its parent's, as `ru_maxrss` may be."""
    try:
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def installed_versions(*packages: str) -> dict[str, str]:
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def say(message: str) -> None:
    """A line of progress, with the seconds since this process began."""
    print(f"[{time.monotonic() - _BEGAN:.0f} s] {message}", file=sys.stderr, flush=True)
