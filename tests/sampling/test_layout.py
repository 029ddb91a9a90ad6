"""How a sampler splits policy and rows over devices, for published models on the machines that people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from drift_jax.config import RunConfig, build_config
from drift_jax.errors import ConfigError
from drift_jax.models.architecture import QwenConfig, qwen_config_from_hf
from drift_jax.models.published import ARCHITECTURES
from drift_jax.stages.devices import describe_split, linked, split_for_sampling
from tests.plan.tiny_plan import ARCHITECTURE, REPO, needs_tpu_compiler, run_with_tpu_compiler

pytestmark = pytest.mark.mesh

GIB = 2**30
SHORT = (
    "sampling.max_new_tokens=32",
    "sampling.max_input_length=100",
    "data.max_length=192",
    "data.max_prompt_length=64",
)


def model_of(name: str) -> QwenConfig:
    return qwen_config_from_hf(ARCHITECTURES[name], name)


def config_of(**sampling: object) -> RunConfig:
    mesh = {"fsdp": 4, "sequence": 2}  # of training
    return build_config({"run_dir": "r", "model": {"path": "m"}, "mesh": mesh, "sampling": {**sampling}})


@pytest.mark.parametrize(
    ("name", "devices", "gib", "expected"),
    [
        ("qwen2.5-7b", 8, 74.5, (2, 1, 4)),  # 4 kv heads
        ("qwen2.5-1.5b", 8, 74.5, (4, 1, 2)),  # 2 kv heads
        ("qwen2.5-14b", 4, 15.75, (1, 1, 4)),  # 8 kv heads, one host of a v5e
        ("qwen3-32b", 8, 15.75, (1, 1, 8)),  # 61 GiB of weights
        ("qwen2.5-7b", 8, 5.0, (1, 2, 4)),  # a quarter of the weights has no room, half a quarter has
        ("qwen2.5-7b", 8, 1.0, (1, 2, 4)),  # nothing has: what comes closest
        ("qwen2.5-7b", 8, None, (2, 1, 4)),
        ("qwen2.5-7b", 1, 74.5, (1, 1, 1)),
        ("qwen2.5-14b", 6, 18.0, (3, 1, 2)),  # a width of 5120 is not divided by three
        ("qwen2.5-7b", 6, 74.5, (3, 1, 2)),  # three do not divide four heads
    ],
)
def test_kv_heads_and_memory_choose(name: str, devices: int, gib: float | None, expected: tuple[int, int, int]) -> None:
    limits = [None if gib is None else gib * GIB] * devices
    layout = split_for_sampling(config_of(), model_of(name), jax.devices()[:devices], limits)
    assert tuple(layout.sizes[axis] for axis in ("data", "fsdp", "tensor")) == expected
    assert layout.sizes["sequence"] == 1 and layout.devices == devices


def test_the_user_is_told() -> None:
    model = model_of("qwen2.5-7b")
    for devices, said in ((8, "8 devices (data 2, tensor 4)"), (1, "one device")):
        layout = split_for_sampling(config_of(), model, jax.devices()[:devices], [])
        assert describe_split(layout, 128) == f"the sampler decodes 128 rows at a time on {said}"


def test_the_config_may_choose() -> None:
    model, devices = model_of("qwen2.5-1.5b"), jax.devices()  # 12 heads, 2 kv heads, MLP of 8960
    for ways in (1, 4):
        layout = split_for_sampling(config_of(tensor_parallel=ways), model, devices, [])
        assert layout.sizes["tensor"] == ways and layout.ways("batch") == 8 // ways
    for ways, better in ((8, 4), (3, 2)):
        with pytest.raises(ConfigError, match=rf"\({ways}\) must divide .* sample .8.*heads .12.* {better} would do"):
            split_for_sampling(config_of(tensor_parallel=ways), model, devices, [])


class Device(NamedTuple):
    platform: str
    process_index: int
    slice_index: int = 0


def test_a_host_is_linked_and_a_slice_of_tpus() -> None:
    """A layer split over two machines with GPUs would wait for the network between them at every token."""
    assert linked([Device("gpu", host) for host in (0, 0, 0, 0, 1, 1, 1, 1)]) == 4
    assert linked([Device("tpu", host) for host in (0, 0, 0, 0, 1, 1, 1, 1)]) == 8
    assert linked([Device("tpu", host, host // 2) for host in (0, 0, 1, 1, 2, 2, 3, 3)]) == 4


@needs_tpu_compiler
@pytest.mark.slow
def test_a_token_sends_no_weights(tmp_path: Path) -> None:
    """Bytes that a chip gets for each new token of its rows; over `fsdp`, which trains here, they are the weights."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURE | sizes))
    changes = [word for change in SHORT for word in ("--set", change)]
    script = REPO / "scripts" / "bench_sampler_mesh.py"
    words = [script, "--model", tmp_path, "--topology", "v5e:2x2", "--rows", 64, *changes]
    line = json.loads(run_with_tpu_compiler(words, 120).splitlines()[-1])
    assert line["mesh"] == {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}
    assert line["fsdp_mb_per_step"] > line["weights_mb"] / 2
    assert line["mb_per_step"] < line["weights_mb"] / 10 and line["ratio"] > 5
