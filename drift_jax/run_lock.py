"""One writer in a run directory: `RUN/.lock` says who, and since when.

    {"host": "worker-3", "pid": 4711, "born": 1764201600.25, "since": "2026-11-27T01:00:00Z"}

The operating system's lock (flock) is what counts where the file system has it: it is let go of however a process
ends. Some file systems have none, and on some it is seen by one host only. So the owner also touches the file every
few seconds, and what an owner leaves behind is looked at: its process, where that is of this host, and else whether
the file is still being touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import psutil

from drift_jax.errors import StageError
from drift_jax.files import remove_leftovers

BEAT_S = 5.0  # between two signs of life
_WATCH_S = 4 * BEAT_S  # how long to look for one


@final
class RunLock:
    """Keeps a second process out of a run directory.

    Args:
      tell: takes a line for the user.
    """

    def __init__(self, run_dir: Path, tell: Callable[[str], None] = print) -> None:
        self.path = run_dir / ".lock"
        self._tell = tell
        self._over = threading.Event()

    def acquire(self) -> None:
        """Raises `StageError` when another process has it, or no directory can be made."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+")
        except OSError as error:
            raise StageError(
                f"cannot write to the directory {self.path.parent}: {error.strerror}. Give another one."
            ) from None
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        remove_leftovers(self.path.parent)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Leaves an empty file: whoever comes next need not ask what became of us."""
        self._over.set()
        with contextlib.suppress(OSError):  # the work is done, and a name that stays is found to be of nobody
            if self._is_ours():
                self._file.truncate(0)
            self._file.close()

    def _take(self) -> None:
        locked = self._flock()
        self._file.seek(0)
        owner = _read_owner(self._file.read())
        if locked is False:
            raise self._in_use(owner)
        if owner and self._may_live(owner, locks=locked is True):
            raise self._in_use(owner)
        if owner:
            self._tell(f"{self.path.parent}: {_name(owner)} is gone without a word; this one goes on.")
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
        self._own["since"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._file.seek(0)
        self._file.truncate(0)
        self._file.write(json.dumps(self._own) + "\n")
        self._file.flush()

    def _flock(self) -> bool | None:
        """Whether it is ours now; None where the file system has no such locks."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            return None
        return True

    def _may_live(self, owner: dict[str, Any], locks: bool) -> bool:
        """Whether the owner that the file names may still be at work, which the lock of the system does not say."""
        if owner.get("host") == socket.gethostname():
            return not locks and owner["pid"] != os.getpid() and _born(owner["pid"]) == owner.get("born")
        if not locks:
            return True
        # Nobody holds it as far as this host can see. Clocks of two hosts differ, so time is not asked for.
        self._tell(f"{self.path.parent} was in use by {_name(owner)}: waiting for a sign of life of it.")
        before, deadline = self._touched(), time.monotonic() + _WATCH_S
        while time.monotonic() < deadline:
            time.sleep(BEAT_S / 5)
            if self._touched() != before:
                return True
        return False

    def _in_use(self, owner: dict[str, Any]) -> StageError:
        what = f"{self.path.parent} is in use by {_name(owner)}"
        if not owner or owner.get("host") == socket.gethostname():
            return StageError(f"{what}. Wait for it, or give another directory.")
        last = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.path.stat().st_mtime))
        return StageError(
            f"{what}, whose last sign of life was at {last} by the clock of the file system (it gives one every "
            f"{BEAT_S:.0f} seconds). Wait for it, or give another directory. If that process is gone for certain, "
            f"remove {self.path} and run again."
        )

    def _touched(self) -> int:
        return os.fstat(self._file.fileno()).st_mtime_ns

    def _is_ours(self) -> bool:
        """Whether the file is the one that was locked, and names this process."""
        with contextlib.suppress(OSError, ValueError):
            named, held = self.path.stat(), os.fstat(self._file.fileno())
            return os.path.samestat(named, held) and _read_owner(self.path.read_text()) == self._own
        return False

    def _beat(self) -> None:
        """Signs of life; and the end of this process where another one has taken its place meanwhile."""
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError, ValueError):
                if self._is_ours() or self._over.is_set():
                    os.utime(self._file.fileno())
                elif self.path.exists():
                    owner = _name(_read_owner(self.path.read_text()))
                    print(f"error: {self.path.parent} has been taken over by {owner}.", file=sys.stderr, flush=True)
                    os._exit(2)


def _read_owner(text: str) -> dict[str, Any]:
    """Empty where the last owner has let go of it."""
    text = text.strip()
    with contextlib.suppress(ValueError):
        found = json.loads(text or "{}")
        # Before, the file held a process id of this host and nothing else.
        return found if isinstance(found, dict) else {"pid": found, "host": socket.gethostname()}
    return {"pid": text, "host": socket.gethostname()}


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "process unknown"
    since = f" since {owner['since']}" if "since" in owner else ""
    return f"process {owner.get('pid')} on host {owner.get('host')}{since}"


def _born(pid: Any) -> float | None:
    """When a process of this host was started; None: there is none. Ids are used again, these times are not."""
    try:
        return psutil.Process(pid).create_time()
    except (psutil.Error, TypeError, ValueError):
        return None
