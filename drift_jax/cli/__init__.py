"""The `drift` command: parse, call, print. Exit code 2 and one message for what the user can mend, 75 when stopped."""

from __future__ import annotations

import gc
import os

import typer
from rich.markup import escape

from drift_jax.cli import data, mine, parts, plan, report, sharding, stages, tools
from drift_jax.cli.evaluate import evaluate_app
from drift_jax.cli.options import build_console
from drift_jax.cli.processes import across_processes, alone, end_stopped, end_together, is_mine_to_tell, tell_lost_peer
from drift_jax.errors import DriftError
from drift_jax.files import STORAGE_ERRORS
from drift_jax.progress import printable
from drift_jax.stopping import Stopped

app = typer.Typer(
    name="drift",
    help="DRIFT: trains a chat model from the replies its users were unhappy with.\n\n"
    "Start with `drift doctor`, then `drift run configs/quickstart.yaml`. Every command takes `--help`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(across_processes(stages.run, parts.run_in_parts))
app.command()(across_processes(stages.sample, parts.prepare_sample))
for command in (stages.train, stages.export, sharding.mesh):
    app.command()(across_processes(command))
app.command()(alone(mine.mine))
for command in (tools.presets, tools.doctor, plan.plan, report.report, report.card):
    app.command()(command)
app.add_typer(tools.config_app, name="config")
app.add_typer(data.data_app, name="data")
app.add_typer(evaluate_app, name="evaluate")


def _tell(text: str) -> None:
    build_console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)


def _names_a_file(error: OSError) -> bool:
    """The number of an open file is no name."""
    return bool(error.filename) and isinstance(error.filename, str | bytes | os.PathLike)


def main() -> None:
    """Console entry point."""
    # transformers brings tokenizers and templates here; that torch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # A full collection looks through all that JAX has traced, for a fifth of a second: ten times fewer of them. What
    # was made lately is looked through as often as ever.
    gc.set_threshold(*gc.get_threshold()[:2], 100)
    try:
        app()
    except DriftError as error:
        if is_mine_to_tell(error):
            _tell(str(error))
        end_together(2)
    except Stopped:
        end_stopped()
    except OSError as error:
        # The user's disk or path, not our mistake; any other error is shown with where it arose.
        if error.errno not in STORAGE_ERRORS and not _names_a_file(error):
            tell_lost_peer(error)
            end_together(1)
        where = f" {printable(os.fsdecode(error.filename))}" if _names_a_file(error) else ""
        remedy = "What was finished is kept: look at the disk, and run the same command again."
        if error.errno not in STORAGE_ERRORS:
            remedy = "Look at what is there, or give another path."
        _tell(f"the system refuses to read or write{where}: {error.strerror or error}. {remedy}")
        end_together(2)
    except Exception as error:
        tell_lost_peer(error)
        end_together(1)
