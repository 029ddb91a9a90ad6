"""`drift presets`, `config translate` and `doctor`: commands that look and do not train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from drift_jax.cli.handbook import devices_with_pairs, print_translation
from drift_jax.cli.options import Overrides, build_console, changes_of, out_file


def presets() -> None:
    """What the presets drift, paper and trl1 choose, and what every choice does."""
    from drift_jax.presets import presets_table

    build_console().print(presets_table())


config_app = typer.Typer(help="Reads and writes configs.", no_args_is_help=True)


@config_app.command()
def translate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A DPO file of alignment-handbook.")],
    devices: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Devices that hold pairs; the file's batch is per device. Default: those found here."),
    ] = None,
    out: Annotated[Optional[Path], out_file("Where to write; default: standard output.")] = None,  # noqa: UP045
    overrides: Overrides = None,
) -> None:
    """Writes the config that an alignment-handbook file means; the table of keys goes to standard error."""
    from drift_jax.config import config_to_yaml
    from drift_jax.files import atomic_writer
    from drift_jax.handbook import translate_handbook

    changes = changes_of(overrides, None)
    translation = translate_handbook(file, devices or devices_with_pairs({}, changes))
    print_translation(translation, build_console(stderr=True))
    text = config_to_yaml(translation.build(changes))
    if out is None:
        print(text, end="")
    else:
        with atomic_writer(out) as handle:
            handle.write(text)


def doctor() -> None:
    """Devices, versions, memory, and which extras are missing with the command that adds them."""
    from drift_jax.doctor import run_doctor

    raise typer.Exit(run_doctor(build_console()))
