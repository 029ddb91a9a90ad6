"""`drift evaluate compare`: methods and iterations side by side, in one table and one plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from drift_jax.errors import ConfigError
from drift_jax.evaluation.figures import Series
from drift_jax.evaluation.report import Report, Section, with_interval
from drift_jax.evaluation.results import Measure, iteration_of, read_results
from drift_jax.files import atomic_writer
from drift_jax.reading import split_name

# What is shown unless metrics are named; the CSV has all of them.
_LESS = ("tokens", "nats/token chosen")
_MOST_PANELS = 12


def collect(given: Sequence[str]) -> tuple[list[Measure], list[str]]:
    """Of `[NAME=]RUN`; a run's name is its folder's.

    Raises:
      ConfigError: two have the same name.
      DataError: one has no results.
    """
    found, passed, names = list[Measure](), list[str](), dict[str, Path]()
    for source in given:
        name, folder = split_name(source)
        name = name or folder.absolute().name
        if name in names:
            raise ConfigError(f"{folder} and {names[name]} are both called {name}: name them, as in NAME={folder}.")
        names[name] = folder
        measures, files = read_results(name, folder)
        found += measures
        passed += files
    return found, passed


def choose_metrics(measures: Sequence[Measure], wanted: Sequence[str]) -> list[str]:
    """Metrics in the order in which they come up: those that contain one of `wanted`, or the main ones.

    Raises:
      ConfigError: none does.
    """
    every = list(dict.fromkeys(measure.metric for measure in measures))
    if not wanted:
        return [metric for metric in every if not any(part in metric for part in _LESS)] or every
    chosen = [metric for metric in every if any(part.lower() in metric.lower() for part in wanted)]
    if not chosen:
        raise ConfigError(f"no metric contains {' or '.join(map(repr, wanted))}; there are: {'; '.join(every)}.")
    return chosen


def build_compare_report(measures: Sequence[Measure], metrics: Sequence[str], passed: Sequence[str]) -> Report:
    """A row for each metric and method, a column for each stage, and one for what belongs to none."""
    cells: dict[tuple[str, str, str | None], str] = {}
    twice: dict[tuple[str, str, str | None], str] = {}
    for m in measures:
        key = m.metric, m.method, m.stage
        if key in cells:
            twice[key] = f"{m.method} {m.stage or ''}: {m.metric} is in several files; shown is that of {m.source}."
        cells[key] = with_interval(m.value, m.interval, ".3f" if abs(m.value) < 10 else ".1f")
    of_stages = {m.stage for m in measures if m.metric in metrics and m.stage is not None}
    stages: list[str | None] = [*sorted(of_stages, key=iteration_of)]
    if any(m.stage is None for m in measures if m.metric in metrics):
        stages.append(None)
    rows = [
        [metric, method, *(cells.get((metric, method, stage), "-") for stage in stages)]
        for metric in metrics
        for method in dict.fromkeys(m.method for m in measures if m.metric == metric)
    ]
    notes = [
        "Intervals are of 95 %, as the evaluation that made each number has them; a number without one has none. "
        "Held-out numbers are of each stage's own held-out pairs and against its own reference: for the same pairs and "
        "reference at all stages, drift evaluate preference RUN --pairs FILE --reference MODEL.",
        *twice.values(),
        *(f"passed over: {line}." for line in passed),
    ]
    data = {"benchmark": "compare", "metrics": list(metrics), "measures": [m._asdict() for m in measures]}
    columns = ["metric", "method", *(stage or "no stage" for stage in stages)]
    return Report("Methods and iterations", [Section("Results", columns, rows)], notes, data)


def build_series(
    measures: Sequence[Measure], metrics: Sequence[str]
) -> tuple[Mapping[str, Series], Mapping[float, str]]:
    """What `figures.draw_lines` takes."""
    series: dict[str, dict[str, dict[int | None, tuple[float, tuple[float, float] | None]]]] = {}
    for m in measures:
        if m.metric in metrics:
            series.setdefault(m.metric, {}).setdefault(m.method, {})[m.iteration] = (m.value, m.interval)
    shown = {
        metric: {
            method: [(at, value, interval) for at, (value, interval) in of.items()]
            for method, of in series[metric].items()
        }
        for metric in metrics[:_MOST_PANELS]
    }
    iterations = sorted({m.iteration for m in measures if m.iteration is not None and m.metric in metrics})
    return shown, {at: "seed" if at == 0 else str(at) for at in iterations} or {0: ""}


def write_table(measures: Sequence[Measure], path: Path) -> None:
    """CSV: a line for each number of each method and stage."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("method", "iteration", "stage", "metric", "value", "low", "high", "source"))
    for m in measures:
        blank = ("" if x is None else x for x in (m.iteration, m.stage, m.metric, m.value, m.low, m.high, m.source))
        writer.writerow((m.method, *blank))
    with atomic_writer(path) as file:
        file.write(text.getvalue())
