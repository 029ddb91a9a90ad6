"""What an evaluation shows: tables on the terminal, and the same tables as Markdown beside the numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drift_jax.evaluation.intervals import Interval
from drift_jax.files import atomic_writer, refuse_file_in_path, write_json


@dataclass(frozen=True)
class Section:
    """A table; the first column is text, the others stand on the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Report:
    """Tables, and one sentence each on what they rest on or lack; `data` is all of it as JSON values."""

    title: str
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


def write_report(report: Report, out_dir: Path, name: str = "report") -> None:
    """Writes NAME.json and NAME.md. Raises `StageError` as `files.atomic_writer` does."""
    refuse_file_in_path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / f"{name}.json", dict(report.data))
    with atomic_writer(out_dir / f"{name}.md") as file:
        file.write(to_markdown(report))


def to_markdown(report: Report) -> str:
    """GitHub Markdown."""
    parts = [f"# {_cell(report.title)}\n"]
    for section in report.sections:
        aligned = ["---", *["---:"] * (len(section.columns) - 1)]
        lines = [section.columns, aligned, *section.rows]
        table = "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)
        parts.append(f"## {_cell(section.title)}\n\n{table}")
    if report.notes:
        parts.append("".join(f"* {_cell(note)}\n" for note in report.notes))
    return "\n".join(parts)


def print_report(report: Report, console: Console) -> None:
    for section in report.sections:
        table = Table(title=escape(section.title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for i, column in enumerate(section.columns):
            table.add_column(escape(column), justify="right" if i else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for note in report.notes:
        console.print(note, markup=False, highlight=False)


def number(value: float | None, spec: str = ".2f") -> str:
    """A cell; a dash for what was not computed."""
    return "-" if value is None else format(value, spec)


def with_interval(value: float | None, interval: Interval | Sequence[float] | None, spec: str = ".2f") -> str:
    """A cell such as `51.2 [48.0, 54.4]`."""
    if value is None or interval is None:
        return number(value, spec)
    return f"{value:{spec}} [{interval[0]:{spec}}, {interval[1]:{spec}}]"


def _cell(text: str) -> str:
    """On one line, without the marks of a table or of HTML: names of models and files are not ours."""
    for mark, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        text = text.replace(mark, shown)
    return " ".join(text.split())
