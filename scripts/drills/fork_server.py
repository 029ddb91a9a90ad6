"""Runs `drift` commands in forks of a process that has imported everything: a start costs no seconds of imports.

    python scripts/drills/fork_server.py     lines of JSON in, lines of JSON out

In: {"words": [...], "log": PATH, "env": {NAME: VALUE}, "hooks": {NAME: [ARGUMENT, ...]}}; hooks are functions of
hooks.py. Out: {"pid": N}, and when that process has ended {"code": N}, negative for a signal. JAX must not have started
its devices before the fork, and has not.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents[1:3]]  # scripts, and what is not installed

import drift_jax.cli  # noqa: E402
import drift_jax.manifest  # noqa: E402
import drift_jax.recipe  # noqa: E402
import drift_jax.stages.dpo  # noqa: E402
import drift_jax.stages.export  # noqa: E402
import drift_jax.stages.identity  # noqa: E402
import drift_jax.stages.pair  # noqa: E402
import drift_jax.stages.sample  # noqa: E402
from drills import hooks  # noqa: E402


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
    os.environ.update(order["env"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["drift", *order["words"]]
    for name, arguments in order["hooks"].items():
        getattr(hooks, name)(*arguments)
    try:
        drift_jax.cli.main()
    except SystemExit as stopped:
        sys.stdout.flush()
        os._exit(int(stopped.code or 0))
    os._exit(0)


if __name__ == "__main__":
    main()
