"""Strategies and rules: what is chosen and refused, and that they change placements and never results."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from drift_jax.config import MeshConfig, TrainConfig
from drift_jax.data.batches import PairBatch, PairLoader, batch_split, put_batch
from drift_jax.data.pairs import TokenizedPair
from drift_jax.errors import ConfigError
from drift_jax.models.hf import load_params, load_qwen_config
from drift_jax.models.hf_export import save_hf
from drift_jax.models.qwen import declare_qwen, param_shardings
from drift_jax.sharding import (
    ACTIVATIONS,
    AXES,
    STRATEGIES,
    Layout,
    build_layout,
    build_sharding,
    to_spec,
    use_layout,
)
from drift_jax.step import loss_and_grads
from drift_jax.train import Trainer, host_metrics
from tests.tiny_models import build_tiny_model
from tests.tiny_pairs import random_pairs

CONFIG = TrainConfig(beta=0.3, rpo_alpha=0.5, batch_size=8)


def layout_of(**mesh: Any) -> Layout:
    return build_layout(MeshConfig(**mesh))


def refusal(**mesh: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        layout_of(**mesh)
    return str(refused.value)


# --- strategies -------------------------------------------------------------------------------------------


def test_there_is_a_strategy_for_every_set_of_axes() -> None:
    order = ("data", "fsdp", "tensor", "sequence")
    assert sorted(AXES) == sorted(order)
    assert set(STRATEGIES) == {"+".join(some) for n in range(1, 5) for some in combinations(order, n)}
    for name, table in STRATEGIES.items():
        assert {axis for axes in table.values() for axis in axes} == set(name.split("+"))
        for array, dims in ACTIVATIONS.items():
            to_spec(dims, table, array)


@pytest.mark.parametrize(
    ("sizes", "strategy"),
    [
        ({}, "fsdp"),
        ({"tensor": 2}, "fsdp+tensor"),
        ({"data": 2}, "data+fsdp"),
        ({"data": 8}, "data"),
        ({"tensor": 2, "sequence": 2}, "fsdp+tensor+sequence"),
        ({"fsdp": 1, "data": 2, "sequence": 4}, "data+sequence"),
    ],
    ids=str,
)
def test_auto_takes_the_axes_with_several_devices(sizes: dict[str, int], strategy: str) -> None:
    layout = layout_of(**sizes)
    assert layout.strategy == strategy and layout.rules == STRATEGIES[strategy] and layout.devices == 8


def test_one_device_is_fsdp() -> None:
    layout = build_layout(MeshConfig(), jax.devices()[:1])
    assert layout.strategy == "fsdp" and all(layout.ways(dim) == 1 for dim in layout.rules)


def test_a_named_strategy_may_have_more_axes_than_the_mesh() -> None:
    layout = layout_of(tensor=2, strategy="data+fsdp+tensor+sequence")
    assert layout.rules == STRATEGIES["data+fsdp+tensor+sequence"]
    assert (layout.ways("batch"), layout.ways("length"), layout.ways("vocab_slice"), layout.ways(None)) == (4, 1, 8, 1)


def test_an_axis_that_would_split_nothing_is_refused() -> None:
    message = refusal(tensor=2, strategy="fsdp")
    assert "mesh.strategy fsdp splits nothing over mesh axis 'tensor', which has 2 devices" in message
    assert "Set mesh.tensor to 1, or mesh.strategy to auto." in message
    rules = {"heads": (), "kv_heads": (), "mlp": (), "vocab": (), "vocab_slice": ("fsdp",)}
    assert "splits nothing over mesh axis 'tensor'" in refusal(tensor=2, rules=rules)


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({"strategy": "fast"}, "mesh.strategy 'fast' is not known; choose auto or one of data, fsdp, tensor,"),
        ({"strategy": "tensor+fsdp"}, "mesh.strategy 'tensor+fsdp' is not known"),
        ({"rules": {"heads": ("model",)}}, "mesh.rules.heads: there is no mesh axis 'model'; known: data, fsdp,"),
        ({"rules": {"width": ("tensor",)}}, "mesh.rules.width: there is no such dim; known: batch, embed,"),
        ({"rules": {"embed": ("fsdp", "fsdp")}}, "mesh.rules.embed: a mesh axis can split a dim once"),
        ({"tensor": 3}, "8 devices cannot be divided by 3"),
        ({"data": 2, "fsdp": 2}, "needs 4 devices, 8 are here"),
    ],
    ids=str,
)
def test_what_is_not_known_or_does_not_fit(mesh: dict[str, Any], words: str) -> None:
    assert words in refusal(**mesh)


def test_all_unknown_names_are_said_at_once() -> None:
    message = refusal(rules={"width": ("model",), "heads": ("tensors",)})
    assert [line.partition(":")[0] for line in message.splitlines()] == [
        "mesh.rules.width",
        "mesh.rules.width",
        "mesh.rules.heads",
    ]


@pytest.mark.parametrize(
    ("rules", "dims", "axis"),
    [
        ({"mlp": ("tensor", "fsdp")}, ("batch", "mlp"), "fsdp"),
        ({"embed": ("fsdp",), "kv_heads": ("fsdp",)}, ("batch", "kv_heads"), "fsdp"),
        ({"hidden": ("fsdp",)}, ("batch", "hidden"), "fsdp"),
    ],
    ids=str,
)
def test_a_collision_names_both_dims(rules: dict[str, tuple[str, ...]], dims: tuple[str, str], axis: str) -> None:
    message = refusal(tensor=2, rules=rules)
    assert f"dims {dims[0]!r} and {dims[1]!r} of" in message and f"both want mesh axis {axis!r}" in message
    assert f"Change mesh.rules.{dims[1]} or mesh.rules.{dims[0]}." in message


# --- arrays -----------------------------------------------------------------------------------------------


def test_what_cannot_be_split_evenly_names_both_numbers() -> None:
    layout = layout_of(tensor=8)
    with pytest.raises(ConfigError) as refused:
        build_sharding(layout, ("embed", "heads"), (64, 28), "q")
    message = str(refused.value)
    assert "q: dim 'heads' of size 28 cannot be split 8 ways" in message
    assert "whose product over 'tensor' divides 28, 4 for example, or change mesh.rules.heads" in message
    for dim in ("kv_heads", "vocab"):
        assert build_sharding(layout, ("embed", dim), (64, 28)).spec == PartitionSpec(None, None)


# --- the step ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("sharding") / "m", "qwen3", tied=True)


@dataclasses.dataclass(frozen=True)
class Computed:
    metrics: dict[str, float]
    grads: list[np.ndarray]
    collectives: Counter[str]  # of the compiled program, by kind


def compute(model_dir: Path, mesh: MeshConfig, pairs: list[TokenizedPair], count: int = 8) -> Computed:
    layout = build_layout(mesh, jax.devices()[:count])
    trainer = Trainer(*declare_qwen(load_qwen_config(model_dir)), layout, CONFIG, "layer", total_steps=10)
    params = load_params(model_dir, layout)
    with use_layout(layout):
        step = jax.jit(partial(loss_and_grads, trainer.setup))
        program = step.lower(params, put_batch(make_batch(layout, pairs), layout)).compile()
        metrics, grads = program(params, put_batch(make_batch(layout, pairs), layout))
    kinds = re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", program.as_text() or "")
    return Computed(host_metrics(metrics), [np.asarray(leaf) for leaf in jax.tree.leaves(grads)], Counter(kinds))


def make_batch(layout: Layout, pairs: list[TokenizedPair]) -> PairBatch:
    ref = -np.random.default_rng(5).uniform(50, 60, (len(pairs), 2))
    return PairLoader(pairs, ref, CONFIG.batch_size, 1, max_length=128, seed=3, split=batch_split(layout)).shuffled(0)


def assert_equal(found: Computed, expected: Computed) -> None:
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    for a, b in zip(found.grads, expected.grads, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.mesh
@pytest.mark.slow
def test_rules_change_the_program_and_not_its_results(model_dir: Path) -> None:
    pairs, sizes = random_pairs(8), {"fsdp": 4, "tensor": 2}
    expected = compute(model_dir, MeshConfig(fsdp=1), pairs, 1)
    plain = compute(model_dir, MeshConfig(**sizes), pairs)
    assert_equal(plain, expected)
    for rules in ({"embed": ()}, {"hidden": ("tensor",)}):
        changed = compute(model_dir, MeshConfig(**sizes, rules=rules), pairs)
        assert_equal(changed, expected)
        assert changed.collectives != plain.collectives, rules
        if "embed" in rules:  # what every device holds is not gathered
            assert changed.collectives["all-gather"] < plain.collectives["all-gather"]


@pytest.mark.mesh
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_of_an_odd_size(tmp_path: Path, tied: bool) -> None:
    """It loads, computes as on one device, and comes back bit for bit."""
    source = build_tiny_model(tmp_path / "m", "qwen2", tied=tied, vocab_size=381)
    pairs = [
        dataclasses.replace(
            pair, **{name: getattr(pair, name) % 381 for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        )
        for pair in random_pairs(8)
    ]
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    layout = build_layout(mesh)
    _, declared = declare_qwen(load_qwen_config(source))
    assert param_shardings(declared, layout)["embed"].spec == PartitionSpec(None, "fsdp")
    assert 381 % layout.ways("vocab_slice") and math.prod(layout.sizes.values()) == 8
    assert_equal(compute(source, mesh, pairs), compute(source, MeshConfig(fsdp=1), pairs, 1))
    save_hf(load_params(source, layout), source, tmp_path / "out", "float32")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor.view(np.uint32), after[name].view(np.uint32))


def test_heads_are_not_cut_up() -> None:
    message = refusal(tensor=2, rules={"heads": (), "kv_heads": (), "head_dim": ("tensor",)})
    assert "mesh.rules.head_dim: attention needs whole heads" in message


def test_what_collides_for_the_sampler_only_is_refused_before_training() -> None:
    """Its rows are split where training splits the tokens of a row."""
    message = refusal(fsdp=1, sequence=8, rules={"length": ("sequence",), "mlp": ("sequence",), "embed": ()})
    assert "'mlp'" in message and "both want mesh axis 'sequence'" in message
