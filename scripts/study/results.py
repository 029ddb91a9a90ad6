"""What the study found, of all runs together: results.json, a table, figures."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from study.user import WISHES

from drift_jax.evaluation.bootstrap import ratio_interval
from drift_jax.evaluation.figures import draw_lines
from drift_jax.evaluation.intervals import Interval, mean_interval, score_interval
from drift_jax.files import write_json
from drift_jax.telemetry import read_metrics

BASE = "base"
PANELS = {
    "satisfied": "satisfied users, share",
    "on_topic": "replies on the topic, share",
    "words": "words of a reply",
    "distinct_2": "distinct 2-grams",
    "self_similarity": "similarity of two replies",
    "kl": "KL to the base model, nats a reply",
    "margin": "reward margin on the stage's pairs",
    "grad_norm": "gradient norm of an update",
    "theory/grad_norm": "gradient norm of a pair",
    "theory/bound": "its bound by Lemma 1",
}
_TABLE = ("satisfied", "short", "on_topic", "words", "distinct_2", "self_similarity", "kl", "margin", "grad_norm")

_SHARES = ("satisfied", *WISHES)  # means of yes and no

Cell = dict[str, Any]  # value, interval, seeds: of a metric, a method and an iteration


def summarise(out: Path, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Metric -> method -> iteration -> `Cell`; the base model is iteration 0 of each method.

    The interval is over questions, each with its mean over seeds and samples, where a metric is one of questions; else
    over seeds (Student's t, so that three of them give a wide one). `gain` is against the base model, by question.
    """
    base = [_read(out / f"{BASE}-s{seed}" / "held_out") for seed in seeds]
    iterations = _iterations(out / f"{methods[0]}-s{seeds[0]}")
    found: dict[str, dict[str, dict[int, Cell]]] = {}
    for method in methods:
        for k in range(iterations + 1):
            runs = [out / f"{method}-s{seed}" for seed in seeds]
            measured = base if k == 0 else [_read(run / f"iter_{k}" / "held_out") for run in runs]
            for metric, cell in _cells(measured, base, k).items():
                found.setdefault(metric, {}).setdefault(method, {})[k] = cell
            if k:
                for metric, cell in _stage_cells([run / f"iter_{k}" for run in runs]).items():
                    found.setdefault(metric, {}).setdefault(method, {})[k] = cell
    last = {method: found["satisfied"][method][iterations] for method in methods}
    headline = {
        "base": round(found["satisfied"][methods[0]][0]["value"], 4),
        **{method: round(cell["value"], 4) for method, cell in last.items()},
        **{f"{method}_gain": [round(x, 4) for x in cell["gain"]["interval"]] for method, cell in last.items()},
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "headline": headline,
        "seeds": list(seeds),
        "commit": commit.stdout.strip(),
        "seconds": json.loads((out / "seconds.json").read_text(encoding="utf-8"))["seconds"],
        "log": json.loads((out / "log" / "log.json").read_text(encoding="utf-8")),
        "metrics": found,
    }


def write_results(found: Mapping[str, Any], figures: Path) -> None:
    """results.json, results.md, compare.svg and compare.png."""
    figures.mkdir(parents=True, exist_ok=True)
    write_json(figures / "results.json", found)
    (figures / "results.md").write_text(table(found["metrics"]), encoding="utf-8")
    series = {
        title: {
            method: [(k, cell["value"], cell["interval"]) for k, cell in cells.items()]
            for method, cells in found["metrics"][metric].items()
        }
        for metric, title in PANELS.items()
        if metric in found["metrics"]
    }
    last = max(k for cells in found["metrics"]["satisfied"].values() for k in cells)
    draw_lines(series, {0: BASE} | {k: str(k) for k in range(1, last + 1)}, figures)


def table(metrics: Mapping[str, Mapping[str, Mapping[int, Cell]]]) -> str:
    """A line for each method and iteration, a column for each metric, with intervals where the method is satisfied."""
    lines = ["| method | iteration | " + " | ".join(_TABLE) + " |", "|---|---:|" + "---:|" * len(_TABLE)]
    for method, cells in metrics["satisfied"].items():
        for k in cells:
            if k == 0 and method != next(iter(metrics["satisfied"])):
                continue  # the base model is the same for all
            shown = [_shown(metrics.get(metric, {}).get(method, {}).get(k), metric == "satisfied") for metric in _TABLE]
            lines.append(f"| {BASE if k == 0 else method} | {k} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _shown(cell: Cell | None, with_interval: bool) -> str:
    if cell is None:
        return "-"
    value = f"{cell['value']:.3g}"
    return (
        f"{value} ({cell['interval'][0]:.2g} to {cell['interval'][1]:.2g})"
        if with_interval and cell["interval"]
        else value
    )


def _cells(measured: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], k: int) -> dict[str, Cell]:
    """Of one method and iteration, over its seeds."""
    cells = {}
    for metric in measured[0]["per_prompt"]:
        values, before = (np.array([one["per_prompt"][metric] for one in of]) for of in (measured, base))
        by_prompt = values.mean(axis=0)
        interval = _listed(score_interval(by_prompt.tolist())) if metric in _SHARES else _over_prompts(by_prompt)
        cells[metric] = _cell(values.mean(axis=1), interval)
        gains = (values - before).mean(axis=0)
        cells[metric]["gain"] = {"value": float(gains.mean()), "interval": _over_prompts(gains) if k else [0.0, 0.0]}
    for metric in measured[0]["draws"]:
        values = np.array([np.mean(one["draws"][metric]) for one in measured])
        cells[metric] = _cell(values, _listed(mean_interval(values.tolist())))
    return cells


def _stage_cells(folders: Sequence[Path]) -> dict[str, Cell]:
    """Of the training of one method and iteration, over its seeds."""
    numbers = [_of_stage(folder) for folder in folders]
    return {
        metric: _cell(np.array(values), _listed(mean_interval(values)))
        for metric in numbers[0]
        if all(metric in one for one in numbers) and (values := [one[metric] for one in numbers])
    }


def _of_stage(folder: Path) -> dict[str, float]:
    """Margins and accuracies of the last update, the mean gradient norm of all, what Lemma 1 speaks of at the end."""
    rows = read_metrics(folder)
    last = rows[-1]
    found = {"margin": last["rewards/margins"], "accuracy": last["rewards/accuracies"], "loss": last["loss"]}
    found["grad_norm"] = float(np.mean([row["grad_norm"] for row in rows]))
    return found | {key: value for key, value in last.items() if key.startswith("theory/") and key != "theory/seconds"}


def _cell(by_seed: Float[np.ndarray, " S"], interval: list[float] | None) -> Cell:
    return {"value": float(by_seed.mean()), "interval": interval, "seeds": [float(x) for x in by_seed]}


def _over_prompts(values: Float[np.ndarray, " N"]) -> list[float] | None:
    return _listed(ratio_interval(values))


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [float(interval.low), float(interval.high)]


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "measured.json").read_text(encoding="utf-8"))


def _iterations(run: Path) -> int:
    return max(int(path.name.removeprefix("iter_")) for path in run.glob("iter_*"))
