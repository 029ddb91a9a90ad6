"""The `drift` command: parse, call, print. Exit code 2 and one message for what the user can mend."""

from __future__ import annotations

import os

import typer

from drift_jax.cli import sharding, stages, tools
from drift_jax.cli.options import build_console
from drift_jax.errors import DriftError

app = typer.Typer(
    name="drift",
    help="DRIFT: trains a chat model from the replies its users were unhappy with.\n\n"
    "Start with `drift doctor`, then `drift run configs/quickstart.yaml`. Every command takes `--help`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (stages.run, stages.sample, stages.train, stages.export, sharding.mesh, tools.presets, tools.doctor):
    app.command()(command)
app.add_typer(tools.config_app, name="config")


def main() -> None:
    """Console entry point."""
    # transformers brings tokenizers and templates here; that torch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        app()
    except DriftError as error:
        build_console(stderr=True).print(f"[bold red]error:[/] {_escape(error)}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None


def _escape(error: DriftError) -> str:
    from rich.markup import escape

    return escape(str(error))
