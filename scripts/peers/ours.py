"""One epoch of drift_jax over given ids, as `drift train` runs it. Run by `scripts/bench_step.py` with its own Python.

Reference pass and epoch run twice, from the same weights: the first run compiles, the second is timed.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # compile_s is that of a first run

import jax  # noqa: E402
import numpy as np  # noqa: E402
from handover import PART_NAMES, FedIds, Result, Task, installed_versions, read_task, say, write_result  # noqa: E402

from drift_jax.config import RunConfig, apply_override, build_config  # noqa: E402
from drift_jax.data.pairs import TokenizedPair  # noqa: E402
from drift_jax.models.policy import load_policy  # noqa: E402
from drift_jax.sharding import build_layout  # noqa: E402
from drift_jax.stages.dpo import build_loader, build_trainer  # noqa: E402
from drift_jax.stages.reference import RefLogps  # noqa: E402
from drift_jax.train import host_metrics  # noqa: E402


def make_config(task: Task) -> RunConfig:
    raw: dict[str, Any] = {
        "run_dir": "unused",
        # transformers never trains the row of the pad token; so that both sides do the same work, nor is it here.
        "model": {"path": task.model_dir, "compute_dtype": task.dtype, "pad_embedding": "frozen"},
        "data": {"max_length": task.max_length, "max_prompt_length": task.max_length // 2},
        "train": {
            "beta": task.beta,
            "rpo_alpha": 0.0,  # Tunix has no NLL term
            "optimizer": "rmsprop",
            "learning_rate": task.learning_rate,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "batch_size": task.batch_size,
            "seed": task.seed,
        },
    }
    for override in task.overrides:
        apply_override(raw, override)
    return build_config(raw)


def run_epoch(config: RunConfig, trainer: Any, pairs: list[TokenizedPair], steps: int) -> dict[str, Any]:
    """Reference pass and updates on fresh weights; loading them is not in the times."""
    params = load_policy(Path(config.model.path), trainer.layout, config.model.compute_dtype).params
    jax.block_until_ready(params)
    start = time.perf_counter()
    scores = trainer.score_pairs(params, build_loader(config, trainer, pairs), as_trained=True)
    reference_seconds = time.perf_counter() - start
    loader = build_loader(config, trainer, pairs, RefLogps(scores.logps, scores.last_logps))
    metrics = [metrics for _, _, metrics, _ in trainer.fit(trainer.init_state(params), loader, steps)]
    rows = [host_metrics(row) for row in metrics]  # waits for the last update
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "reference_seconds": reference_seconds, "rows": rows, "loader": loader}


def list_kernels(count: int, run: Callable[[], Any]) -> None:
    """Says which kernels of a device took the most time in `run`; on a CPU, which of XLA's instructions."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        # A device's plane if there is one: the host's then holds waiting, not work.
        planes = [plane for plane in planes if plane.name.startswith("/device:")] or planes
        lines = [line for plane in planes for line in plane.lines]
        events = [event for line in lines for event in line.events if not event.name.startswith("$")]  # not Python's
        times: dict[str, list[float]] = {}
        for event in events:
            times.setdefault(re.sub(r"[._]\d+", "", event.name), []).append(event.duration_ns / 1e6)
    say(f"drift_jax: {sum(map(sum, times.values())):.0f} ms in all, of which")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:count]:
        say(f"  {sum(each):9.1f} ms {len(each):6d} times {name[:120]}")


def main() -> None:
    task = read_task()
    config = make_config(task)
    fed, pairs = FedIds(), []
    for i, pair in enumerate(task.pairs):
        parts = [np.asarray(pair[name], np.int32) for name in PART_NAMES]
        pairs.append(TokenizedPair(str(i), *parts))
        fed.add(*parts)
    trainer = build_trainer(config, Path(task.model_dir), build_layout(config.mesh, jax.devices()[:1]), task.steps)
    first = run_epoch(config, trainer, pairs, task.steps)
    say(f"drift_jax: {first['seconds']:.1f} s with compiling")
    second = run_epoch(config, trainer, pairs, task.steps)
    say(f"drift_jax: {second['seconds']:.1f} s, reference pass {second['reference_seconds']:.1f} s")
    if task.profiled_kernels:
        list_kernels(task.profiled_kernels, lambda: run_epoch(config, trainer, pairs, task.steps))
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    real = sum(len(pair[name]) for pair in task.pairs for name in PART_NAMES)
    write_result(
        Result(
            seconds=second["seconds"],
            reference_seconds=second["reference_seconds"],
            compile_s=first["seconds"] - second["seconds"],
            loss=float(np.mean([row["loss"] for row in second["rows"]])),
            logps_chosen=float(np.mean([row["logps/chosen"] for row in second["rows"]])),
            computed_tokens=round(real / second["loader"].real_token_share()),
            fed=fed.digest(),
            peak_device_gb=stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None,
            device=device.device_kind,
            versions=installed_versions("jax", "flax", "optax"),
            settings=f"updates of {task.batch_size} pairs, {config.train.accumulation_steps} accumulation steps, remat "
            f"{config.model.remat}, attention {config.model.attention}, overrides {task.overrides}",
        )
    )


if __name__ == "__main__":
    main()
