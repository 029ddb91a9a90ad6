"""`drift mine`: chat logs -> dissatisfaction data."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from drift_jax.cli.options import BAD_ROW_HELP, OutDir, build_console
from drift_jax.errors import ConfigError

if TYPE_CHECKING:
    from drift_jax.data.mining.config import MiningConfig

# Typer reads `Optional` on every version.
ConfigPath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--config", metavar="FILE", help="YAML with the rules: sections wildfeedback, hygiene, split, ..."),
]
Rules = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--rules", metavar="NAME|FILE", help="Patterns of complaints, such as en_v1. Repeatable."),
]
Changes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="KEY=VALUE", help="Change a rule, such as hygiene.languages=[en]. Repeatable."),
]
LogFormat = Annotated[
    Literal["wildfeedback", "wildchat", "messages", "sharegpt", "ultrafeedback"],
    typer.Option("--format", help="What a row of the input is."),
]
DetectorName = Annotated[
    Optional[Literal["rules", "judge", "both"]],  # noqa: UP045
    typer.Option(help="Who finds complaints in logs without labels: patterns, a model, or a model among their finds."),
]
JudgeFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(metavar="FILE", help="YAML with a section judge, as in a CONFIG of a run."),
]


def mine(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="JSON, JSONL, CSV or Parquet files (or .gz), directories of them, or ids of datasets on the hub.",
        ),
    ],
    log_format: LogFormat,
    out: OutDir,
    detector: DetectorName = None,
    rules: Rules = None,
    judge_config: JudgeFile = None,
    judge_url: Annotated[Optional[str], typer.Option(help="Its server, with /v1; replaces judge.base_url.")] = None,  # noqa: UP045
    judge_model: Annotated[Optional[str], typer.Option(help="As that names it; replaces judge.model.")] = None,  # noqa: UP045
    requests_per_minute: Annotated[Optional[float], typer.Option(help="To the judge, at most.")] = None,  # noqa: UP045
    config_path: ConfigPath = None,
    changes: Changes = None,
    mask_pii: Annotated[bool, typer.Option("--mask-pii", help="Mask e-mail addresses, phone numbers, ...")] = False,
    license: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the rows, for the data card; default: that of the published corpus."),
    ] = None,
    subset: Annotated[Optional[str], typer.Option("--config-name", help="Of a hub dataset.")] = None,  # noqa: UP045
    split: Annotated[str, typer.Option(help="Of a dataset.")] = "train",
    revision: Annotated[Optional[str], typer.Option(help="Of a hub dataset: branch, tag or commit.")] = None,  # noqa: UP045
    on_bad_row: Annotated[
        Literal["error", "skip", "stop"], typer.Option(help=f"{BAD_ROW_HELP} stop is error by another name.")
    ] = "error",
) -> None:
    """Mine logs for replies that users were unhappy with: dsat.jsonl, sat.jsonl, seed pairs, statistics, a page."""
    from drift_jax.cli.parts import leave_accelerator
    from drift_jax.data.mining.sources import find_sources
    from drift_jax.stages.inputs import run_lock
    from drift_jax.stages.mine import LABELLED, MineJob, mine_stage

    leave_accelerator()
    settings = {"kind": detector, "rules": rules or None, "requests_per_minute": requests_per_minute}
    settings |= _judge_settings(judge_config, judge_url, judge_model)
    config = _load_config(config_path, settings, mask_pii, changes)
    if log_format in LABELLED and config.detector:
        raise ConfigError(f"a detector is not for format {log_format}, which has labels of its own. Leave it out.")
    if log_format == "wildfeedback":
        subset = subset or "sat_dsat_annotation"
    sources = tuple(find_sources(inputs, subset, split, revision))
    job = MineJob(sources, log_format, out, "skip" if on_bad_row == "skip" else "stop", license)
    console = build_console()
    with run_lock(out):
        if log_format in LABELLED:
            stats = mine_stage(job, config, console)
        else:
            with contextlib.closing(_build_detector(config, out)) as built:
                stats = mine_stage(job, config, console, built)
    _print_summary(stats, out, console)


def _judge_settings(path: Path | None, url: str | None, model: str | None) -> dict[str, Any]:
    from drift_jax.yaml_files import read_yaml

    judge: Any = {}
    if path is not None:
        judge = read_yaml(path).get("judge")
        if not isinstance(judge, dict):
            raise ConfigError(f"{path} has no section judge, such as `judge: {{base_url: ..., model: ...}}`.")
    judge |= {key: value for key, value in (("base_url", url), ("model", model)) if value is not None}
    return {f"judge.{key}": value for key, value in judge.items()}


def _load_config(
    path: Path | None, settings: dict[str, Any], mask_pii: bool, changes: list[str] | None
) -> MiningConfig:
    from drift_jax.data.mining.config import load_mining_config

    # A 0 is an answer, which the validation refuses where it is none.
    more = [f"detector.{key}={json.dumps(value, default=str)}" for key, value in settings.items() if value is not None]
    if mask_pii:
        more.append("hygiene.mask_pii=true")
    return load_mining_config(path, [*more, *(changes or [])])


def _build_detector(config: MiningConfig, out: Path) -> Any:
    """The detector; a judge's answers are kept beside the files, so that nothing is asked twice."""
    from drift_jax.data.mining.config import validate
    from drift_jax.data.mining.detect import build_detector
    from drift_jax.data.mining.detector_config import DetectorConfig

    return build_detector(validate(DetectorConfig, config.detector, "detector"), out / "judge.jsonl")


def _print_summary(stats: dict[str, Any], out: Path, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("file", "rows", "held out"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for name, file in stats["files"].items():
        table.add_row(name, f"{file['rows']:,}", f"{file['test_rows']:,}")
    console.print(table)
    rows = stats["rows"]
    console.print(
        f"{rows['read']:,} rows, {rows['bad']:,} of them left out as broken; {stats['conversations']:,} conversations"
    )
    for stage, reasons in stats["left_out"].items():
        for reason, count in reasons.items():
            console.print(Text(f"  {stage}: {reason}: {count:,}"), soft_wrap=True)
    for note in stats["notes"]:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    uses = [
        f"data.{name}: {out / file}, data.test_rows: {stats['files'][file]['test_rows']}"
        for name, file in (("dsat", "dsat.jsonl"), ("sat", "sat.jsonl"))
        if stats["files"][file]["rows"]
    ]
    use = f"; use it with {' or '.join(uses)}" if uses else ""
    console.print(Text(f"Look at {out / 'mined.html'}{use}"), soft_wrap=True)
