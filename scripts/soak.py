"""Whether a run leaks: the debug recipe for many iterations in one process, and what each of them leaves.

    python scripts/soak.py [--iterations 20] [--model .cache/tiny_model] [--set KEY=VALUE ...]

After each iteration this process and its children are counted: resident memory, open files, processes, threads, live
JAX arrays, and the bytes on the disk: what the iteration itself leaves, its checkpoints, the run's own files, caches,
temporary files. From the third iteration on nothing may grow but what a finished iteration has to leave, which must be
the same each time. One line of JSON has the figures and the verdict; exit code 1: it leaks.

Files, processes and arrays may not grow at all. Memory, threads and caches are judged by their trend over the last two
thirds of the iterations: allocators and pools breathe, and a batch of a shape that was not there before is one more
program, in memory and in the cache. So a verdict on few iterations needs batches of one shape.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # runs from a checkout that is not installed

import jax  # noqa: E402
import psutil  # noqa: E402
from rich.console import Console  # noqa: E402

from drift_jax import recipe  # noqa: E402
from drift_jax.config import RunConfig, load_config  # noqa: E402
from drift_jax.errors import DriftError  # noqa: E402

FIRST = 3  # the first iteration whose figures are compared: programs are compiled and caches are filled by then
EXACT = ("open_files", "processes", "jax_arrays", "temporary_bytes")
_SETTLE_S = 5.0  # pools end their threads by themselves, a moment after the work


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--config", type=Path, default=REPO / "configs" / "debug.yaml")
    parser.add_argument("--model", default=str(REPO / ".cache" / "tiny_model"), help="scripts/make_tiny_model.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="config keys, as in drift run")
    parser.add_argument("--slack", type=float, default=0.02, help="growth of memory that is still no growth")
    args = parser.parse_args()
    os.chdir(REPO)  # the config's paths
    with tempfile.TemporaryDirectory(prefix="drift-soak-") as folder:
        changes = [f"recipe.iterations={args.iterations}", f"model.path={args.model}", *args.set]
        temporary = Path(folder) / "tmp"
        temporary.mkdir()
        before = os.environ.get("TMPDIR")
        tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)  # ours and that of children
        try:
            config = load_config(args.config, [*changes, f"run_dir={Path(folder) / 'run'}"])
            figures = soak(config, temporary)
        except DriftError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:  # whoever goes on in this process needs a directory that is there
            tempfile.tempdir = None
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before
    problems = judge(figures, args.slack)
    print(json.dumps({"iterations": figures, "flat": not problems, "problems": problems}))
    return 1 if problems else 0


def soak(config: RunConfig, temporary: Path) -> list[dict[str, Any]]:
    """Runs the recipe. Returns a row for each iteration; `temporary` is where temporary files go."""
    figures: list[dict[str, Any]] = []
    run_dir, iterate = Path(config.run_dir), recipe.Recipe.iterate
    with PeakMemory() as peak:

        def measured(self: recipe.Recipe, iteration: int, policy: Path, initial: Path) -> Path:
            start, _ = time.monotonic(), peak.take()
            made = iterate(self, iteration, policy, initial)
            seconds = time.monotonic() - start
            most = peak.take()
            row = {"iteration": iteration, "seconds": round(seconds, 2), "peak_mib": mib(most)}
            figures.append(row | count_process() | count_disk(run_dir, iteration, temporary))
            print(json.dumps(figures[-1]), file=sys.stderr, flush=True)
            return made

        recipe.Recipe.iterate = measured
        try:
            recipe.run(config, Console(file=io.StringIO()))
        finally:
            recipe.Recipe.iterate = iterate
    return figures


def count_process() -> dict[str, int | float]:
    """Of this process and its children, once nothing is waiting to be collected."""
    gc.collect()
    me = psutil.Process()
    tree = [me, *me.children(recursive=True)]
    # A thread that has nothing left to do may take a moment to end.
    deadline, least = time.monotonic() + _SETTLE_S, sum(p.num_threads() for p in tree)
    while time.monotonic() < deadline:
        time.sleep(0.25)
        now = sum(p.num_threads() for p in tree if p.is_running())
        if now == least:
            break
        least = now
    return {
        "memory_mib": mib(sum(p.memory_info().rss for p in tree)),
        "open_files": sum(p.num_fds() for p in tree),
        "processes": len(tree),
        "threads": least,
        "jax_arrays": len(jax.live_arrays()),
    }


def count_disk(run_dir: Path, iteration: int, temporary: Path) -> dict[str, int]:
    """Bytes of files: by what they are for."""
    stages = [path for path in run_dir.iterdir() if path.name == "seed" or path.name.startswith("iter_")]
    kept = {path.name: size_of(path) for path in stages}
    own = run_dir / f"iter_{iteration}"
    return {
        "iteration_bytes": kept[own.name],
        "iteration_files": sum(path.is_file() for path in own.rglob("*")),
        "checkpoints": sum(path.is_dir() for path in (own / "checkpoints").iterdir()),
        "earlier_bytes": sum(kept.values()) - kept[own.name],
        "cache_bytes": size_of(run_dir / ".cache"),
        "run_bytes": size_of(run_dir) - sum(kept.values()) - size_of(run_dir / ".cache"),
        "temporary_bytes": size_of(temporary),
    }


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def judge(figures: Sequence[Mapping[str, Any]], slack: float) -> list[str]:
    """What grows; empty when all is flat. Needs `FIRST` + 1 iterations or more."""
    steady = [row for row in figures if row["iteration"] >= FIRST]
    if len(steady) < 2:
        return [f"{len(figures)} iterations are too few: from iteration {FIRST} on two are needed"]
    problems = []
    for name in EXACT:
        values = [row[name] for row in steady]
        if max(values[1:]) > values[0]:
            problems.append(f"{name} grows: {values}")
    third = max(1, len(steady) // 3)
    for name, most in (("memory_mib", slack), ("peak_mib", slack), ("threads", 0.1), ("cache_bytes", 0.1)):
        values = [row[name] for row in steady]
        before, last = (statistics.median(part) for part in (values[-2 * third : -third], values[-third:]))
        if last > before * (1 + most):
            problems.append(f"{name} grows from {before} to {last}: {values}")
    # What an iteration leaves: weights, moments and rows of the same sizes; texts differ, and so does into how many
    # files the writer of checkpoints cuts them.
    for name, most in (("iteration_bytes", 0.03), ("iteration_files", 0.25), ("checkpoints", 0.0)):
        values = [row[name] for row in steady]
        if max(values) > min(values) * (1 + most):
            problems.append(f"{name} differs: {values}")
    # The manifest and the log have lines for each stage: they grow by as much each time.
    grown = [later["run_bytes"] - row["run_bytes"] for row, later in itertools.pairwise(steady)]
    if max(grown) > 1.1 * min(grown):
        problems.append(f"run_bytes grows by {grown}")
    # One more iteration is finished each time, and what was finished before stays as it was.
    earlier = [later["earlier_bytes"] - row["earlier_bytes"] for row, later in itertools.pairwise(steady)]
    if earlier != [row["iteration_bytes"] for row in steady[:-1]]:
        problems.append(f"iterations that are finished grow: {earlier}")
    return problems


class PeakMemory:
    """The most resident memory of this process and its children since the last look, seen every `every_s` seconds."""

    def __init__(self, every_s: float = 0.05) -> None:
        self._every_s, self._most, self._over = every_s, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._over.wait(self._every_s):
            self._most = max(self._most, me.memory_info().rss)

    def take(self) -> int:
        most, self._most = self._most, 0
        return most

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def mib(size: int) -> float:
    return round(size / 2**20, 1)


if __name__ == "__main__":
    sys.exit(main())
