"""A page that follows a run: written again whenever the run's files have changed, until the run is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from drift_jax.errors import DataError
from drift_jax.report.page import write_page
from drift_jax.report.runs import Run, load_runs, newest_change


def watch(
    given: Sequence[str],
    out: Path,
    every_s: float,
    tell: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Returns when all runs are finished; a run that is not there yet is waited for.

    Args:
      given: `[NAME=]RUN` each.
      tell: gets a line whenever there is news.
    """
    seen, waited = -1, False
    while True:
        try:
            runs = load_runs(given)
        except DataError as error:
            # Files that are being replaced at this moment are whole when they are read again.
            if not waited:
                tell(f"waiting: {error}")
            waited = True
            sleep(every_s)
            continue
        waited, finished = False, all(run.is_finished for run in runs)
        newest = max(newest_change(run.folder) for run in runs)
        if newest != seen or finished:
            write_page(runs, out, None if finished else every_s)
            tell(f"{out}: {_progress(runs)}")
            seen = newest
        if finished:
            return
        sleep(every_s)


def _progress(runs: Sequence[Run]) -> str:
    return ", ".join(f"{run.name} {_of_run(run)}" for run in runs)


def _of_run(run: Run) -> str:
    if run.is_finished:
        return "is finished"
    if not run.stages:
        return "has begun"
    last = run.stages[-1]
    step = f", update {last.metrics[-1]['step']}" if last.metrics else ""
    return f"at {last.name}{step}"
