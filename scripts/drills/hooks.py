"""What goes wrong inside a process, on purpose. Each function sets it up in the process that calls it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from drift_jax.data.batches import PairBatch, PairLoader


def die(name: str, when: str) -> None:
    """SIGKILL `before` or `after` the rename to, or the removal of, a file or directory called `name`."""
    os.replace = _dying(os.replace, name, when, place=1)
    os.rename = _dying(os.rename, name, when, place=1)
    os.unlink = _dying(os.unlink, name, when, place=0)


def _dying(call: Callable[..., Any], name: str, when: str, place: int) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        is_it = os.path.basename(args[place]) == name
        if is_it and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **kwargs)
        if is_it:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def poison(*updates: int) -> None:
    """One pair of these updates, counted from 1, has a NaN that reaches the gradient."""
    shuffled = PairLoader.shuffled

    def poisoned(self: PairLoader, step: int) -> PairBatch:
        batch = shuffled(self, step)
        if step + 1 in updates:
            batch.ref_logps[0, 0] = np.nan
        return batch

    PairLoader.shuffled = poisoned


def shift_clock(seconds: float, after: float) -> None:
    """The clock of the day jumps by `seconds`, once so many seconds have passed; `time.monotonic` never jumps."""
    now, start = time.time, time.monotonic()
    now_ns = time.time_ns

    def shift() -> float:
        return seconds if time.monotonic() - start > after else 0.0

    time.time = lambda: now() + shift()
    time.time_ns = lambda: now_ns() + int(1e9 * shift())
