"""Work of several processes of which each must know how the others' ended.

JAX's processes meet in collectives, where one that failed would leave the others waiting. So every step that can fail
ends in an exchange, and an error of one is raised on all. Every process must come to each of these calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from drift_jax.errors import DriftError

T = TypeVar("T")
_MESSAGE_BYTES = 2048


def on_each(work: Callable[[], T]) -> T:
    """`work()` on every process. Its `DriftError` on one of them is raised on all, after all have ended it."""
    if jax.process_count() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except DriftError as caught:
        error = caught
    text = b"" if error is None else f"{type(error).__name__}: {error}".encode()[:_MESSAGE_BYTES]
    messages = multihost_utils.process_allgather(np.frombuffer(text.ljust(_MESSAGE_BYTES, b"\0"), np.uint8))
    if error is not None:
        raise error
    for index, message in enumerate(np.asarray(messages)):
        if message.any():
            words = message.tobytes().rstrip(b"\0").decode(errors="replace")
            raise DriftError(f"process {index} of {jax.process_count()} stopped. {words}")
    return result  # type: ignore[return-value]


def on_main(work: Callable[[], None]) -> None:
    """`work()` on process 0; the others wait for its end, and raise its `DriftError` as well."""
    on_each(work if jax.process_index() == 0 else lambda: None)
