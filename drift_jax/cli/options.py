"""What several commands share: options, the console, and how overrides and models are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer
from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.errors import ConfigError
from drift_jax.files import is_address, refuse_file_in_path
from drift_jax.progress import PrintableOnly

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; examples are in configs/.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads this form on every version)
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the config, such as train.beta=0.2. Repeatable."),
]
BAD_ROW_HELP = "Rows that break the format: error (default) stops and lists them, skip leaves them out, counted."
OnBadRow = Annotated[Optional[Literal["error", "skip"]], typer.Option("--on-bad-row", help=BAD_ROW_HELP)]  # noqa: UP045
ModelDir = Annotated[str, typer.Option("--model", help="Hugging Face model directory or hub id.")]


def out_dir(help: str, option: str = "--out") -> Any:
    """An option for a directory to write into; refused before any work where there can be none."""
    return typer.Option(option, help=help, parser=_path_of(option, refuse_file_in_path), metavar="PATH")


def out_file(help: str, option: str = "--out", metavar: str = "FILE") -> Any:
    """An option for a file to write; refused before any work where there can be none."""

    def check(path: Path) -> None:
        if path.is_dir():
            raise ConfigError(f"{option} {path}: that is a directory. Name a file in it.")
        refuse_file_in_path(path.parent)

    return typer.Option(option, help=help, parser=_path_of(option, check), metavar=metavar)


def in_dir(help: str, option: str) -> Any:
    """An option for a directory to read."""
    return typer.Option(option, help=help, parser=_path_of(option), metavar="PATH")


def _path_of(option: str, check: Callable[[Path], None] = lambda _: None) -> Callable[[str], Path]:
    def read(text: str) -> Path:
        if not text:  # a Path of it would be this directory
            raise ConfigError(
                f"{option} is empty, as a shell's variable that is not set. Give a path; . is this directory."
            )
        if is_address(text):
            raise ConfigError(f"{option} {text}: that is an address. Mount the bucket and give the mounted path.")
        check(Path(text))
        return Path(text)

    return read


OutDir = Annotated[Path, out_dir("Directory for the results.")]
OptionalOutDir = Annotated[Optional[Path], out_dir("Directory for the results.")]  # noqa: UP045


def changes_of(overrides: list[str] | None, on_bad_row: str | None, **keys: object) -> list[str]:
    """What the command line changes in a config, as `a.b=c`."""
    changes = list(overrides or [])
    if on_bad_row is not None:
        changes.append(change("data.on_bad_row", on_bad_row))
    return changes + [change(key, value) for key, value in keys.items() if value is not None]


def change(key: str, text: object) -> str:
    """`key=text`, quoted: the right side of an override is YAML, which would read `2024` or `a #b` otherwise."""
    return f"{key}={json.dumps(str(text), ensure_ascii=False)}"


def build_console(stderr: bool = False) -> Console:
    """Colons in paths and values are no emoji codes. Of several processes only the first one talks, errors apart."""
    import jax

    quiet = not stderr and jax.distributed.is_initialized() and jax.process_index() != 0
    console = Console(stderr=stderr, emoji=False, quiet=quiet)
    console.push_render_hook(PrintableOnly())
    return console


def refuse_handbook(config: Path) -> None:
    """Raises `ConfigError` with the ways to use a handbook file where a CONFIG of ours is asked for."""
    from drift_jax.handbook import is_handbook_file

    if is_handbook_file(config):
        raise ConfigError(
            f"{config} is a file of alignment-handbook. `drift run --handbook {config}` and `drift train {config}` "
            f"take it as it is; `drift config translate {config} --out FILE` writes it as a CONFIG."
        )


def resolve(model: str, config: RunConfig) -> Path:
    """The directory of a model. The config's revision is one of the config's model, and of no other."""
    from drift_jax.models.hf import resolve_model

    return resolve_model(model, config.model.revision if model == config.model.path else None)
