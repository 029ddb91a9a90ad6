"""A config's mesh as rows: which device is where, what splits which dim, how many bytes a device holds.

Nothing is computed a second time: placements, dtypes and moments are those of the trainer's own abstract state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from drift_jax.config import RunConfig
from drift_jax.errors import ConfigError
from drift_jax.mesh.drawing import Drawing, draw_array, draw_devices
from drift_jax.mesh.notes import find_notes, find_problems
from drift_jax.mesh.rows import (
    ArrayRow,
    Axes,
    BatchRow,
    HostRow,
    RuleRow,
    TotalRow,
    activation_rows,
    batch_row,
    find_axes_across,
    host_rows,
    named,
    parameter_rows,
    processes,
    rule_rows,
    total_rows,
)
from drift_jax.models.architecture import qwen_config_from_hf
from drift_jax.models.published import find_architecture
from drift_jax.sharding import ACTIVATIONS, Layout, build_layout, to_spec
from drift_jax.stages.dpo import build_trainer
from drift_jax.step import TrainState

# Of the stacked parameters the one that is drawn unless another is asked for: half of a model is like it.
DRAWN = "blocks.mlp.gate"


@dataclass(frozen=True)
class MeshReport:
    """All that `drift mesh` shows."""

    model: str
    num_parameters: int
    mesh: Mapping[str, int]  # devices per axis
    order: Axes  # outermost first: neighbours along the last axis are neighbours on the machine
    across_hosts: Axes
    platform: str
    device_kind: str
    planned: bool  # for devices that are not here
    hosts: tuple[HostRow, ...]
    strategy: str
    chosen: bool  # the strategy is the config's; False: by the axes
    rules: tuple[RuleRow, ...]
    parameters: tuple[ArrayRow, ...]
    totals: tuple[TotalRow, ...]
    batch: BatchRow
    activations: tuple[ArrayRow, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]  # why `drift run` would refuse this mesh
    drawings: tuple[Drawing, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rules = [dataclasses.asdict(row) | {"changed": row.changed} for row in self.rules]
        return dataclasses.asdict(self) | {"devices": self.devices, "rules": rules}


def build_report(
    config: RunConfig,
    devices: Sequence[jax.Device] | None = None,
    planned: bool = False,
    draw: Sequence[str] = (DRAWN,),
) -> MeshReport:
    """The report of a config over `devices` (default: those here).

    Args:
      planned: `devices` stand for others.
      draw: names of parameters to draw, besides a micro-batch.

    Raises:
      ConfigError: the mesh does not fit the devices or the model, or there is no such parameter to draw.
    """
    layout = build_layout(config.mesh, devices)
    hf_config = find_architecture(config.model.path, config.model.revision)
    qwen = qwen_config_from_hf(hf_config, source=f"config.json of {config.model.path}")
    state = _abstract_state(config, hf_config, layout)
    parameters = parameter_rows(qwen, state.params, layout)
    activations = activation_rows(qwen, layout)
    first = layout.mesh.devices.flat[0]
    return MeshReport(
        model=config.model.path,
        num_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        mesh=layout.sizes,
        order=tuple(layout.mesh.axis_names),
        across_hosts=find_axes_across(layout.mesh.axis_names, processes(layout)),
        platform=layout.platform,
        device_kind=first.device_kind,
        planned=planned,
        hosts=host_rows(layout),
        strategy=layout.strategy,
        chosen=config.mesh.strategy != "auto",
        rules=rule_rows(layout),
        parameters=parameters,
        totals=total_rows(config, state),
        batch=batch_row(config, layout),
        activations=activations,
        notes=tuple(find_notes(qwen, layout, (*parameters, *activations))),
        problems=tuple(find_problems(config, qwen, layout, planned)),
        drawings=tuple(_drawings(layout, parameters, state.params, draw)),
    )


def plan_devices(count: int) -> list[jax.Device]:
    """CPU devices that stand for `count` devices which are not here. To be called before JAX looks for devices.

    Raises:
      ConfigError: JAX has started with fewer.
    """
    with contextlib.suppress(RuntimeError):  # JAX has started: what is there is checked below
        jax.config.update("jax_num_cpu_devices", count)
        # Nothing is run, and a GPU or TPU of this machine may be someone else's.
        jax.config.update("jax_platforms", "cpu")
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"--devices {count}: JAX has started with {len(devices)} CPU devices in this process. Ask for as many "
            "or fewer, or ask in a process of its own."
        )
    return devices[:count]


def _abstract_state(config: RunConfig, hf_config: Mapping[str, Any], layout: Layout) -> TrainState:
    """Of the trainer that a stage would have. Its attention back end need not run on devices that stand for others."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
        return build_trainer(config, Path(folder), layout, steps=1).abstract_state


def _drawings(
    layout: Layout, rows: Sequence[ArrayRow], params: Mapping[str, Any], names: Sequence[str]
) -> Iterator[Drawing]:
    devices = draw_devices(layout)
    if devices is not None:
        yield devices
    leaves, known = dict(named(params)), {row.name: row for row in rows}
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no parameter {name!r} to draw; there are {', '.join(known)}.")
        yield draw_array(layout, name, known[name].dims, leaves[name].shape, leaves[name].sharding)
    # Rows and tokens are known to the data only; there are as many of each as can be split evenly.
    dims = ACTIVATIONS["hidden states"][:2]
    shape = tuple(layout.ways(dim) for dim in dims)
    sharding = jax.sharding.NamedSharding(layout.mesh, to_spec(dims, layout.rules))
    yield draw_array(layout, "a micro-batch, rows x tokens", dims, shape, sharding)
