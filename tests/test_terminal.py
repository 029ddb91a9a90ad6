"""Hostile text on a terminal: escape sequences and rich's markup in messages, rows, names and servers' lines."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from drift_jax.cli.options import build_console
from drift_jax.progress import PrintableOnly, StageSummary, printable, stage_progress, summary_table
from tests.cli_runs import Drift, base, drift, model_dir  # noqa: F401

# Clears the screen, sets the title, writes to the clipboard (with 7 and 8 bits), rings, goes back, deletes.
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x1b]52;c;aGk=\x1b\\\x9b2J\x07\r\x08\x7f"
MARKUP = "[red]x[/red] [link=http://evil]y[/link] [/]"


def console(width: int = 200, terminal: bool = True) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    made = Console(file=out, force_terminal=terminal, color_system=None, width=width, emoji=False)
    made.push_render_hook(PrintableOnly())
    return made, out


def controls(text: str) -> set[str]:
    return {char for char in text if not char.isprintable() and char != "\n"}


def test_no_escape_sequence_leaves_a_console_of_the_command() -> None:
    made, out = console(terminal=False)
    table = Table(title=ESCAPES)
    table.add_column(ESCAPES)
    table.add_row(ESCAPES)
    for what in (f"error: {ESCAPES}", Text(ESCAPES), table, ESCAPES.encode()):
        made.print(what, markup=False)
    made.print_json(json.dumps({"a": ESCAPES}))
    made.rule(ESCAPES)
    assert not controls(out.getvalue()) and "owned" in out.getvalue()


def test_colours_and_bars_of_ours_stay() -> None:
    out = io.StringIO()
    made = Console(file=out, force_terminal=True, color_system="standard", width=100)
    made.push_render_hook(PrintableOnly())
    made.print("[bold red]error:[/] text")
    with stage_progress("DPO", 2, console=made) as bar:
        bar.advance(1, f"vLLM: {ESCAPES}")
        made.print(f"beside {ESCAPES}", markup=False)
    text = out.getvalue()
    assert "\x1b[1;31merror:\x1b[0m text" in text and "DPO: 1/2" in text
    assert "\x1b[2J" not in text and "\x1b]" not in text and "\x9b" not in text and "\x07" not in text


def test_every_console_of_the_command_has_the_filter(capsys: pytest.CaptureFixture[str]) -> None:
    build_console().print(ESCAPES, markup=False)
    build_console(stderr=True).print(ESCAPES, markup=False)
    out, err = capsys.readouterr()
    assert "owned" in out and "owned" in err and not controls(out + err)


def test_markup_in_names_and_drops_is_text() -> None:
    made, out = console(terminal=False)
    made.print(summary_table([StageSummary(MARKUP, drops={MARKUP: 1})], title="t"))
    assert out.getvalue().count("[red]x[/red]") == 2 and printable(MARKUP) == MARKUP


def test_a_folder_with_markup_in_its_name(drift: Drift, base: Path) -> None:
    """The name is printed as it is. Orbax takes it for a pattern and finds no checkpoint again: refused at once."""
    name, config = "run[red]x[/red][/]", base / "config.yaml"
    code, _, err = drift("run", config, "--run-dir", base / name)
    assert code == 2 and f"cannot be kept in {base / name}" in err and not (base / name).exists()
    code, _, err = drift("train", config, "--model", base / "model", "--pairs", base / "pairs", "--out", base / name)
    assert code == 2 and f"cannot be kept in {base / name}" in err


def test_hostile_rows_and_files_in_errors(drift: Drift, base: Path) -> None:
    path = base / "dsat.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    row["prompt"][0]["role"] = ESCAPES + MARKUP
    path.write_text(json.dumps(row) + "\n")
    code, out, err = drift("data", "inspect", path)
    assert code == 2 and "[red]x[/red]" in err and not controls(out + err)
    strange = base / f"a{ESCAPES.replace('/', '')}[red].jsonl"
    code, out, err = drift("data", "inspect", strange)
    assert code == 2 and "[red]" in err and not controls(out + err)
