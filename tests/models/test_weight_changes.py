"""How many weights an export changes: counted against the files, over meshes and pieces, and rounded as they are."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from drift_jax.checkpoint import Checkpointer
from drift_jax.config import MeshConfig, RunConfig, build_config
from drift_jax.models import rows
from drift_jax.models.hf import load_params
from drift_jax.models.hf_export import save_hf
from drift_jax.sharding import build_layout
from drift_jax.stages.export import export_stage
from tests.tiny_models import build_tiny_model


def tensors(directory: Path, dtype: str) -> dict[str, np.ndarray]:
    found = {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}
    return {name: value.astype(np.dtype(dtype)) for name, value in found.items()}


def nudge(params: dict, share: float, by: float) -> dict:
    """Some of the weights of each parameter moved by a part of themselves."""

    def one(x: jax.Array) -> jax.Array:
        keys = np.random.default_rng(x.size).random(x.shape) < share
        return jax.device_put(jnp.where(keys, x * (1 + by) + by, x), x.sharding)

    return jax.tree.map(one, params)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(1, 4, 2)], ids=["one device", "fsdp and tensor"])
def test_the_share_is_that_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, dtype: str, mesh: MeshConfig
) -> None:
    monkeypatch.setattr(rows, "PIECE_BYTES", 1 << 12)
    source = build_tiny_model(tmp_path / "source", "qwen2", tied)
    layout = build_layout(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    params = nudge(load_params(source, layout), share=0.25, by=0.1)
    changed = save_hf(params, source, tmp_path / "out", dtype, max_shard_gib=1e-4)
    before, after = tensors(source, dtype), tensors(tmp_path / "out", dtype)
    counts = [(np.count_nonzero(before[name] != after[name]), after[name].size) for name in after]
    assert changed == sum(n for n, _ in counts) / sum(n for _, n in counts)
    assert 0.2 < changed < 0.3


def test_what_is_less_than_half_a_spacing_is_seen_in_float32_alone(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "source")
    layout = build_layout(MeshConfig(), jax.devices()[:1])
    save_hf(load_params(source, layout), source, tmp_path / "rounded", "bfloat16")
    params = jax.tree.map(lambda x: x * (1 + 1e-4), load_params(tmp_path / "rounded", layout))
    assert save_hf(params, tmp_path / "rounded", tmp_path / "a", "bfloat16") == 0
    exact = save_hf(params, tmp_path / "rounded", tmp_path / "b", "float32")
    assert exact is not None and exact > 0.9


def test_beside_another_model_or_none_there_is_no_share(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "source")
    params = load_params(source, build_layout(MeshConfig(), jax.devices()[:1]))
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert save_hf(params, bare, tmp_path / "out", "float32") is None
    assert save_hf(params, source, tmp_path / "out", "float32") == 0
    # The config of one model beside the weights of another.
    other = build_tiny_model(tmp_path / "other", vocab_size=640)
    shutil.copy(source / "config.json", other / "config.json")
    assert save_hf(params, other, tmp_path / "out", "float32") is None


@pytest.mark.parametrize(
    ("dtype", "by", "warns"), [("bfloat16", 1e-5, True), ("bfloat16", 1e-2, False), ("float32", 1e-5, False)]
)
def test_an_export_that_rounds_all_away_is_a_warning(tmp_path: Path, dtype: str, by: float, warns: bool) -> None:
    source = build_tiny_model(tmp_path / "source")
    config: RunConfig = build_config(
        {"run_dir": "r", "model": {"path": str(source)}, "export": {"dtype": dtype}, "mesh": {"fsdp": 4, "tensor": 2}}
    )
    layout = build_layout(config.mesh)
    save_hf(load_params(source, layout), source, tmp_path / "rounded", "bfloat16")
    params = jax.tree.map(lambda x: x * (1 + by), load_params(tmp_path / "rounded", layout))
    with Checkpointer(tmp_path / "checkpoints", 1, alone=True) as checkpointer:
        checkpointer.save(1, {"params": params, "optimizer": {"count": jnp.zeros(())}}, {"step": 1})
        checkpointer.wait()
    said = io.StringIO()
    console = Console(file=said, width=300)
    summary = export_stage(config, tmp_path / "checkpoints", tmp_path / "rounded", tmp_path / "hf", console)
    assert ("warning: only 0.00% of its weights differ" in said.getvalue()) == warns
    assert f"of its weights differ from those of {tmp_path / 'rounded'}" in said.getvalue()
    assert (summary["weights_changed"] == 0) == warns
