"""Jitted functions that outlive their stage: the next one of the same kind neither traces nor compiles them again.

A run is iterations of the same stages in one process, and each builds its trainer and its sampler anew. What these
jit depends on shapes and settings alone, never on weights, so the last of each kind is kept. Only one: on accelerators
a program takes memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Programs = TypeVar("Programs")

_LAST: dict[str, tuple[Hashable, Any]] = {}


def recall(kind: str, key: Hashable, build: Callable[[], Programs]) -> Programs:
    """What `build` returned for the last call of this kind, if its key was equal; else what it returns now.

    Args:
      key: everything that the programs depend on.
      build: must not hold on to arrays.
    """
    known = _LAST.get(kind)
    if known is not None and known[0] == key:
        return known[1]
    _LAST.pop(kind, None)  # before the new ones are built
    _LAST[kind] = (key, programs := build())
    return programs
