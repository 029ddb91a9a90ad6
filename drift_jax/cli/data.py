"""`drift data inspect` and `drift data convert`: what a file holds, and pairs in other forms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from drift_jax.cli.options import OnBadRow, OutDir, build_console, refuse_handbook

if TYPE_CHECKING:
    from drift_jax.data.inspection import Inspection

data_app = typer.Typer(help="Looks at data files, and converts them.", no_args_is_help=True)
_MOST_REASONS = 20


@data_app.command()
def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL of records, pairs or completions, JSON, or YAML.")
    ],
    on_bad_row: OnBadRow = None,
) -> None:
    """Validate a file of ours, every row of it, and say what is in it."""
    from drift_jax.data.inspection import inspect_file

    if file.suffix in (".yaml", ".yml"):
        refuse_handbook(file)
    _print_inspection(inspect_file(file, on_bad_row or "error"), file, build_console())


@data_app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="Folder with pairs (ours, or of TRL), dataset on disk, or JSONL file."),
    ],
    out: OutDir,
    to: Annotated[
        Literal["drift", "handbook", "disk"],
        typer.Option(help="pairs.*.jsonl as we read them, train.jsonl and test.jsonl, or a `datasets` directory."),
    ],
    on_bad_row: OnBadRow = None,
) -> None:
    """Write pairs in another form: ours, a folder of TRL and alignment-handbook, or `datasets` on disk."""
    from drift_jax.data.exchange import convert_pairs

    console = build_console()
    for split, done in convert_pairs(source, out, to, on_bad_row or "error").items():
        console.print(Text(f"{split}: {done.pairs:,} pairs, {len({line for line, _ in done.skipped})} rows left out"))
        _print_skipped(done.skipped, console)


def _print_inspection(found: Inspection, file: Path, console: Console) -> None:
    lines = [f"{file}: {found.kind}, {found.rows:,} rows, {len({line for line, _ in found.skipped})} left out"]
    for part, (least, median, most) in (found.lengths or {}).items():
        lines.append(f"  {part}: {least:,} to {most:,} characters, median {median:,}")
    if found.turns:
        lines.append(
            "  user turns of a prompt: " + ", ".join(f"{turn}: {rows:,}" for turn, rows in found.turns.items())
        )
    if found.keys:
        lines.append("  keys: " + ", ".join(f"{key} ({rows:,})" for key, rows in found.keys.items()))
    for key, counts in (found.values or {}).items():
        lines.append(f"  {key}: " + ", ".join(f"{value} ({rows:,})" for value, rows in counts.items()))
    console.print(Text("\n".join(lines)), soft_wrap=True)
    _print_skipped(found.skipped, console)


def _print_skipped(skipped: tuple[tuple[int, str], ...], console: Console) -> None:
    for line, why in skipped[:_MOST_REASONS]:
        console.print(Text(f"  row {line}: {why}"), soft_wrap=True)
    if len(skipped) > _MOST_REASONS:
        console.print(f"  ... and {len(skipped) - _MOST_REASONS:,} more")
