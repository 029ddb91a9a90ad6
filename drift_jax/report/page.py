"""The report as one HTML file that loads nothing: templates with autoescape, inline figures, JSON for the browser.

Chat text reaches the page in two ways only: through autoescaped templates, and as JSON in which no character is left
that HTML gives a meaning to; report.js shows that with `textContent`. The policy in the page's head lets no script run
but this one, by its hash, and no request leave.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from drift_jax.evaluation.compare import build_compare_report, choose_metrics
from drift_jax.evaluation.figures import has_matplotlib
from drift_jax.files import atomic_writer, refuse_file_in_path
from drift_jax.report.numbers import (
    drops_section,
    hashes_section,
    headlines,
    measures_of,
    retention_section,
    stages_section,
    versions_section,
    warnings_of,
)
from drift_jax.report.pairs import build_browser
from drift_jax.report.plots import CURVES, THEORY, Figure, draw_curves, draw_histograms, plotting
from drift_jax.report.runs import Run, read_json_file

_MOST_BYTES = 9_500_000  # of a page; records that would not fit are left out
_MOST_IMAGE_BYTES = 1_000_000
_MOST_IMAGES = 3
_FRAME_BYTES = 200_000  # templates, tables, config
_NO_PLOTS = "There are no plots: they need matplotlib, pip install 'drift-jax[analysis]'."


def write_page(runs: Sequence[Run], out: Path, refresh_s: float | None = None) -> None:
    """Writes the page. `refresh_s`: it loads itself again after so many seconds; None: never.

    Raises:
      DataError: a file of a run cannot be read.
      StageError: `out` cannot be written.
    """
    text = render_page(runs, refresh_s)
    refuse_file_in_path(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(out) as file:
        file.write(text)


def render_page(runs: Sequence[Run], refresh_s: float | None = None) -> str:
    """The whole page; arguments and errors as `write_page`."""
    script, style = (_asset(name) for name in ("report.js", "report.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    figures, coverage = _figures(runs), [image for run in runs for image in _coverage_maps(run)][:_MOST_IMAGES]
    drawn = sum(len(svg) for of in figures.values() for _, svg in of) + sum(len(image) for _, image in coverage)
    browser = build_browser(runs, _MOST_BYTES - _FRAME_BYTES - drawn)
    measures = [measure for run in runs for measure in measures_of(run)]
    results = build_compare_report(measures, choose_metrics(measures, ()), ()) if measures else None
    return (
        _environment()
        .get_template("report.html")
        .render(
            title=", ".join(run.name for run in runs),
            made=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            runs=runs,
            live=[run.name for run in runs if not run.is_finished],
            refresh_s=refresh_s,
            script=Markup(script),  # noqa: S704  (this and the style are files of this package)
            script_hash=digest,
            style=Markup(style),  # noqa: S704
            headlines=[(run, headlines(run)) for run in runs],
            results=results,
            stages=stages_section(runs),
            drops=drops_section(runs),
            retention=retention_section(runs),
            versions=versions_section(runs),
            hashes=hashes_section(runs),
            warnings=warnings_of(runs),
            figures=figures,
            no_plots=None if has_matplotlib() else _NO_PLOTS,
            coverage=coverage,
            browser=browser,
            browser_json=to_script_json(browser),
        )
    )


def to_script_json(value: Any) -> Markup:
    """JSON for a script element of a data type: without `<`, `>`, `&` and `'`; nothing in it ends the element."""
    return htmlsafe_json_dumps(value, functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":")))


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("drift_jax.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return (resources.files("drift_jax.report") / "templates" / name).read_text(encoding="utf-8")


def _figures(runs: Sequence[Run]) -> Mapping[str, Sequence[tuple[str, Markup]]]:
    """By section of the page; none without matplotlib. The elements are `plots`' own, whose labels are escaped."""
    if not has_matplotlib():
        return {"curves": (), "theory": (), "histograms": ()}
    with plotting():
        drawn: dict[str, list[Figure]] = {"curves": draw_curves(runs, CURVES), "theory": draw_curves(runs, THEORY)}
        drawn["histograms"] = [
            figure if len(runs) == 1 else figure._replace(title=f"{run.name}: {figure.title}")
            for run in runs
            for figure in draw_histograms(run)
        ]
    return {name: [(figure.title, Markup(figure.svg)) for figure in figures] for name, figures in drawn.items()}  # noqa: S704


def _coverage_maps(run: Run) -> list[tuple[str, str]]:
    """(where, data URI) of what `drift evaluate coverage` drew in the run's folder. An image runs no script."""
    found = []
    for report in sorted(path for depth in ("*", "*/*") for path in run.folder.glob(f"{depth}/report.json")):
        picture = report.with_name("coverage.png")
        is_one = read_json_file(report, {}, dict[str, Any]).get("benchmark") == "coverage"
        if is_one and picture.is_file() and picture.stat().st_size <= _MOST_IMAGE_BYTES:
            data = base64.b64encode(picture.read_bytes()).decode()
            found.append((f"{run.name}/{report.parent.relative_to(run.folder)}", f"data:image/png;base64,{data}"))
    return found
