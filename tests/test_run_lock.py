"""Who is in a run directory, and when that may be overruled."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drift_jax import run_lock
from drift_jax.errors import StageError
from drift_jax.run_lock import RunLock


def leave(run_dir: Path, **owner: Any) -> Path:
    """A lock file as an owner leaves it that had no time to let go of it."""
    path = run_dir / ".lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 1, "born": 0.0, "since": "2026-01-01"} | owner))
    return path


def take(run_dir: Path, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """What the lock file says while this process has it; one that keeps it would end when the file changes."""
    lock = RunLock(run_dir, tell)
    lock.acquire()
    try:
        return json.loads((run_dir / ".lock").read_text())
    finally:
        lock.release()


@pytest.fixture()
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks: there is none here, so its answer is put in place of the call's."""

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture()
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "_WATCH_S", 0.3)


def test_a_second_one_is_told_who_is_there(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(StageError, match=rf"in use by process {os.getpid()} on host {socket.gethostname()} since 20"):
        RunLock(tmp_path).acquire()
    first.release()
    assert (tmp_path / ".lock").read_text() == ""
    take(tmp_path)


@pytest.mark.parametrize("own_host", [True, False], ids=["here", "elsewhere"])
def test_an_owner_that_is_gone_is_followed(tmp_path: Path, quick: None, own_host: bool) -> None:
    said: list[str] = []
    leave(tmp_path, **({} if own_host else {"host": "other"}))
    assert take(tmp_path, said.append)["pid"] == os.getpid()
    assert f"process 1 on host {socket.gethostname() if own_host else 'other'}" in said[-1] and "is gone" in said[-1]


def test_where_the_lock_of_another_host_is_not_seen_its_signs_of_life_are(tmp_path: Path, quick: None) -> None:
    path = leave(tmp_path, host="other", pid=7)
    touch = f"import os, time\nfor _ in range(200): os.utime({str(path)!r}); time.sleep(0.02)"
    beating = subprocess.Popen([sys.executable, "-c", touch])
    try:
        with pytest.raises(StageError, match=r"process 7 on host other.*last sign of life was at 20.*remove .*\.lock"):
            RunLock(tmp_path, lambda _: None).acquire()
    finally:
        beating.kill()
        beating.wait()


def test_without_locks_of_the_system_the_process_is_looked_for(tmp_path: Path, without_flock: None) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        leave(tmp_path, pid=other.pid, born=run_lock._born(other.pid))
        with pytest.raises(StageError, match=f"in use by process {other.pid} "):
            RunLock(tmp_path).acquire()
    take(tmp_path)
    # Its number belongs to a later process by now.
    leave(tmp_path, pid=os.getppid(), born=0.0)
    take(tmp_path)
    leave(tmp_path, host="other")
    with pytest.raises(StageError, match=r"on host other.*remove .*\.lock and run again"):
        RunLock(tmp_path).acquire()


def test_an_owner_gives_signs_of_life_and_ends_when_it_is_followed(tmp_path: Path) -> None:
    program = f"""
import time, pathlib
from drift_jax import run_lock
run_lock.BEAT_S = 0.05
run_lock.RunLock(pathlib.Path({str(tmp_path)!r})).acquire()
print("here", flush=True)
time.sleep(30)
"""
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "here\n"
        path = tmp_path / ".lock"
        before = path.stat().st_mtime_ns
        wait_until(lambda: path.stat().st_mtime_ns > before)
        path.unlink()  # as the message says
        leave(tmp_path, host="other", pid=7)
        _, said = owner.communicate(timeout=10)
        assert owner.returncode == 2 and "taken over by process 7 on host other" in said
    finally:
        owner.kill()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
