"""A program that stands between us and a server, and ends it with all its children when we are gone.

    python supervise.py COMMAND ARGUMENTS...

Its standard input is a pipe that only its caller holds: the end of the pipe means that the caller has let go of it, or
is dead, be it by SIGKILL. The server's own children may outlive the server (vLLM's engine does when its API server is
killed); they become children of this program, which is their subreaper, and it ends them too. The standard library
alone is imported, so that it is there at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_GRACE_S = 20.0  # for the server to end by itself
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent() -> None:
    """Linux: this process gets SIGTERM when the thread that started it ends. Elsewhere nothing."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """Processes that come from `root`, by /proc; empty where there is none."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat", "rb") as stat:
                # The command's name, in brackets, may hold anything.
                parent = int(stat.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found, front = [], [root]
    while front:
        front = [child for parent in front for child in children.get(parent, ())]
        found += front
    return found


def _end_all(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if server.poll() is None:
            server.terminate()
            server.wait(_GRACE_S)
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(server.pid, signal.SIGKILL)
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.poll()
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.05)


def _let_go(seconds: float) -> bool:
    """Whether the caller has closed its end of the pipe; waits so long for it."""
    return bool(select.select([0], [], [], seconds)[0]) and not os.read(0, 1)


class _Stop(Exception):
    pass


def _stop(*_: object) -> None:
    raise _Stop


def main(command: list[str]) -> int:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    # Should this program itself be killed, the server at least is told to end.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent)
    with contextlib.suppress(_Stop):
        while server.poll() is None and not _let_go(0.2):
            pass
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _end_all(server)
    code = server.returncode or 0
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
