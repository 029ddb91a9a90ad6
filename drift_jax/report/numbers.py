"""The numbers of the report as tables, and those that stand at its top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from drift_jax.errors import DataError
from drift_jax.evaluation.report import Section, number, with_interval
from drift_jax.evaluation.results import Measure, read_results
from drift_jax.report.runs import Run, Stage


class Headline(NamedTuple):
    """A number that stands alone: what it is, its value, and its interval or what it belongs to."""

    name: str
    value: str
    note: str


def measures_of(run: Run) -> list[Measure]:
    """All results of the run and of the evaluations in its folder; none yet where it has just begun."""
    try:
        return read_results(run.name, run.folder)[0]
    except DataError:
        if any(stage.evaluation for stage in run.stages):
            raise
        return []


def headlines(run: Run) -> list[Headline]:
    """Of the last stage that was evaluated, and of the run."""
    found = []
    evaluated = [stage for stage in run.stages if stage.evaluation]
    if evaluated:
        last = evaluated[-1]
        for name, metric, spec in (
            ("held-out accuracy", "rewards/accuracies", ".1%"),
            ("held-out margin", "rewards/margins", "+.3f"),
        ):
            value, interval = _held_out(last, metric)
            if value is not None:
                ends = "no interval" if interval is None else f"95 %: {interval[0]:{spec}} to {interval[1]:{spec}}"
                found.append(Headline(name, f"{value:{spec}}", f"{last.name}, {ends}"))
    trained = [stage for stage in run.stages if stage.summary.get("pairs") is not None]
    if trained:
        last = trained[-1]
        found.append(Headline("pairs", f"{last.summary['pairs']}", f"{last.name}, {last.summary['held_out']} held out"))
    drops = sum(count for stage in run.stages for count in stage.drops.values())
    found.append(Headline("drops", f"{drops}", f"in {len(run.stages)} stages"))
    seconds = sum(p.get("summary", {}).get("seconds", 0) for stage in run.stages for p in stage.parts.values())
    found.append(Headline("time", _in_words(seconds), "finished" if run.is_finished else "not finished"))
    return found


def stages_section(runs: Sequence[Run]) -> Section:
    """A row for each stage."""
    columns = ["stage", "pairs", "updates", "loss", "held-out accuracy", "held-out margin", "tokens/s", "seconds"]
    rows = []
    for run in runs:
        for stage in run.stages:
            s = stage.summary
            seconds = [part.get("summary", {}).get("seconds") for part in stage.parts.values()]
            rows.append(
                [
                    _label(runs, run, stage),
                    number(s.get("pairs"), "d"),
                    number(s.get("steps") or (stage.metrics[-1]["step"] if stage.metrics else None), "d"),
                    number(s.get("loss"), ".4f"),
                    with_interval(*_held_out(stage, "rewards/accuracies"), ".3f"),
                    with_interval(*_held_out(stage, "rewards/margins"), ".3f"),
                    number(s.get("tokens_per_second"), ",.0f"),
                    number(sum(x for x in seconds if x is not None) if stage.is_finished else None, ",.0f"),
                ]
            )
    return Section("Stages", columns, rows)


def drops_section(runs: Sequence[Run]) -> Section:
    """A row for each reason, a column for each stage."""
    columns = {_label(runs, run, stage): stage.drops for run in runs for stage in run.stages}
    reasons = dict.fromkeys(reason for drops in columns.values() for reason, count in drops.items() if count)
    rows = [[reason, *(number(drops.get(reason, 0), "d") for drops in columns.values())] for reason in reasons]
    return Section("Drops", ["reason", *columns], rows)


def retention_section(runs: Sequence[Run]) -> Section:
    """Of each earlier stage's pairs: the mean margin at its end, and what is left of it after each later stage."""
    rows = []
    for run in runs:
        for earlier in run.stages:
            prefix, cells = f"theory/{earlier.name}/", list[str]()
            then: float | None = None
            for stage in run.stages:
                row = _last_with(stage, f"{prefix}margin")
                then = row.get(f"{prefix}margin_then", then)
                share = row.get(f"{prefix}retention")
                share_text = "" if share is None else f" ({share:.0%})"
                cells.append(f"{row[f'{prefix}margin']:+.3f}{share_text}" if row else "-")
            if then is not None:
                rows.append([_label(runs, run, earlier), f"{then:+.3f}", *cells])
    names = list(dict.fromkeys(stage.name for run in runs for stage in run.stages))
    width = max((len(row) for row in rows), default=2)
    return Section("Margins kept", ["pairs of", "margin then", *(f"after {n}" for n in names)][:width], rows)


def versions_section(runs: Sequence[Run]) -> Section:
    """A row for each package, a column for each run: of the stage that began last."""
    columns = {run.name: _versions(run) for run in runs}
    packages = dict.fromkeys(package for versions in columns.values() for package in versions)
    rows = [[package, *(v.get(package, "-") for v in columns.values())] for package in packages]
    return Section("Versions", ["package", *columns], rows)


def hashes_section(runs: Sequence[Run]) -> Section:
    """What each stage was made from, by the first digits of its sha256."""
    rows = [
        [run.name, entry, name, digest[:16]]
        for run in runs
        for entry, found in run.manifest.stages().items()
        for name, digest in found["inputs"].items()
    ]
    return Section("Hashes", ["run", "stage", "input", "sha256"], rows)


def warnings_of(runs: Sequence[Run]) -> list[str]:
    """What stages warned of while they ran."""
    return [
        f"{_label(runs, run, stage)}: {warning}"
        for run in runs
        for stage in run.stages
        for warning in stage.summary.get("warnings", [])
    ]


def _versions(run: Run) -> Mapping[str, str]:
    found = [entry["versions"] for entry in run.manifest.stages().values() if entry.get("versions")]
    return found[-1] if found else {}


def _held_out(stage: Stage, metric: str) -> tuple[float | None, tuple[float, float] | None]:
    """A number of eval.json with its interval, if it has one."""
    found = stage.evaluation.get("preference", {}).get("metrics", {}).get(metric)
    if found is None:
        return stage.evaluation.get(f"eval_{metric}"), None
    return found["value"], None if found["low"] is None else (found["low"], found["high"])


def _last_with(stage: Stage, key: str) -> Mapping[str, Any]:
    return next((row for row in reversed(stage.metrics) if key in row), {})


def _label(runs: Sequence[Run], run: Run, stage: Stage) -> str:
    return stage.name if len(runs) == 1 else f"{run.name} {stage.name}"


def _in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
