"""`drift report` and `drift card`: what a run has left, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from drift_jax.cli.options import build_console, out_file
from drift_jax.errors import ConfigError
from drift_jax.reading import split_name


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]RUN...", help="Run directories; several are drawn into one page."),
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads this form on every version)
        out_file("The page. Default: RUN/report.html; needed for several runs."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write the page again while the runs go on; open pages reload themselves.")
    ] = False,
    every: Annotated[float, typer.Option(min=1.0, help="With --watch: seconds between two looks at the runs.")] = 10.0,
) -> None:
    """One HTML file of runs, finished or not: numbers, curves, drops, and a browser of their pairs. No network."""
    from drift_jax.evaluation.figures import has_matplotlib
    from drift_jax.report.page import write_page
    from drift_jax.report.runs import load_runs
    from drift_jax.report.watch import watch as follow

    if out is None:
        if len(runs) > 1:
            raise ConfigError("several runs make one page: say where it goes with --out FILE.")
        out = split_name(runs[0])[1] / "report.html"
    console = build_console()

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    if not has_matplotlib():
        tell("no plots: they need matplotlib, pip install 'drift-jax[analysis]'")
    if watch:
        follow(runs, out, every, tell)
        return
    write_page(load_runs(runs), out)
    tell(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")


def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run with an exported policy.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        out_file("Default: README.md beside the weights of the last stage."),
    ] = None,
    licence: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--license", help="Licence of the base model, as a hub writes it. Default: what its files say."),
    ] = None,
) -> None:
    """Writes the model card of a run's last policy: data, recipe, figures, limits, licence of the base."""
    from drift_jax.report.card import write_card
    from drift_jax.report.runs import load_run

    path = write_card(load_run(run), out, licence)
    build_console().print(f"{path}", markup=False, highlight=False, soft_wrap=True)
