"""Slices of TPUs and machines with GPUs that are not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from jax.experimental import topologies

from drift_jax.errors import ConfigError
from drift_jax.plan import gpus, slices
from tests.plan.tiny_plan import (
    needs_gpu_compiler,
    needs_tpu_compiler,
    raw_config,
    run_with_gpu_compiler,
    run_with_tpu_compiler,
    write_model,
)


@pytest.mark.parametrize("topology", ["v9:4x4", "v5e", "4x4", "v5e:4x", "v4:2x2x1", "h100", "h100:", "h900:8"])
def test_unknown_slices_are_refused(topology: str) -> None:
    with pytest.raises(ConfigError, match=r"no slice that can be planned for.*v5e:4x4.*v5p:2x2x2"):
        slices.open_slice(topology)


def test_missing_tpu_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'drift-jax\[plan\]'"):
        slices.open_slice("v5e:4x4")


def test_missing_gpu_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'drift-jax\[plan-gpu\]'"):
        slices.open_slice("h100:8")


@pytest.mark.parametrize(("topology", "shape", "count"), [("h100:8", "1x1x8", 8), ("H200:2x4", "1x2x4", 8)])
def test_gpus_are_described(topology: str, shape: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler is asked for; hosts x GPUs of each, and the memory of that GPU."""
    asked: list[dict[str, Any]] = []

    class Described:
        devices = tuple(range(count))

    def describe(name: str, **options: Any) -> Described:
        asked.append(options)
        return Described()

    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    where = slices.open_slice(topology)
    assert asked[0]["platform"] == "cuda" and asked[0]["topology"] == shape
    assert where.chip.name.lower().split()[0] in asked[0]["target_config"].lower()
    assert len(where.devices) == count and bool(where.host) == shape.startswith("1x2")


@needs_gpu_compiler
@pytest.mark.slow
def test_a_step_compiled_for_gpus(tmp_path: Path) -> None:
    config_file = tmp_path / "run.yaml"
    # The Triton kernel takes no heads of this size.
    config_file.write_text(yaml.safe_dump(raw_config(str(write_model(tmp_path)), model={"attention": "xla"})))
    words = ["-m", "drift_jax", "plan", config_file, "--topology", "h100:8", "--json"]
    (row,) = json.loads(run_with_gpu_compiler(words, 300))
    assert row["fits"] and row["mesh"]["fsdp"] == 8 and "XLA's GPU compiler" in row["about"]
    assert {"all-gather", "reduce-scatter"} <= {traffic["kind"] for traffic in row["collectives"]}


def test_too_many_devices_are_refused() -> None:
    assert len(jax.devices()) == 8  # JAX has started, so that its number of fake devices stays
    with pytest.raises(ConfigError, match=r"--devices 9: 8 cpu devices are here"):
        slices.open_local(9)


ARRANGED = """
import json, sys
from drift_jax.plan.slices import open_slice
where = open_slice("v6e:4x4")
from jax.experimental import topologies
from drift_jax.config import MeshConfig
from drift_jax.errors import ConfigError
from drift_jax.sharding import build_layout
two = topologies.get_topology_desc(platform="tpu", topology_name="v6e:4x4", num_slices=2).devices
pairs = build_layout(MeshConfig(fsdp=8, tensor=2), where.devices).mesh.devices.reshape(8, 2)
steps = [sum(abs(x - y) for x, y in zip(a.coords, b.coords)) for a, b in pairs]
halves = build_layout(MeshConfig(tensor=2), two).mesh.devices.reshape(2, -1)
try:
    refused = build_layout(MeshConfig(fsdp=1, tensor=32), two)
except ConfigError as error:
    refused = str(error)
print(json.dumps([steps, [sorted({d.slice_index for d in half}) for half in halves], refused]))
"""


@needs_tpu_compiler
@pytest.mark.slow
def test_meshes_lie_on_slices(tmp_path: Path) -> None:
    """8 x 2 on 4 x 4 chips: tensor over neighbours. Two slices: pairs over the network between them, nothing else."""
    script = tmp_path / "arranged.py"
    script.write_text(ARRANGED)
    steps, halves, refused = json.loads(run_with_tpu_compiler([script], 120).splitlines()[-1])
    assert set(steps) == {1}
    assert halves == [[0], [1]]
    assert "2 slices, over which only pairs can be split. Make mesh.data or mesh.fsdp a multiple of 2" in refused
