"""`drift evaluate preference`, `coverage` and `compare`: what needs no judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from drift_jax.cli.options import OnBadRow, Overrides, build_console, changes_of, resolve
from drift_jax.distributed import on_each, on_main
from drift_jax.errors import ConfigError

if TYPE_CHECKING:
    from drift_jax.config import RunConfig

ConfigOption = Annotated[
    Optional[Path],  # noqa: UP045  (typer reads this form on every version)
    typer.Option("--config", help="YAML file of a run, for a MODEL: lengths, beta, dtypes and mesh are taken from it."),
]


def preference(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A run (each of its stages), one of its stages, or a model directory or hub id."
        ),
    ],
    pairs: Annotated[Path, typer.Option("--pairs", help="JSONL of pairs (prompt, chosen, rejected), as TRL has them.")],
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--reference", help="Reference model; default: the one that each stage was trained against."),
    ] = None,
    config: ConfigOption = None,
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="Directory for report.json, report.md and the scores of every pair."),
    ] = None,
) -> None:
    """Implicit reward accuracy and margin, log-probs per token and lengths, on pairs, with intervals."""
    from drift_jax.evaluation.preference import preference_numbers
    from drift_jax.evaluation.preference_report import build_preference_report
    from drift_jax.evaluation.report import print_report, write_report
    from drift_jax.files import write_jsonl
    from drift_jax.stages.preference import Target, describe, find_targets, is_run, score_targets

    given, console = Path(model), build_console()
    run = on_each(lambda: is_run(given))
    resolved = _config_of(model, given if run else None, config, changes_of(overrides, on_bad_row))
    against = on_each(lambda: resolve(reference, resolved)) if reference else None
    if run:
        targets = on_each(lambda: find_targets(resolved, given, against))
    elif against is None:
        raise ConfigError(f"{model} is no run, so there is no reference: name one with --reference DIR.")
    else:
        targets = [Target(given.name, on_each(lambda: resolve(model, resolved)), against)]
    scored = score_targets(resolved, targets, pairs, console)

    def work() -> None:
        beta = resolved.train.beta
        found = {name: preference_numbers(logps, beta) for name, logps in scored.of.items()}
        stages = {name: where | found[name] for name, where in describe(targets).items()}
        report = build_preference_report(stages, str(pairs), scored.drops)
        if out is not None:
            write_report(report, out)
            for name, logps in scored.of.items():
                write_jsonl(out / f"scores.{name}.jsonl", logps.rows(beta))
        print_report(report, console)

    on_main(work)


def _config_of(model: str, run: Path | None, file: Path | None, changes: list[str]) -> RunConfig:
    """Of a run its own; of a model `file`, or defaults."""
    from drift_jax.config import apply_override, build_config, load_config
    from drift_jax.stages.preference import run_folder
    from drift_jax.yaml_files import read_yaml

    if run is not None:
        if file is not None:
            raise ConfigError(f"{run} has a config of its own: leave --config out, and change keys with --set.")
        return on_each(lambda: load_config(run_folder(run) / "config.yaml", changes))
    raw: dict[str, Any] = on_each(lambda: read_yaml(file)) if file is not None else {"run_dir": "."}
    raw["model"] = dict(raw.get("model") or {}) | {"path": model}
    for change in changes:
        apply_override(raw, change)
    return on_each(lambda: build_config(raw, source=str(file) if file is not None else "the options"))
