"""Starts `drift` in forks of one warm process (fork_server.py)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


class Server:
    """One process at a time.

    Args:
      cache: directory of compiled programs; None: what the environment says.
      env: more variables, of the warm process and so of all.
      cores: the ones to work on; empty: all.
    """

    def __init__(
        self, cache: Path | None = None, env: Mapping[str, str] | None = None, cores: Collection[int] = ()
    ) -> None:
        variables = {
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "COLUMNS": "200",
            **({"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {}),
            **(env or {}),
        }
        self.pid = 0
        self.process = subprocess.Popen(
            [sys.executable, str(REPO / "scripts" / "drills" / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | variables,
            cwd=REPO,
            bufsize=0,
        )
        if cores:
            os.sched_setaffinity(self.process.pid, cores)

    def start(
        self,
        words: Sequence[Any],
        log: Path,
        hooks: Mapping[str, Sequence[Any]] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """`drift WORDS`, whose output is appended to `log`. Returns its process id."""
        assert self.process.stdin is not None
        order = {"words": [*map(str, words)], "log": str(log), "hooks": dict(hooks or {}), "env": dict(env or {})}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.pid = self._read()["pid"]
        return self.pid

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code of what was started, negative for a signal; None: it is still at work after `seconds`."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        self.pid = 0
        return self._read()["code"]

    def kill(self) -> int:
        """SIGKILL to what was started. Returns its exit code, which is another one where it had ended before."""
        code = self.wait(0)
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            code = self.wait()
        assert code is not None
        return code

    def close(self) -> None:
        """Ends the warm process, and what it runs."""
        if self.pid:
            self.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())
