"""Faults of one process: what each does to a run, and what it must come to.

Each takes the job and a folder of its own, and returns its figures with a list `problems`. Beside the folder lie what
they share: an uninterrupted run, and compiled programs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from drift_jax.config import load_config
from drift_jax.manifest import Manifest
from drift_jax.telemetry import read_metrics
from drills.kills import RUNS_WITHIN_S, run_whole
from drills.operations import build_library, fail_operations
from drills.runs import Job, Witness, check_words, count_errors, differences, keys_of, kind_of, snapshot
from drills.server import Server

Figures = dict[str, Any]
REFUSED = 2  # exit code of an error that is told in words
MOST_TIMES = 10  # memory that bad input may take, in its own size


class Drill:
    """A run directory that is worked on by one command after the other."""

    def __init__(self, server: Server, job: Job, folder: Path) -> None:
        self.server, self.job = server, job
        self.run_dir, self.log = folder / "run", folder / "log"
        self.problems: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *more: str, hooks: Mapping[str, Sequence[Any]] | None = None) -> int:
        self.log.write_text("", encoding="utf-8")
        return self.server.start([*self.job.words(self.run_dir), *more], self.log, hooks)

    def run(self, *more: str, hooks: Mapping[str, Sequence[Any]] | None = None) -> int | None:
        """One command from start to end; what it may never say is a problem."""
        self.start(*more, hooks=hooks)
        code = self.server.wait(RUNS_WITHIN_S)
        self.problems += check_words(self.said())
        return code

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """SIGKILL as soon as it holds."""
        while not condition():
            if self.server.wait(0.002) is not None:
                raise SystemExit(f"it ended before it could be killed:\n{self.said()[-2000:]}")
        self.server.kill()

    def compare(self, whole: Path, but: Sequence[str] = ()) -> list[str]:
        """Files that are not as those of an uninterrupted run, each of them a problem."""
        wrong = [place for place in differences(snapshot(whole), snapshot(self.run_dir)) if place not in but]
        self.problems += [f"{place} is not the same" for place in wrong[:10]]
        return wrong


@contextmanager
def serving(job: Job, folder: Path, env: Mapping[str, str] | None = None) -> Iterator[tuple[Server, Path]]:
    """A server, and the directory of an uninterrupted run, which is made if no drill before has made it."""
    cache, done = folder.parent / "cache", folder.parent / "faultless"
    folder.mkdir(parents=True, exist_ok=True)
    with Server(cache, env) as server:
        if not (done / "seconds").exists():
            shutil.rmtree(done, ignore_errors=True)
            _, seconds = run_whole([server], job, done)
            (done / "seconds").write_text(str(seconds), encoding="utf-8")
        yield server, done / "run"


def full_disk(job: Job, folder: Path) -> Figures:
    """The disk is full at several points of a run; with more room the same command goes on."""
    shares, points, problems = (0.02, 0.15, 0.4, 0.7, 0.93), [], []
    with serving(job, folder) as (server, whole):
        size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        for share in shares:
            disk = folder / f"disk{share}"
            disk.mkdir()
            options = f"size={int(share * size)}"
            mounted = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, text=True, check=False
            )
            if mounted.returncode:
                return {"skipped": f"cannot mount a small tmpfs: {mounted.stderr.strip()}", "problems": []}
            try:
                drill = Drill(server, job, disk)
                drill.log = folder / f"log{share}"
                code = drill.run()
                if code != REFUSED or "No space left on device" not in drill.said():
                    drill.problems.append(f"a full disk ended it with {code}: {drill.said()[-300:]}")
                options = f"remount,size={4 * size}"
                subprocess.run(["mount", "-o", options, disk], check=True)
                again = drill.run()
                if again != 0:
                    drill.problems.append(f"with room it ended with {again}: {drill.said()[-300:]}")
                else:
                    drill.compare(whole)
            finally:
                subprocess.run(["umount", "-l", disk], check=True)
            points.append({"share_of_room": share, "refused": code == REFUSED, "finished": again == 0})
            problems += [f"at {share} of the room: {problem}" for problem in drill.problems]
    return {"points": points, "problems": problems}


def damaged_bytes(job: Job, folder: Path) -> Figures:
    """One bit of one file of each kind changes, in a run that was killed and in one that was finished.

    It is refused in words, or made anew, or nobody reads that file; what must not be is that other files differ.
    """
    ends: Counter[str] = Counter()
    found: dict[str, str] = {}
    with serving(job, folder) as (server, whole):
        drill = Drill(server, job, folder)
        last = f"iter_{_iterations(whole)}"
        drill.start()
        drill.kill_when((drill.run_dir / last / "checkpoints" / "1").exists)
        stopped = folder / "stopped"
        shutil.copytree(drill.run_dir, stopped)
        if drill.run() != 0:
            raise SystemExit(f"it did not go on: {drill.said()[-2000:]}")
        drill.compare(whole)
        finished = folder / "finished"
        shutil.copytree(drill.run_dir, finished)
        for state in (stopped, finished):
            for kind, place in sorted(_kinds(state).items()):
                shutil.rmtree(drill.run_dir)
                shutil.copytree(state, drill.run_dir)
                before = snapshot(drill.run_dir)
                _flip(drill.run_dir / place)
                end = _judge_damage(drill, place, whole, before)
                ends[end] += 1
                found[f"{state.name} {kind}"] = end
    return {"files": len(found), "ends": dict(ends), "each": found, "problems": drill.problems}


def _judge_damage(drill: Drill, place: str, whole: Path, before: Mapping[str, str]) -> str:
    code, said = drill.run(), drill.said()
    if code == REFUSED:
        if count_errors(said) != 1:
            drill.problems.append(f"{place}: not one error: {said[-300:]}")
        return "refused"
    if code != 0:
        drill.problems.append(f"{place}: ended with {code}: {said[-300:]}")
        return "failed"
    name = place if "checkpoints" not in place else ""
    aside = [path for path in snapshot(drill.run_dir) if path.endswith(".damaged")]
    warned = ["manifest.json"] if aside else []  # what was put aside is among the stage's warnings
    wrong = drill.compare(whole, but=[name, *aside, *warned])
    if wrong:
        drill.problems.append(f"{place} was damaged")
        return "wrong"
    if "checkpoints" in place:
        return "put aside" if aside else "not read"
    return "made anew" if snapshot(drill.run_dir).get(name) == before.get(name) else "not read"


def _kinds(run_dir: Path) -> dict[str, str]:
    """A place in the directory for each kind of file: that of the last stage, from which a run goes on."""
    places = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()]
    return {kind_of(place): place for place in sorted(places, key=lambda place: (not place.startswith("seed"), place))}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes()) or bytearray(b"\0")
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _iterations(run_dir: Path) -> int:
    return len([*run_dir.glob("iter_*")])


def nonfinite(job: Job, folder: Path) -> Figures:
    """A NaN reaches the gradient of the second update: the stage stops, and goes on without it if that is wanted."""
    poison = {"poison": [2]}
    with serving(job, folder) as (server, _):
        drill = Drill(server, job, folder)
        if drill.run(hooks=poison) != REFUSED or "the gradient of update 2 is not finite" not in drill.said():
            drill.problems.append(f"it was not stopped: {drill.said()[-300:]}")
        code = drill.run("--set", "train.on_nonfinite=skip", hooks=poison)
        stages = Manifest(drill.run_dir).stages() if code == 0 else {}
        skipped = {name: of["summary"].get("skipped_updates") for name, of in stages.items() if name.endswith("/train")}
        long = {name: of["summary"]["steps"] >= 2 for name, of in stages.items() if name.endswith("/train")}
        if not any(long.values()) or skipped != {name: 1 if is_long else None for name, is_long in long.items()}:
            drill.problems.append(f"with skip it ended with {code} and counted {skipped}: {drill.said()[-300:]}")
        for name, is_long in long.items():
            rows = read_metrics(drill.run_dir / name.split("/")[0])
            bad = [row["step"] for row in rows if math.isnan(row["grad_norm"])]
            if bad != [2] * is_long:
                drill.problems.append(f"{name}: metrics have NaN at updates {bad}")
    return {"skipped": skipped, "problems": drill.problems}


def big_row(job: Job, folder: Path, size: int = 50 * 10**6) -> Figures:
    """A single record whose complaint has 50 MB: refused by its line and in little memory, or left out and counted."""
    with serving(job, folder) as (server, _):
        given = [change.partition("=")[2] for change in job.changes if change.startswith("data.dsat=")]
        source = Path(given[0] if given else load_config(job.config).data.dsat or "")
        rows = source.read_text(encoding="utf-8").splitlines()
        row = json.loads(rows[-1]) | {"id": "big"}
        row["prompt"][-1]["content"] = "word " * (size // 5)
        path = folder / "dsat.jsonl"
        path.write_text("\n".join([*rows[:8], json.dumps(row), *rows[8:], ""]), encoding="utf-8")
        drill = Drill(server, Job(job.config, (*job.changes, f"data.dsat={path}")), folder)
        before = psutil.Process(server.process.pid).memory_info().rss
        drill.start()
        with _peak(server) as peak:
            code = server.wait(RUNS_WITHIN_S)
        times = (peak[0] - before) / size
        drill.problems += check_words(drill.said())
        if code != REFUSED or f"{path}:9: the messages have" not in drill.said():
            drill.problems.append(f"it was not refused by its line ({code}): {drill.said()[-300:]}")
        if times > MOST_TIMES:
            drill.problems.append(f"refusing it took {times:.0f} times its size in memory")
        code = drill.run("--on-bad-row", "skip")
        stages = Manifest(drill.run_dir).stages() if code == 0 else {}
        summaries = [of["summary"] for name, of in stages.items() if name.endswith(("/sample", "/pair"))]
        drops = [summary["drops"]["bad row"] for summary in summaries]
        if not drops or set(drops) != {1}:
            drill.problems.append(f"left out it ended with {code} and was counted {drops}: {drill.said()[-300:]}")
    return {"counted": drops, "memory_times_row": round(times, 1), "problems": drill.problems}


@contextmanager
def _peak(server: Server) -> Iterator[list[int]]:
    """The most resident bytes of what the server runs, as a list of one."""
    most, over, pid = [0], threading.Event(), server.pid

    def watch() -> None:
        while not over.wait(0.05):
            with suppress(psutil.Error):
                most[0] = max(most[0], psutil.Process(pid).memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def clock_jumps(job: Job, folder: Path) -> Figures:
    """The clock of the day goes back a month in the midst of a run, which is killed, and goes on in the year after."""
    month = 30 * 86400.0
    with serving(job, folder) as (server, whole):
        drill = Drill(server, job, folder)
        seconds = float((whole.parent / "seconds").read_text(encoding="utf-8"))
        drill.start(hooks={"shift_clock": [-month, seconds / 6]})
        drill.kill_when((drill.run_dir / "iter_1" / "checkpoints" / "1").exists)
        witness = Witness(drill.run_dir)
        code = drill.run(hooks={"shift_clock": [12 * month, 0.0]})
        if code != 0:
            drill.problems.append(f"it ended with {code}: {drill.said()[-300:]}")
        else:
            drill.compare(whole)
        lost, doubled, problems = witness.ask(drill.said())
    return {"lost": lost, "doubled": doubled, "problems": drill.problems + problems}


def killed_server(job: Job, folder: Path) -> Figures:
    """vLLM's engine gets SIGKILL while it answers: it is started again, and no reply is lost or asked for twice."""
    python = os.environ.get("DRIFT_VLLM_PYTHON")
    if not python:
        return {"skipped": "DRIFT_VLLM_PYTHON does not name the interpreter that has vLLM", "problems": []}
    changes = ("sampling.engine=vllm", f"vllm.python={python}", "vllm.device=cpu", "vllm.concurrency=4", "sampling.n=8")
    more = ("sampling.max_new_tokens=48", "recipe.iterations=1", "recipe.showcase_prompts=[]")
    folder.mkdir(parents=True)
    run_dir, log = folder / "run", folder / "log"
    words = Job(job.config, (*job.changes, *changes, *more)).words(run_dir)
    journal = run_dir / "iter_1" / "completions.partial.jsonl"
    with log.open("wb") as out:
        run = subprocess.Popen([sys.executable, "-m", "drift_jax", *map(str, words)], stdout=out, stderr=out)
        while run.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 16):
            time.sleep(0.05)
        tree = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
        engines = [process for process in tree if any("EngineCore" in word for word in process.cmdline())]
        for engine in engines:
            engine.send_signal(signal.SIGKILL)
        witness = Witness(run_dir)
        code = run.wait()
    said = log.read_text(encoding="utf-8", errors="replace")
    lost, doubled, problems = witness.ask(said)
    problems += check_words(said)
    if code != 0 or not engines:
        problems.append(f"{len(engines)} engines were killed, and it ended with {code}: {said[-600:]}")
    result = journal.with_name("completions.jsonl")
    rows = keys_of(result, result.read_bytes()) if code == 0 else Counter()
    again = "vLLM has died and is started again" in " ".join(said.split())
    problems += [] if again else ["it does not say that vLLM has died"]
    return {"started_again": again, "lost": lost, "doubled": doubled + rows.total() - len(rows), "problems": problems}


def operations(job: Job, folder: Path) -> Figures:
    """Each kind of file operation fails once (operations.py)."""
    folder.mkdir(parents=True)
    library = build_library(folder)
    if isinstance(library, str):
        return {"skipped": library, "problems": []}
    with serving(job, folder, {"LD_PRELOAD": str(library)}) as (server, whole):
        return fail_operations(server, job, folder, whole)


FAULTS: dict[str, Callable[[Job, Path], Figures]] = {
    "operations": operations,
    "disk": full_disk,
    "bytes": damaged_bytes,
    "nonfinite": nonfinite,
    "row": big_row,
    "clock": clock_jumps,
    "vllm": killed_server,
}
