"""Does a policy learn what its users complain about? DRIFT, unguided DRIFT, SPIN and iterative DPO, measured.

    python scripts/study_verifiable.py [--out runs/study] [--seeds 0,1,2] [--methods drift,spin] [--figures DIR]
    python scripts/study_verifiable.py --tune        the learning rates that configs/study/*.yaml have

Real questions, a real model, and a user whose complaints a program can check (`study/user.py`): they want a short
reply in plain sentences, and say so only afterwards. The log holds the model's own replies and the complaints
(`study/logs.py`). Each method then runs configs/study/METHOD.yaml, the same recipe as `drift run`, from the same model
on the same questions. What counts is measured on other questions, without any complaint (`study/measure.py`).

Killed at any moment, the same command goes on from there. Runs are processes of their own, --jobs at a time; what they
say is in --out/NAME.log. Weights of a run are removed once it is measured, unless --keep-weights says otherwise. Writes
results.json, results.md and figures; prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "scripts")]  # runs from a checkout that is not installed

CONFIGS = REPO / "configs" / "study"
METHODS = ("drift", "drift-unguided", "spin", "iterdpo")
BASE = "base"
HELD_OUT, VALIDATION = 32, 24  # of the questions, the first ones; the others are trained on
RATES = (1e-6, 3e-6, 1e-5)  # learning rates that are tried for each method
TUNE_SEED = 100
TUNED_FOR = "satisfied"


@dataclass(frozen=True)
class Task:
    """A run of the recipe and the measurements of its policies; or those of the model that all runs start from."""

    name: str
    method: str  # of configs/study, or `base`
    seed: int
    overrides: tuple[str, ...] = ()
    validation: bool = False  # its last policy alone is measured, on the questions for tuning


def main() -> int:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.task is not None:
        # Two processes of one core each take less time than one after another on two.
        os.sched_setaffinity(0, args.cores)
        work(Task(**json.loads(args.task)), args)
        return 0
    with clock(args.out / ("seconds.tune.json" if args.tune else "seconds.json")):
        start([Task("log", "log", 0)], args)
        start(tuning(args.methods) if args.tune else comparison(args.methods, args.seeds), args)
    print(json.dumps(best_rates(args) if args.tune else results(args)))
    return 0


def comparison(methods: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """Seeds are the outer loop: what is there after a while can be compared."""
    return [Task(f"{method}-s{seed}", method, seed) for seed in seeds for method in (BASE, *methods)]


def tuning(methods: Sequence[str]) -> list[Task]:
    """The same rates for each method, one seed, other questions than those of the comparison."""
    return [
        Task(f"tune-{method}-{rate:.0e}", method, TUNE_SEED, (f"train.learning_rate={rate!r}",), validation=True)
        for method in methods
        for rate in RATES
    ]


def start(tasks: Sequence[Task], args: argparse.Namespace) -> None:
    """Does what is not done yet, `args.jobs` processes at a time, each on its own share of the cores."""
    from drift_jax.cli.options import build_console
    from drift_jax.progress import stage_progress

    left = [task for task in tasks if not (args.out / f"{task.name}.done").exists()]
    jobs = min(args.jobs, len(left)) or 1
    cores = sorted(os.sched_getaffinity(0))
    shares: queue.Queue[list[int]] = queue.Queue()
    for i in range(jobs):
        shares.put(cores[i::jobs] or cores)

    def run(task: Task) -> None:
        share = shares.get()
        given = ["--task", json.dumps(vars(task)), "--cores", ",".join(map(str, share))]
        try:
            with (args.out / f"{task.name}.log").open("a", encoding="utf-8") as log:
                command = [sys.executable, __file__, *sys.argv[1:], *given]
                done = subprocess.run(command, stdout=log, stderr=log, check=False)
        finally:
            shares.put(share)
        if done.returncode:
            raise SystemExit(f"{task.name} failed: see {args.out / f'{task.name}.log'}")

    with (
        ThreadPoolExecutor(jobs) as pool,
        stage_progress("study", len(left), "runs", console=build_console(True)) as bar,
    ):
        futures = {pool.submit(run, task): task for task in left}
        try:
            for future in as_completed(futures):
                future.result()
                bar.advance(1, futures[future].name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def work(task: Task, args: argparse.Namespace) -> None:
    """One task, or what is left of it."""
    import jax
    from study.logs import make_logs
    from study.measure import measure

    from drift_jax.cli.options import build_console
    from drift_jax.recipe import run

    # One cache for all runs: they compile the same programs.
    jax.config.update("jax_compilation_cache_dir", str((args.out / ".cache" / "xla").absolute()))
    rows = [json.loads(line) for line in (CONFIGS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    console, model, folder = build_console(), Path(args.model), args.out / task.name
    asked = rows[HELD_OUT : HELD_OUT + VALIDATION] if task.validation else rows[:HELD_OUT]
    config = load(task, args)
    if task.method == "log":
        make_logs(config, model, rows[HELD_OUT + VALIDATION :], folder, console)
    elif task.method == BASE:
        measure(config, model, model, asked, task.seed, folder / "held_out", console)
    else:
        run(config, console)
        stages = [folder / f"iter_{k}" for k in range(1, config.recipe.iterations + 1)]
        for stage in stages[-1:] if task.validation else stages:
            measure(config, stage / "hf", model, asked, task.seed, stage / "held_out", console)
        for stage in () if args.keep_weights else stages:
            shutil.rmtree(stage / "hf")
            shutil.rmtree(stage / "checkpoints")
    (args.out / f"{task.name}.done").touch()


def load(task: Task, args: argparse.Namespace) -> Any:
    from drift_jax.config import load_config

    method = METHODS[0] if task.method in (BASE, "log") else task.method
    values = {
        "run_dir": args.out / task.name,
        "model.path": args.model,
        "data.dsat": args.out / "log" / "dsat.jsonl",
        "data.sat": args.out / "log" / "sat.jsonl",
        "sampling.seed": task.seed,
        "train.seed": task.seed,
    }
    return load_config(
        CONFIGS / f"{method}.yaml", [f"{key}={value}" for key, value in values.items()] + [*task.overrides]
    )


def results(args: argparse.Namespace) -> dict[str, Any]:
    from study.results import summarise, write_results

    found = summarise(args.out, args.methods, args.seeds)
    write_results(found, args.figures or args.out)
    return found["headline"] | {"seconds": round(found["seconds"]), "commit": found["commit"]}


def best_rates(args: argparse.Namespace) -> dict[str, Any]:
    """Of each method the rate whose last policy satisfies most; of equals the lowest."""
    from drift_jax.files import write_json

    found: dict[str, dict[str, float]] = {method: {} for method in args.methods}
    for task, (method, rate) in zip(tuning(args.methods), [(m, r) for m in args.methods for r in RATES], strict=True):
        (path,) = (args.out / task.name).glob("iter_*/held_out/measured.json")
        values = json.loads(path.read_text(encoding="utf-8"))["per_prompt"][TUNED_FOR]
        found[method][f"{rate:.0e}"] = round(sum(values) / len(values), 4)
    best = {method: max(rates, key=lambda rate: (rates[rate], -float(rate))) for method, rates in found.items()}
    write_json(args.out / "tune.json", {TUNED_FOR: found, "best": best})
    return {TUNED_FOR: found, "best": best}


@contextmanager
def clock(path: Path) -> Iterator[None]:
    """Adds the seconds of the block to those of earlier calls."""
    from drift_jax.files import write_json

    start = time.monotonic()
    try:
        yield
    finally:
        before = json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else 0.0
        write_json(path, {"seconds": before + time.monotonic() - start})


def parse_args() -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--model", default=".cache/demo_model", help="a model directory; scripts/get_demo_model.py")
    parser.add_argument("--methods", type=listed, default=list(METHODS), help="names of files of configs/study")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in listed(text)], default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; 1 on an accelerator")
    parser.add_argument("--tune", action="store_true", help="try learning rates instead of comparing methods")
    parser.add_argument("--keep-weights", action="store_true", help="4.3 GB a run")
    parser.add_argument("--figures", type=Path, help="folder of results.json, results.md and figures; default: --out")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=lambda text: [int(part) for part in listed(text)], help=argparse.SUPPRESS)
    args = parser.parse_args()
    missing = [method for method in args.methods if not (CONFIGS / f"{method}.yaml").is_file()]
    if missing:
        parser.error(f"there is no configs/study/{missing[0]}.yaml")
    return args


if __name__ == "__main__":
    sys.exit(main())
