"""Commands as several processes on this machine that find each other, for tests of what they do together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_one(words: list[Any], devices: int) -> subprocess.Popen[str]:
    """`python -m WORDS` with so many fake devices."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "COLUMNS": "200"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", *map(str, words)], env=env, cwd=REPO, **pipes)


def run_together(module: str, count: int, *words: Any, devices: int = 2) -> list[tuple[int, str]]:
    """`python -m MODULE WORDS COORDINATOR COUNT INDEX` for every index; (exit code, output) of each."""
    port = free_port()
    commands = [[module, *words, f"127.0.0.1:{port}", count, index] for index in range(count)]
    return finish([start_one(command, devices) for command in commands], 120)


def finish(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """(exit code, output) of each; whoever takes longer is killed."""
    ends, deadline = [], time.monotonic() + seconds
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            said = [line for line in output.splitlines() if not line.startswith("[Gloo]")]
            ends.append((process.returncode, "\n".join(said)))
    finally:
        for process in processes:
            process.kill()
    return ends
