"""One process of several that try out drift_jax/distributed.py; see test_distributed.py.

python -m tests.exchange COORDINATOR COUNT INDEX
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import jax

from drift_jax.distributed import Processes, gather, gather_bytes, on_each, on_main, send_bytes, start_processes
from drift_jax.errors import DataError, DriftError


def attempt(work: Callable[[], Any]) -> str:
    try:
        return repr(work())
    except DriftError as error:
        return f"{type(error).__name__}: {error}"


def fail(process: int) -> int:
    if jax.process_index() == process:
        raise DataError(f"row {process} is bad")
    return process


def main(coordinator: str, count: str, index: str) -> None:
    start_processes(Processes("on", coordinator, int(count), int(index)))
    me = jax.process_index()
    large = bytes(range(256)) * 20_000  # more than one large piece
    found = {
        "gather": gather({"process": me, "text": "é" * me}),
        "bytes": [len(part) for part in gather_bytes(b"x" * (5000 * me))],
        "large": gather_bytes(large if me == 1 else b"")[1] == large,
        "sent": str(send_bytes(lambda: b"from process 0")),
        "nothing": send_bytes(lambda: None),
        "on_main": attempt(lambda: on_main(lambda: [me, "main"])),
        "on_each": attempt(lambda: on_each(lambda: me)),
        "main fails": attempt(lambda: on_main(lambda: fail(0))),
        "1 fails": attempt(lambda: on_each(lambda: fail(1))),
        "all fail": attempt(lambda: on_each(refuse)),
    }
    print(json.dumps(found))


def refuse() -> None:
    raise DataError("no such file")


if __name__ == "__main__":
    main(*sys.argv[1:])
