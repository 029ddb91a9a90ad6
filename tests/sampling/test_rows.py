"""How many rows the sampler decodes together when the config leaves it open."""

from __future__ import annotations

import jax
import psutil
import pytest

from drift_jax.config import MeshConfig, RunConfig, build_config
from drift_jax.models.architecture import qwen_config_from_hf
from drift_jax.models.published import ARCHITECTURES
from drift_jax.sharding import Layout, build_layout
from drift_jax.stages.devices import free_memory, rows_that_fit

MODEL = qwen_config_from_hf(ARCHITECTURES["qwen2.5-7b"], "qwen2.5-7b")  # 28 layers, 4 kv heads of 128
ROW = 2 * 28 * 4 * 128 * 3072 * 2  # bytes: keys and values in bfloat16, room for 2048 + 512 tokens in steps


def config_of(**sampling: object) -> RunConfig:
    return build_config({"run_dir": "r", "model": {"path": "m"}, "sampling": {"batch_size": None, **sampling}})


@pytest.mark.parametrize(
    "mesh,free,expected",
    [
        (MeshConfig(fsdp=1), 10 * ROW, 4),  # a fifth is for prompts and logits; while it grows, a cache is there twice
        (MeshConfig(fsdp=1), 0.0, 1),
        (MeshConfig(fsdp=1), 1e15, 32),  # on a CPU
        (MeshConfig(fsdp=4), 5 * ROW, 8),
        (MeshConfig(fsdp=2, tensor=4), 2 * ROW, 6),  # a device has one kv head of a row
        (MeshConfig(fsdp=1, tensor=8), 10 * ROW, 4),  # eight devices cannot share four kv heads
    ],
)
def test_rows_that_fit(mesh: MeshConfig, free: float, expected: int) -> None:
    devices = mesh.fsdp * mesh.tensor
    layout = build_layout(mesh, jax.devices()[:devices])
    assert rows_that_fit(config_of(), layout, MODEL, free) == expected


def test_longer_rows_are_fewer() -> None:
    layout = build_layout(MeshConfig(), jax.devices()[:1])
    rows = [rows_that_fit(config_of(max_new_tokens=new), layout, MODEL, 20 * ROW) for new in (512, 4096)]
    assert rows == [9, 4]
    assert rows_that_fit(config_of(compute_dtype="float32"), layout, MODEL, 20 * ROW) == 4


def test_a_tpu_has_the_cache_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for v6e, the loop holds 0.29 GiB a row of the 14B model, whose keys and values are 0.14."""
    layout = build_layout(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(Layout, "platform", "tpu")
    assert [rows_that_fit(config_of(), layout, MODEL, free) for free in (20 * ROW, 1e15)] == [8, 256]


def test_a_host_says_what_it_has_left() -> None:
    """Eight devices here share the host's memory, half of which counts."""
    assert 0.5 < free_memory() * 16 / psutil.virtual_memory().available < 2
