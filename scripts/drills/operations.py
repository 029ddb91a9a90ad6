"""Each kind of file operation of a run fails once (failing.c), and the same command goes on."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drift_jax.cli.options import build_console
from drift_jax.progress import stage_progress
from drills.runs import Job, check_words, count_errors, differences, kind_of, snapshot, starred
from drills.server import Server

WITHIN_S = 300.0
GOES_ON_S = 3.0  # that long after the failure, a run that has not ended goes on in spite of it
# What a full disk and a broken one answer.
_NUMBERS = {"write": errno.ENOSPC, "open to write": errno.ENOSPC, "make directory": errno.ENOSPC}


@dataclass
class Operations:
    """What became of the kinds of operations."""

    ends: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    runs: int = 0

    def blame(self, problem: str) -> None:
        """Said at once: whoever looks on need not wait for the end."""
        self.problems.append(problem)
        print(problem, file=sys.stderr, flush=True)


def build_library(folder: Path) -> Path | str:
    """The library to preload, or why there is none."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler"
    library = folder / "failing.so"
    source = Path(__file__).with_name("failing.c")
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return library if done.returncode == 0 else f"{compiler} failed: {done.stderr[-300:]}"


def fail_operations(
    server: Server, job: Job, folder: Path, whole: Path, wanted: Collection[tuple[str, str]] | None = None
) -> dict[str, Any]:
    """Kinds are taken in the order of a run, so that one run is ended many times on its way.

    Args:
      wanted: (call, kind of path); None: all there are.
    """
    kinds = {kind: of for kind, of in trace(server, job, folder).items() if wanted is None or kind in wanted}
    found, tries, name = Operations(), Counter[tuple[str, str]](), ""
    waiting, number = list(kinds), 0
    run_dir = folder / "run0"
    with stage_progress("file operations", len(kinds), "kinds", console=build_console(True)) as bar:
        while waiting:
            call, kind = waiting[0]
            fresh = not run_dir.exists()
            fired, code, said = _fail_one(server, job, run_dir, folder, call, kinds[call, kind])
            name = f"{call} {kind}"
            tries[call, kind] += 1
            if fired:
                _judge(found, name, code, said)
            elif fresh or tries[call, kind] > 1:
                found.not_reached.append(name)
            if fired or name in found.not_reached:
                waiting.pop(0)
                bar.advance(1, name)
            if code == 0 or code is None:  # at its end, or it hung
                wrong = differences(snapshot(whole), snapshot(run_dir)) if code == 0 else []
                for place in wrong[:5]:
                    found.blame(f"after {name}: {place} is not the same")
                found.runs, number = found.runs + 1, number + 1
                shutil.rmtree(run_dir)
                run_dir = folder / f"run{number}"
    if run_dir.exists():  # the last one, which has not come to its end yet
        server.start(job.words(run_dir), folder / "log.last")
        code = server.wait(WITHIN_S)
        for place in differences(snapshot(whole), snapshot(run_dir))[:5]:
            found.blame(f"after {name}: {place} is not the same (it ended with {code})")
        found.runs += 1
    return {
        "kinds": len(kinds),
        "failed": sum(found.ends.values()),
        "ends": dict(found.ends),
        "runs": found.runs,
        "not_reached": found.not_reached,
        "problems": found.problems,
    }


def _judge(found: Operations, name: str, code: int | None, said: str) -> None:
    words = [*check_words(said)]
    if code == 2 and count_errors(said) == 1 and not words:
        found.ends["refused"] += 1
    elif code in (0, -signal.SIGKILL) and not words:
        found.ends["did without"] += 1
    else:
        found.ends["failed"] += 1
        found.blame(f"{name}: ended with {code}; {' '.join(words)} {said[-300:]!r}")


def trace(server: Server, job: Job, folder: Path) -> dict[tuple[str, str], str]:
    """(call, kind of path) -> a pattern of the first path, of a run from start to end, in its order."""
    run_dir, path = folder / "traced", folder / "trace"
    env = {"DRILL_ROOT": str(run_dir), "DRILL_TRACE": str(path)}
    server.start(job.words(run_dir), folder / "log.traced", env=env)
    if server.wait(WITHIN_S) != 0:
        raise SystemExit(f"a traced run failed: {(folder / 'log.traced').read_text()[-2000:]}")
    kinds: dict[tuple[str, str], str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        call, _, place = line.partition("\t")
        inner = place[len(str(run_dir)) :].lstrip("/")
        kinds.setdefault((call, kind_of(inner)), starred(inner))
    shutil.rmtree(run_dir)
    return kinds


def _fail_one(
    server: Server, job: Job, run_dir: Path, folder: Path, call: str, pattern: str
) -> tuple[bool, int | None, str]:
    """(whether it came to that, exit code, what was said)"""
    fired, log = folder / "fired", folder / "log"
    for path in (fired, log):
        path.unlink(missing_ok=True)
    env: Mapping[str, str] = {
        "DRILL_ROOT": str(run_dir),
        "DRILL_CALL": call,
        "DRILL_PATH": f"{run_dir}/{pattern}".rstrip("/"),
        "DRILL_ERRNO": str(_NUMBERS.get(call, errno.EIO)),
        "DRILL_FIRED": str(fired),
    }
    server.start(job.words(run_dir), log, env=env)
    deadline, code = time.monotonic() + WITHIN_S, None
    while code is None and not fired.exists() and time.monotonic() < deadline:
        code = server.wait(0.05)
    # Where it does without that file, there is no need to wait for the end: it is ended, and goes on once more.
    code = server.wait(GOES_ON_S if fired.exists() else 0) if code is None else code
    if code is None:
        code = server.kill() if fired.exists() else None
    if code is None:
        server.kill()
    return fired.exists(), code, log.read_text(encoding="utf-8", errors="replace")
