"""`drift plan`: what fits where, and what it costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
import yaml
from rich.console import Console

from drift_jax.cli.options import ConfigFile, Overrides, build_console, out_file, refuse_handbook
from drift_jax.config import RunConfig, apply_override, build_config, read_yaml
from drift_jax.errors import ConfigError
from drift_jax.files import atomic_writer

if TYPE_CHECKING:
    from drift_jax.plan.rows import Row
    from drift_jax.plan.search import Choice
    from drift_jax.plan.slices import Slice

# The imports of JAX are in the functions: the number of fake devices and the platform are set before it starts.

# Typer reads `Optional` on every version.
Topology = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="A TPU slice (v5e:4x4, v5p:2x2x2, v6e:4x4, ...) or GPUs (h100:8): compiled for without them."),
]
Devices = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Compile for so many devices of this machine instead; on a CPU they are fake."),
]
HbmGib = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="With --devices: the memory of a device in GiB. Default: 80 GB, an H100's 74.5 GiB."),
]
Search = Annotated[
    bool, typer.Option("--search", help="Try meshes, accumulation and remat, and name the best that fits.")
]
MaxCompiles = Annotated[int, typer.Option(min=1, help="With --search: so many train steps are compiled at most.")]
Write = Annotated[
    Optional[Path],  # noqa: UP045
    out_file("With --search: CONFIG with the keys of the best one, without CONFIG's comments.", "--write"),
]
Html = Annotated[
    Optional[Path],  # noqa: UP045
    out_file("Write a page with bar charts of memory and time.", "--html"),
]


def plan(
    config: ConfigFile,
    topology: Topology = None,
    devices: Devices = None,
    hbm_gib: HbmGib = None,
    search: Search = False,
    max_compiles: MaxCompiles = 6,
    write: Write = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as a JSON list, and nothing else.")] = False,
    html: Html = None,
    overrides: Overrides = None,
) -> None:
    """Compile a run for a slice that need not be there: what fits in a chip, what devices send, how long it takes."""
    if write is not None and not search:
        raise ConfigError("--write writes what --search finds: give both, or neither.")
    for path in (write, html):  # before anything is compiled
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no directory {path.parent}. Make it first.")
    refuse_handbook(config)
    raw = read_yaml(config)
    for override in overrides or []:
        apply_override(raw, override)
    where = open_devices(topology, devices, hbm_gib)
    resolved = build_config(raw, source=str(config))
    progress = build_console(stderr=True)
    rows, choice = run_plan(resolved, where, search, max_compiles, progress)
    title = f"{config.name} ({resolved.model.path}) on {where.name}"
    if html is not None:
        from drift_jax.plan.show import render_page

        _write(html, render_page(rows, title, choice.why if choice else ""))
    console = progress if as_json else build_console()
    if as_json:
        print(json.dumps([row.to_json() | ({"best": row is choice.best} if choice else {}) for row in rows]))
    else:
        from drift_jax.plan.show import print_plan

        print_plan(rows, console, title)
    if choice is not None:
        _say(choice.why, console)
    if write is not None and choice is not None:
        _write_choice(write, raw, choice, title, console)


def _write_choice(path: Path, raw: dict[str, Any], choice: Choice, title: str, console: Console) -> None:
    """Raises `ConfigError` when nothing fits."""
    if choice.config is None:
        raise ConfigError(f"{path} is not written: nothing fits. {choice.why}")
    _write(path, _with_choice(raw, choice.config, title))
    _say(f"written: {path}", console)


def _say(text: str, console: Console) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def open_devices(topology: str | None, devices: int | None, hbm_gib: float | None) -> Slice:
    """Raises `ConfigError` unless exactly one of `topology` and `devices` is given."""
    from drift_jax.plan.slices import EXAMPLES, open_local, open_slice

    if (topology is None) == (devices is None):
        raise ConfigError(
            f"give --topology (a slice, such as {', '.join(EXAMPLES[::2])}) or --devices (so many of this machine)."
        )
    if topology is None:
        assert devices is not None
        return open_local(devices, hbm_gib)
    if hbm_gib is not None:
        raise ConfigError("--hbm-gib goes with --devices: the memory of a slice is known.")
    return open_slice(topology)


def run_plan(
    config: RunConfig, where: Slice, search: bool, max_compiles: int, console: Console
) -> tuple[list[Row], Choice | None]:
    """The rows of a plan, and what a search chose; shows on `console` what is being compiled."""
    from drift_jax.models.published import find_architecture
    from drift_jax.plan.programs import PROGRAMS
    from drift_jax.plan.rows import plan_row
    from drift_jax.plan.search import search as search_plan
    from drift_jax.progress import stage_progress

    architecture = find_architecture(config.model.path, config.model.revision)
    if not search:
        with stage_progress(f"compiling for {where.name}", len(PROGRAMS), "programs", console=console) as bar:
            on_program: Callable[[str], None] = lambda name: bar.advance(1, name)  # noqa: E731
            return [plan_row(config, architecture, where, on_program=on_program)], None
    from drift_jax.plan.show import label

    total = max_compiles + 1
    with stage_progress(f"compiling for {where.name}", total, "choices", console=console) as bar:

        def show(row: Row) -> None:
            if bar.count < total:
                needs = f"{row.hbm_gib_per_chip:.2f} GiB" if row.hbm_gib_per_chip else "cannot be split"
                bar.advance(1, f"{label(row)}: {needs}{'' if row.fits else ', does not fit'}")

        choice = search_plan(config, architecture, where, max_compiles, show)
        bar.advance(total - bar.count)
    return choice.rows, choice


def _with_choice(raw: dict[str, Any], chosen: RunConfig, title: str) -> str:
    """The user's keys with those of the choice, as YAML."""
    mine = json.loads(json.dumps(raw, default=str))
    mesh = mine.get("mesh", {})
    for key, value in dataclasses.asdict(chosen.mesh).items():
        if isinstance(value, int) or key in mesh:  # sizes, and what the user has set besides
            mesh[key] = value
    mine["mesh"] = mesh
    mine.setdefault("train", {})["accumulation_steps"] = chosen.train.accumulation_steps
    mine.setdefault("model", {})["remat"] = chosen.model.remat
    head = f"# mesh, train.accumulation_steps and model.remat as `drift plan --search` chose them: {title}\n"
    return head + yaml.safe_dump(mine, sort_keys=False, allow_unicode=True)


def _write(path: Path, text: str) -> None:
    with atomic_writer(path) as file:
        file.write(text)
