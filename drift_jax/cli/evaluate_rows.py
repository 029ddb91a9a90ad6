"""`--rows` of `drift evaluate wildbench` and `alpaca-eval`: numbers of rows that are there already, printed as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from drift_jax.errors import ConfigError

RowsOption = Annotated[
    Optional[list[Path]],  # noqa: UP045  (typer reads this form on every version)
    typer.Option(
        "--rows", help="Print the numbers of a file of rows, or of a published table. Repeatable: models are rated."
    ),
]
AnnotationsOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--rows", help="Print the win rates of a file of annotations."),
]


def refuse_beside_rows(given: Mapping[str, object]) -> None:
    """Raises `ConfigError` for what `--rows` has no use for: nothing is sampled, judged or written.

    Args:
      given: values by option; what is false was not given.
    """
    useless = [option for option, value in given.items() if value]
    if useless:
        raise ConfigError(
            f"--rows prints numbers of rows that are there already, and has no use for {', '.join(useless)}. Leave "
            f"{'it' if len(useless) == 1 else 'them'} out, or --rows."
        )


def print_wildbench_rows(rows: Sequence[Path], tasks: Path | None, references: Sequence[str], k: int) -> None:
    """Raises `ConfigError` for several references, and `DataError` as `recompute` does."""
    from drift_jax.evaluation.wildbench_files import recompute
    from drift_jax.evaluation.wildbench_rows import open_tasks

    if len(references) > 1:
        raise ConfigError(
            f"--rows takes one --reference, the name of the model that the rows are against, found {len(references)}. "
            "Leave the others out."
        )
    tags = {task.session_id: task.groups for task in open_tasks(tasks)} if tasks else None
    _print_json(recompute(rows, tags, next(iter(references), None), k))


def print_alpaca_rows(rows: Path) -> None:
    """Raises `DataError` as `win_rates` does."""
    from drift_jax.evaluation.alpaca_eval import win_rates

    _print_json(win_rates(read_rows(rows)))


def read_rows(path: Path) -> list[dict[str, Any]]:
    from drift_jax.evaluation.json_rows import read_json

    return read_json(path, "rows")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
