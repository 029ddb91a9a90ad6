"""Failure drills: a run is killed, starved and damaged on purpose, and must end as one that was not.

    python scripts/drill.py --kills 50                 SIGKILL at random moments of configs/debug.yaml
    python scripts/drill.py --kills 10 --processes 2   the same run on two processes, of which one is killed, or both
    python scripts/drill.py --faults operations,disk   other drills, see below; `all` does each

After each kill the same command goes on. At the end weights, pairs, metrics and all other files are compared, bit for
bit, with a run that nobody ended, and rows are counted: lost are those that were on disk and were made again, or are
missing; doubled are those that are there twice. One line of JSON: `kills`, `identical` (kills of runs that ended
identical), `lost`, `doubled`, and what each fault did. Exit code 1: something was not as it must be.

Faults:
  operations  each kind of file operation fails once: open, read, write, fsync, rename, remove (needs a C compiler)
  disk        the disk is full, at several points (needs the right to mount a tmpfs)
  bytes       a byte changes in a file of each kind
  nonfinite   a NaN reaches a gradient, with train.on_nonfinite stop and skip
  row         a single row of 50 MB
  clock       the clock of the day jumps, back and forth
  vllm        the engine of the vLLM server is killed (needs DRIFT_VLLM_PYTHON)
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "scripts")]  # runs from a checkout that is not installed

from drills.faults import FAULTS  # noqa: E402
from drills.kills import Outcome, kill_and_go_on, run_whole  # noqa: E402
from drills.runs import Job  # noqa: E402
from drills.server import Server  # noqa: E402

from drift_jax.cli.options import build_console  # noqa: E402
from drift_jax.progress import stage_progress  # noqa: E402

MOST_KILLS = 3  # of one run


def main() -> int:
    args = parse_args()
    os.chdir(REPO)  # the config's paths
    folder = args.out or Path(tempfile.mkdtemp(prefix="drift-drill-"))
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(args.config, (f"model.path={args.model}", *args.set))
    found: dict[str, Any] = {}
    if args.kills:
        found |= drill_kills(job, folder, args)
    for name in args.faults:
        found[name] = FAULTS[name](job, folder / name)
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    problems = [*found.get("problems", ()), *(f"{n}: {p}" for n in args.faults for p in found[n]["problems"])]
    print(json.dumps(found))
    if not problems and args.out is None:
        shutil.rmtree(folder)
    return 1 if problems or found.get("identical", 0) != found.get("kills", 0) else 0


def drill_kills(job: Job, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`args.jobs` runs at a time, each on its own share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i :: args.jobs] or cores for i in range(args.jobs)]
    env = {"JAX_NUM_CPU_DEVICES": "1"} if args.processes > 1 else {}
    with ExitStack() as stack, stage_progress("kills", args.kills, "kills", console=build_console(True)) as bar:
        teams: queue.Queue[list[Server]] = queue.Queue()
        for share in shares:
            of = [Server(folder / "cache", env, share) for _ in range(args.processes)]
            for server in of:
                stack.enter_context(server)
            teams.put(of)
        first = teams.get()
        run_whole(first, job, folder / "compiles")  # what a run compiles is in the cache from here on
        whole, seconds = run_whole(first, job, folder / "whole")
        teams.put(first)

        def one(index: int, kills: int) -> Outcome:
            team = teams.get()
            try:
                chance = random.Random(f"{args.seed} {index}")
                found = kill_and_go_on(team, job, folder / f"run{index}", whole, seconds, kills, chance)
            finally:
                teams.put(team)
            bar.advance(found.kills)
            for problem in found.problems:
                print(f"run {index}: {problem}", file=sys.stderr, flush=True)
            return found

        outcomes: list[Outcome] = []
        chance = random.Random(args.seed)
        with ThreadPoolExecutor(args.jobs) as pool:
            while (left := args.kills - sum(outcome.kills for outcome in outcomes)) > 0:
                plan: list[int] = []
                while sum(plan) < left:
                    plan.append(min(chance.randint(1, MOST_KILLS), left - sum(plan)))
                outcomes += pool.map(one, range(len(outcomes), len(outcomes) + len(plan)), plan)
    return summarise(outcomes, seconds, args.processes)


def summarise(outcomes: Sequence[Outcome], seconds: float, processes: int) -> dict[str, Any]:
    return {
        "kills": sum(outcome.kills for outcome in outcomes),
        "identical": sum(outcome.kills for outcome in outcomes if outcome.identical and not outcome.problems),
        "lost": sum(outcome.lost for outcome in outcomes),
        "doubled": sum(outcome.doubled for outcome in outcomes),
        "runs": len(outcomes),
        "processes": processes,
        "seconds_of_a_run": round(seconds, 1),
        "problems": [problem for outcome in outcomes for problem in outcome.problems],
    }


def parse_args() -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return list(FAULTS) if text == "all" else [part for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="of the run that is killed")
    parser.add_argument("--faults", type=listed, default=[], metavar="NAME[,NAME...]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--config", type=Path, default=REPO / "configs" / "debug.yaml")
    parser.add_argument("--model", default=str(REPO / ".cache" / "tiny_model"), help="scripts/make_tiny_model.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="config keys, as in drift run")
    parser.add_argument("--out", type=Path, help="keeps runs and logs there; else those of problems alone")
    args = parser.parse_args()
    unknown = [name for name in args.faults if name not in FAULTS]
    if unknown:
        parser.error(f"no such fault: {unknown[0]}. There are {', '.join(FAULTS)}.")
    if not args.kills and not args.faults:
        parser.error("nothing to do: give --kills or --faults")
    if not Path(args.model).is_dir():
        parser.error(f"there is no model in {args.model}: python scripts/make_tiny_model.py")
    return args


if __name__ == "__main__":
    sys.exit(main())
