"""The page's figures, by matplotlib, as SVG elements whose colours are variables of the page: for light and dark.

Stages stand beside each other on the x axis, each one wide, so that runs of unlike lengths can be compared. Lines are
of runs; a long one is drawn as means of equal spans.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from drift_jax.evaluation.figures import styled
from drift_jax.report.runs import Run, Stage

_MOST_POINTS = 400  # of one line in one stage
_SIZE = (4.4, 2.9)  # inches
_BINS = 24
# Colours that stand for variables: report.css has --c0 to --c7, --ink and --grid.
_LINES = tuple(f"#fe00{i:02x}" for i in range(8))
_INK, _GRID = "#fe0110", "#fe0111"
_NAMES = {colour: f"var(--c{i})" for i, colour in enumerate(_LINES)} | {_INK: "var(--ink)", _GRID: "var(--grid)"}
_STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "axes.titlesize": 10,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "font.family": "sans-serif",
}


class Figure(NamedTuple):
    """An SVG element and what it shows, in words."""

    title: str
    svg: str


class Curve(NamedTuple):
    """One panel: a metric as a solid line, others of the same kind dashed and dotted."""

    title: str
    metrics: tuple[str, ...]
    names: tuple[str, ...] = ("",)
    held_out: str | None = None  # of eval.json, drawn at the end of a stage
    log: bool = False


CURVES = (
    Curve("Loss", ("loss",), held_out="eval_loss"),
    Curve("Reward margin", ("rewards/margins",), held_out="rewards/margins"),
    Curve("Reward accuracy", ("rewards/accuracies",), held_out="rewards/accuracies"),
    Curve("Rewards", ("rewards/chosen", "rewards/rejected"), ("chosen", "rejected")),
    Curve("Log-probs, nats per completion", ("logps/chosen", "logps/rejected"), ("chosen", "rejected")),
    Curve("Gradient norm", ("grad_norm",)),
    Curve("Learning rate", ("learning_rate",)),
    Curve("Tokens per second", ("tokens_per_second",)),
)
THEORY = (
    Curve("Gradient norm of a pair, and its bound", ("theory/grad_norm", "theory/bound"), ("mean", "βτp₀Δ"), log=True),
    Curve("p₀, share of pairs with σ(-s) ≥ τ", ("theory/p0",)),
    Curve("Δ, mean ‖d‖ of these", ("theory/delta",)),
    Curve("σ(-s), quantiles", ("theory/weight/p50", "theory/weight/p05", "theory/weight/p95"), ("50 %", "5 %", "95 %")),
)
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


@contextlib.contextmanager
def plotting() -> Iterator[None]:
    """Matplotlib in the page's style, which ends with the block. Raises `ConfigError` where it is not installed."""
    with styled() as matplotlib, matplotlib.rc_context(_STYLE):
        yield


def draw_curves(runs: Sequence[Run], curves: Sequence[Curve]) -> list[Figure]:
    """One figure for each curve of which a run has numbers."""
    stages = _stage_names(runs)
    figures = []
    for curve in curves:
        rows = (row for run in runs for stage in run.stages for row in stage.metrics)
        if any(metric in row for row in rows for metric in curve.metrics):
            figures.append(_figure(curve.title, lambda axis, curve=curve: _draw_curve(axis, runs, curve, stages)))
    return figures


def draw_histograms(run: Run) -> list[Figure]:
    """Tokens of chosen and rejected, and margins of the pairs that were scored, by stage."""
    stages = [stage for stage in run.stages if stage.lengths]
    figures = []
    for place, side in ((1, "chosen"), (2, "rejected")):
        values = {stage.name: [length[place] for length in stage.lengths.values()] for stage in stages}
        if values:
            figures.append(_histogram(f"Tokens of {side}", values, "tokens"))
    margins = {stage.name: list(stage.margins.values()) for stage in run.stages if stage.margins}
    if margins:
        figures.append(_histogram("Reward margin of scored pairs", margins, "margin"))
    return figures


def _stage_names(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    return sorted(names, key=lambda name: -1 if name == "seed" else int(name.removeprefix("iter_")))


def _draw_curve(axis: Any, runs: Sequence[Run], curve: Curve, stages: Sequence[str]) -> None:
    for at, run in enumerate(runs):
        colour = _LINES[at % len(_LINES)]
        for stage in run.stages:
            start = stages.index(stage.name)
            for metric, dash in zip(curve.metrics, _DASHES, strict=False):
                x, y = _line(stage, metric)
                if len(x):
                    marker = "o" if len(x) == 1 else None
                    axis.plot(start + x, y, color=colour, linestyle=dash, marker=marker, markersize=3)
            for x, value, reach in _held_out(stage, curve.held_out):
                axis.errorbar(
                    [start + x], [value], yerr=reach, color=colour, fmt="D", markersize=4, capsize=2, zorder=4
                )
        if len(runs) > 1:
            axis.plot([], [], color=colour, label=run.name)
    for name, dash in zip(curve.names, _DASHES, strict=False):
        if name:
            axis.plot([], [], color=_INK, linestyle=dash, label=name)
    if curve.held_out and any(stage.evaluation for run in runs for stage in run.stages):
        axis.plot([], [], color=_INK, linestyle="none", marker="D", markersize=4, label="held out")
    if curve.log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")  # the default is mathematics, which labels are not
        axis.yaxis.set_minor_formatter("")
    for bound in range(1, len(stages)):
        axis.axvline(bound, color=_GRID, linewidth=1, zorder=0)
    axis.set_xlim(-0.03, len(stages) + 0.03)
    axis.set_xticks([i + 0.5 for i in range(len(stages))], stages)
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y")
    _legend(axis)


def _line(stage: Stage, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Share of the stage and value, both means of spans where there are too many points."""
    points = [
        (row.get("epoch", 0) / stage.epochs, row[metric])
        for row in stage.metrics
        if isinstance(row.get(metric), int | float) and math.isfinite(row[metric])
    ]
    if not points:
        return np.empty(0), np.empty(0)
    parts = np.array_split(np.array(points, np.float64), min(len(points), _MOST_POINTS))
    means = np.array([part.mean(axis=0) for part in parts])
    return means[:, 0], means[:, 1]


def _held_out(stage: Stage, name: str | None) -> Iterator[tuple[float, float, Any]]:
    """(share of the stage, value, reach of its interval or None)."""
    if name is None:
        return
    plain = f"eval_{name.removeprefix('eval_')}"
    for row in stage.metrics[:-1]:
        if isinstance(row.get(plain), int | float):
            yield row.get("epoch", 0) / stage.epochs, row[plain], None
    number = stage.evaluation.get("preference", {}).get("metrics", {}).get(name)
    value = number["value"] if number else stage.evaluation.get(plain)
    if isinstance(value, int | float):
        reach = None
        if number and number["low"] is not None:
            reach = np.abs([[number["low"] - value], [number["high"] - value]])
        yield 1.0, value, reach


def _histogram(title: str, values: Mapping[str, Sequence[float]], unit: str) -> Figure:
    every = np.concatenate([np.asarray(v, np.float64) for v in values.values()])
    every = every[np.isfinite(every)]

    def draw(axis: Any) -> None:
        low, high = (float(every.min()), float(every.max())) if len(every) else (0.0, 1.0)
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
        for at, (name, of) in enumerate(values.items()):
            colour = _LINES[at % len(_LINES)]
            axis.hist(of, bins=edges, histtype="stepfilled", color=colour, alpha=0.12)
            axis.hist(of, bins=edges, histtype="step", color=colour, linewidth=1.4)
            axis.plot([], [], color=colour, label=name)
        axis.set_xlabel(unit)
        axis.set_ylabel("pairs")
        axis.grid(axis="y")
        _legend(axis)

    return _figure(title, draw)


def _legend(axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        axis.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, columnspacing=1.2)


def _figure(title: str, draw: Any) -> Figure:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=_SIZE, layout="constrained")
    axis = canvas.subplots()
    draw(axis)
    text = io.StringIO()
    canvas.savefig(text, format="svg", metadata={"Date": None})
    return Figure(title, _to_element(text.getvalue()))


def _to_element(text: str) -> str:
    """Without what belongs to a file of its own, and without names that the figures of one page would share."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[A-Za-z][A-Za-z0-9_.]*_\d+">', "<g>", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg)
    return re.sub("|".join(_NAMES), lambda found: _NAMES[found[0]], svg)
