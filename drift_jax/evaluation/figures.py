"""Figures of the evaluations, by matplotlib: SVG for pages, PNG for everything else.

Labels come from names of files and models, so nothing in them is read as mathematics (`$`), and the same numbers give
the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from drift_jax.evaluation.entry_points import missing_extra
from drift_jax.files import atomic_writer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from drift_jax.evaluation.coverage_run import Map

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#7f7f7f")
_COLUMNS = 3
_WIDTH, _HEIGHT = 4.2, 3.6  # inches, of a panel
_TITLE = 44  # characters on a line of a panel's title
_STYLE: Any = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "drift",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextlib.contextmanager
def styled() -> Iterator[Any]:
    """Matplotlib with our settings, which end with the block. Raises `ConfigError` where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise missing_extra("matplotlib", "a plot") from None
    with matplotlib.rc_context(_STYLE):
        yield matplotlib


def has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def save(figure: Figure, folder: Path, name: str) -> str:
    """Writes NAME.svg and NAME.png; returns the SVG element, for a page."""
    text, picture = io.StringIO(), io.BytesIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    figure.savefig(picture, format="png", dpi=150)
    svg = text.getvalue()
    with atomic_writer(folder / f"{name}.svg") as file:
        file.write(svg)
    with atomic_writer(folder / f"{name}.png", "wb") as file:
        file.write(picture.getvalue())
    return svg[svg.index("<svg") :]


def panels(count: int) -> tuple[Figure, list[Any]]:
    """A figure with so many axes, `_COLUMNS` in a row."""
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def draw_coverage(found: Map, names: Sequence[str], folder: Path, axis_name: str) -> str:
    """The mean density and each method's, on one scale of colours, with the region's edge and the replies."""
    with styled():
        figure, axes = panels(len(names) + 1)
        c = found.found
        mean = c.densities.mean(axis=0)
        top = float(max(mean.max(), c.densities.max())) or 1.0
        titles: list[tuple[str, Any, str | None]] = [("all methods", mean, None)]
        for name in names:
            index = found.methods.index(name)
            titles.append((f"{name}: {c.shares[index].coverage:.0%}", c.densities[index], name))
        mesh: Any = None
        for axis, (title, density, name) in zip(axes, titles, strict=True):
            mesh = axis.pcolormesh(
                c.x, c.y, density.T, cmap="Blues", vmin=0, vmax=top, shading="nearest", rasterized=True
            )
            axis.contour(c.x, c.y, c.region.T.astype(float), levels=[0.5], colors="#e45756", linewidths=1.2)
            mine = [i for i, reply in enumerate(found.replies) if name in (None, reply.method)]
            axis.scatter(*found.points[mine].T, s=5, color="#333333", alpha=0.5, linewidths=0)
            axis.set_title(textwrap.fill(title, _TITLE))
            axis.set_xlabel(f"{axis_name} 1")
            axis.set_ylabel(f"{axis_name} 2")
        figure.colorbar(mesh, ax=axes, label="reward-weighted density")
        figure.suptitle("red: the edge of the high-reward region; per cent: how much of it is reached", fontsize=9)
        return save(figure, folder, "coverage")


Series = Mapping[str, Sequence[tuple[float | None, float, tuple[float, float] | None]]]


def draw_lines(metrics: Mapping[str, Series], ticks: Mapping[float, str], folder: Path) -> str:
    """A panel per metric, a line per method over iterations; what belongs to no iteration is a dashed line.

    Args:
      metrics: metric -> method -> (iteration, value, interval).
      ticks: iteration -> its name.
    """
    methods = list(dict.fromkeys(method for series in metrics.values() for method in series))
    with styled():
        figure, axes = panels(len(metrics))
        for axis, (metric, series) in zip(axes, metrics.items(), strict=True):
            for method, marks in series.items():
                place = methods.index(method)
                _draw_marks(axis, method, marks, COLOURS[place % len(COLOURS)], 0.06 * (place - (len(methods) - 1) / 2))
            axis.set_title(textwrap.fill(metric, _TITLE))
            axis.set_xticks(list(ticks), list(ticks.values()))
            axis.set_xlim(min(ticks) - 0.5, max(ticks) + 0.5)
            axis.grid(axis="y", alpha=0.3)
        handles = {}
        for axis in axes:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
        return save(figure, folder, "compare")


def _draw_marks(axis: Any, method: str, marks: Sequence[Any], colour: str, shift: float) -> None:
    """Lines of methods stand a little apart, so that their intervals do not hide each other."""
    steps = sorted((mark for mark in marks if mark[0] is not None), key=lambda mark: mark[0])
    if steps:
        x, y = [at + shift for at, _, _ in steps], [value for _, value, _ in steps]
        axis.plot(x, y, color=colour, marker="o", markersize=4, label=method)
    for at, value, interval in marks:
        if at is None:
            axis.axhline(value, color=colour, linestyle="--", label=None if steps else method)
            if interval is not None:
                axis.axhspan(*interval, color=colour, alpha=0.1, linewidth=0)
        elif interval is not None:
            reach = np.abs(np.subtract(interval, value))[:, None]
            axis.errorbar([at + shift], [value], yerr=reach, color=colour, capsize=3, linewidth=1)
