"""`drift mesh`: what a config's mesh makes of its model."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from drift_jax.cli.options import ConfigFile, Overrides, build_console, refuse_handbook
from drift_jax.config import load_config


def mesh(
    config: ConfigFile,
    overrides: Overrides = None,
    devices: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--devices", min=1, help="Plan for so many devices that are not here. Default: those found here."),
    ] = None,
    draw: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--draw", metavar="PARAMETER", help="Draw this one, such as blocks.attention.q. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Shows the mesh, the sharding rules, and of every parameter the split and the bytes per device."""
    from drift_jax.distributed import is_main
    from drift_jax.mesh.render import print_report
    from drift_jax.mesh.report import DRAWN, build_report, plan_devices

    refuse_handbook(config)
    resolved = load_config(config, overrides or [])
    where = None if devices is None else plan_devices(devices)
    report = build_report(resolved, where, devices is not None, draw or [DRAWN])
    if not is_main():
        return
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        print_report(report, build_console())
