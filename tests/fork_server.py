"""Runs `drift` commands in forks of a process that has imported everything: a start costs no seconds of imports.

    python -m tests.fork_server     lines of JSON in, lines of JSON out

In: {"words": [...], "log": PATH, "die": [NAME, "before" | "after"] or null}. Out: {"pid": N}, and when that process has
ended {"code": N}, negative for a signal. JAX must not have started its devices before the fork, and has not.

`die` has the process kill itself with SIGKILL at the rename to, or the removal of, a file or directory called NAME.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import drift_jax.cli
import drift_jax.manifest
import drift_jax.stages.dpo
import drift_jax.stages.export
import drift_jax.stages.identity
import drift_jax.stages.pair
import drift_jax.stages.sample


def main() -> None:
    """Serves until its input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(order)
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


def _become(order: dict[str, Any]) -> NoReturn:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["drift", *order["words"]]
    if order["die"]:
        name, when = order["die"]
        os.replace = _dying(os.replace, name, when, place=1)
        os.rename = _dying(os.rename, name, when, place=1)
        os.unlink = _dying(os.unlink, name, when, place=0)
    try:
        drift_jax.cli.main()
    except SystemExit as stopped:
        sys.stdout.flush()
        os._exit(int(stopped.code or 0))
    os._exit(0)


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


if __name__ == "__main__":
    main()
