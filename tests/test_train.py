"""The DPO step against torch in float64, over meshes, micro-batches and row lengths."""

from __future__ import annotations

import dataclasses
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.config import MeshConfig, TrainConfig
from drift_jax.data.batches import PairBatch, PairLoader, batch_split, put_batch
from drift_jax.data.packing import Split
from drift_jax.data.pairs import TokenizedPair
from drift_jax.errors import ConfigError, StageError
from drift_jax.guards import check_first_loss, check_params_changed
from drift_jax.models.attention import BACKENDS
from drift_jax.models.hf import load_params, load_qwen_config
from drift_jax.models.qwen import declare_qwen
from drift_jax.sharding import build_layout, check_batch, use_layout
from drift_jax.step import arrange, loss_and_grads, micro_batch
from drift_jax.train import Trainer, evaluate_scores, host_metrics
from tests.hf_tensors import to_hf_tensors
from tests.tiny_models import build_tiny_model
from tests.tiny_pairs import random_pairs
from tests.torch_reference import torch_reference

CONFIG = TrainConfig(beta=0.3, label_smoothing=0.1, rpo_alpha=0.5, batch_size=8, learning_rate=1e-4, warmup_ratio=0.0)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("policy") / "m", request.param, tied=request.param == "qwen2")


def make_trainer(
    model_dir: Path,
    sizes: tuple[int, ...] = (1, 1, 1),
    config: TrainConfig = CONFIG,
    scan_layers: bool | None = None,
) -> tuple[Trainer, dict[str, Any]]:
    layout = build_layout(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    declared = declare_qwen(load_qwen_config(model_dir))
    trainer = Trainer(*declared, layout, config, "layer", total_steps=10, scan_layers=scan_layers)
    return trainer, load_params(model_dir, layout)


def make_loader(pairs: list[TokenizedPair], accumulation: int = 1, batch_size: int = 8, **packing: Any) -> PairLoader:
    """`packing`: split, tokens_per_device, compile_tokens."""
    ref = -np.random.default_rng(5).uniform(50, 60, (len(pairs), 2))
    return PairLoader(pairs, ref, batch_size, accumulation, max_length=128, seed=3, **packing)


def compute(trainer: Trainer, params: dict[str, Any], batch: PairBatch) -> tuple[dict[str, float], dict[str, Any]]:
    with use_layout(trainer.layout):
        metrics, grads = jax.jit(partial(loss_and_grads, trainer.setup))(params, put_batch(batch, trainer.layout))
    return host_metrics(metrics), grads


@cache
def on_one_device(model_dir: Path, pairs: int) -> tuple[dict[str, float], dict[str, Any]]:
    """What others are compared with: the first batch of so many pairs, in one micro-batch."""
    return compute(*make_trainer(model_dir), make_loader(random_pairs(pairs)).shuffled(0))


def relative_errors(grads: dict[str, Any], expected: dict[str, Any]) -> list[float]:
    """Of each tensor the norm of the difference over its norm."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True)
    wide = ((np.asarray(x, np.float32) for x in pair) for pair in pairs)
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in wide]


def test_loss_and_gradients_equal_torch(model_dir: Path) -> None:
    loader = make_loader(random_pairs(8))
    expected, expected_grads = torch_reference(model_dir, loader.pairs, loader.ref_logps, CONFIG)
    metrics, grads = on_one_device(model_dir, 8)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    ours = to_hf_tensors(grads, load_qwen_config(model_dir))
    assert ours.keys() == expected_grads.keys()
    for name, value in expected_grads.items():
        error = np.linalg.norm(ours[name] - value) / np.linalg.norm(value)
        assert error < 1e-5, f"{name}: {error:.2e}"


def test_a_token_that_is_not_counted_is_seen(model_dir: Path) -> None:
    """The negative twin: counting one token too few per completion is far outside the tolerance."""
    loader = make_loader(random_pairs(8))
    expected, _ = torch_reference(model_dir, loader.pairs, loader.ref_logps, CONFIG)
    trainer, params = make_trainer(model_dir)
    batch = loader.shuffled(0)
    first = batch.owners != np.pad(batch.owners[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1)
    broken = batch._replace(owners=np.where(first, -1, batch.owners))
    assert abs(compute(trainer, params, broken)[0]["loss"] - expected["loss"]) > 1e-2


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [
        ((8, 1, 1, 1), None),
        ((1, 8, 1, 1), None),
        ((2, 4, 1, 1), 128),
        ((2, 2, 2, 1), None),
        ((1, 4, 2, 1), 128),
        ((1, 2, 2, 2), None),
        ((1, 2, 2, 2), 128),
        ((1, 2, 4, 1), None),
        ((2, 1, 1, 4), 128),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(
    model_dir: Path, sizes: tuple[int, int, int, int], tokens: int | None
) -> None:
    """(data, fsdp, tensor, sequence), in the loader's rows for that mesh, with a budget or the least there can be."""
    pairs = random_pairs(8)
    expected, expected_grads = on_one_device(model_dir, 8)
    trainer, params = make_trainer(model_dir, sizes)
    split = batch_split(trainer.layout)
    batch = make_loader(pairs, split=split, tokens_per_device=tokens).shuffled(0)
    assert batch.ids.shape[1] % split.rows == 0 and batch.ids.shape[2] % (128 * split.tokens) == 0
    metrics, grads = compute(trainer, params, batch)
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert max(relative_errors(grads, expected_grads)) < 1e-5


@pytest.mark.mesh
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_layers_may_be_unrolled(model_dir: Path, sizes: tuple[int, int, int]) -> None:
    """The same update from a program with the products of every layer."""
    pairs = random_pairs(8)
    trainer, params = make_trainer(model_dir, sizes)
    batch = make_loader(pairs, split=batch_split(trainer.layout)).shuffled(0)
    expected, expected_grads = compute(trainer, params, batch)
    unrolled, _ = make_trainer(model_dir, sizes, scan_layers=False)
    metrics, grads = compute(unrolled, params, batch)
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert max(relative_errors(grads, expected_grads)) < 1e-5
    with use_layout(trainer.layout):
        products = [
            jax.jit(partial(loss_and_grads, one.setup)).lower(params, batch).as_text().count("stablehlo.dot_general")
            for one in (trainer, unrolled)
        ]
    layers = load_qwen_config(model_dir).layers
    assert layers > 1 and products[1] >= products[0] + 20 * (layers - 1)


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_rows_that_a_kernel_turns_round_are_found_again(ways: int) -> None:
    """The states that predict: of the same tokens, on each device of several rows."""
    batch = make_loader(random_pairs(64, longest=20), batch_size=64, split=Split(ways), tokens_per_device=256).shuffled(
        0
    )
    micro = micro_batch(jax.tree.map(jnp.asarray, batch), jnp.int32(0))
    turned, _ = arrange(BACKENDS["triton"], micro)
    assert micro.ids.shape[0] >= 2 * ways
    listed = np.asarray(micro.owners) >= 0
    found = [
        np.take_along_axis(np.asarray(x).reshape(ways, -1), np.asarray(rows.sources), 1)[listed]
        for rows in (micro, turned)
        for x in (rows.ids, rows.positions)
    ]
    np.testing.assert_array_equal(found[:2], found[2:])
    assert (np.asarray(turned.ids) != np.asarray(micro.ids)).any(), "some rows are turned round"


@pytest.mark.parametrize("packing", [{"accumulation": 2}, {"accumulation": 8}, {"tokens_per_device": 128}], ids=str)
def test_accumulation_changes_nothing(model_dir: Path, packing: dict[str, int]) -> None:
    """Seven pairs in a batch of eight: one is padding, and the last micro-batch may have rows without a pair."""
    pairs = random_pairs(7)
    trainer, params = make_trainer(model_dir)
    expected, expected_grads = on_one_device(model_dir, 7)
    batch = make_loader(pairs, **packing).shuffled(0)
    assert batch.micro_batches > 1
    metrics, grads = compute(trainer, params, batch)
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert max(relative_errors(grads, expected_grads)) < 1e-5


def test_bfloat16_gradients_are_near_the_float32_ones(model_dir: Path) -> None:
    """8 bits each: half a spacing is 2**-9 of a value, and each of four micro-batches rounds the sum once."""
    batch = make_loader(random_pairs(8), tokens_per_device=128).shuffled(0)
    assert batch.micro_batches == 4
    expected, expected_grads = compute(*make_trainer(model_dir), batch)
    trainer, params = make_trainer(model_dir, config=dataclasses.replace(CONFIG, gradient_dtype="bfloat16"))
    metrics, grads = compute(trainer, params, batch)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grads))
    assert metrics == pytest.approx(expected, rel=1e-6)
    errors = relative_errors(grads, expected_grads)
    assert 2**-10 < max(errors) < 2**-7
    state, _ = trainer.step(trainer.init_state(params), batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


@pytest.mark.mesh
def test_no_retrace_after_the_first_step_of_each_shape(model_dir: Path) -> None:
    """One program per (rows, length), over two epochs."""
    pairs = random_pairs(32, longest=30)
    pairs += [dataclasses.replace(pairs[0], id="long", chosen_ids=np.full(220, 5, np.int32))]
    trainer, params = make_trainer(model_dir, (2, 2, 2))
    loader = make_loader(pairs, split=batch_split(trainer.layout), tokens_per_device=128, compile_tokens=0)
    state = trainer.init_state(params)
    seen = set()
    for step in range(2 * loader.steps_per_epoch):
        batch = loader.shuffled(step)
        seen.add(batch.ids.shape[1:])
        state, _ = trainer.step(state, batch)
    assert seen == set(loader.shapes) == {(4, 128), (4, 256)}
    assert trainer.compiled_shapes() == 2


def test_the_number_of_micro_batches_is_no_part_of_the_shape(model_dir: Path) -> None:
    """Batches of few and of many micro-batches of a row each run the same program."""
    pairs = [
        dataclasses.replace(pair, prompt_ids=np.full(80 if i < 5 else 2, 7, np.int32))
        for i, pair in enumerate(random_pairs(24, longest=12))
    ]
    trainer, params = make_trainer(model_dir)
    loader = make_loader(pairs, tokens_per_device=128)
    state, counts = trainer.init_state(params), []
    for step in range(loader.steps_per_epoch):
        counts.append(int(loader.shuffled(step).micro_batches))
        state, _ = trainer.step(state, loader.shuffled(step))
    assert len(loader.shapes) == 1 and len(set(counts)) > 1, counts
    assert trainer.compiled_shapes() == 1


def test_the_first_loss_is_ln_2_and_then_it_falls(model_dir: Path) -> None:
    trainer, params = make_trainer(model_dir)
    pairs = random_pairs(8)
    loader = dataclasses.replace(make_loader(pairs), ref_logps=np.zeros((8, 2)))
    ref = trainer.score_pairs(params, loader).logps
    loader = dataclasses.replace(loader, ref_logps=ref)
    state, history = trainer.init_state(params), []
    for _, _, metrics, tokens in trainer.fit(state, loader, 10):
        history.append(host_metrics(metrics))
        assert tokens == sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    check_first_loss(history[0], CONFIG)
    dpo = [m["loss"] - CONFIG.rpo_alpha * m["nll_loss"] for m in history]
    assert dpo[0] == pytest.approx(math.log(2), abs=1e-5)
    assert dpo[-1] < 0.6
    assert history[-1]["rewards/accuracies"] == 1.0
    with pytest.raises(StageError, match="not ln 2"):
        check_first_loss(history[-1], CONFIG)


def test_scores_do_not_depend_on_batch_or_order(model_dir: Path) -> None:
    trainer, params = make_trainer(model_dir)
    pairs = random_pairs(10)
    eight = trainer.score_pairs(params, make_loader(pairs))
    three = trainer.score_pairs(params, make_loader(pairs[::-1], batch_size=3))
    np.testing.assert_allclose(eight.logps, three.logps[::-1], rtol=1e-5)
    np.testing.assert_array_equal(eight.tokens, [len(p.chosen_ids) for p in pairs])


def test_evaluation_equals_the_metrics_of_a_step(model_dir: Path) -> None:
    trainer, params = make_trainer(model_dir)
    loader = make_loader(random_pairs(8))
    step, _ = on_one_device(model_dir, 8)
    held_out = evaluate_scores(trainer.score_pairs(params, loader), loader.ref_logps, CONFIG)
    assert held_out == pytest.approx({f"eval_{name}": value for name, value in step.items()}, rel=1e-5)


def test_bfloat16_compute_keeps_float32_weights_that_move(model_dir: Path) -> None:
    layout = build_layout(MeshConfig(), jax.devices()[:1])
    declared = declare_qwen(load_qwen_config(model_dir), jnp.bfloat16)
    trainer = Trainer(*declared, layout, dataclasses.replace(CONFIG, learning_rate=5e-7), "layer", 10)
    params = load_params(model_dir, layout)
    before = jax.tree.map(np.asarray, params)
    state, _ = trainer.step(trainer.init_state(params), make_loader(random_pairs(8)).shuffled(0))
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(before), strict=True):
        assert a.dtype == jnp.float32
        assert (np.asarray(a) != b).mean() > 0.5


def test_the_first_loss_is_ln_2_in_bfloat16(model_dir: Path) -> None:
    """As near as its roundings allow: the reference pass and the step are two programs; a wrong reference is seen."""
    pairs = random_pairs(6, seed=2) + random_pairs(6, seed=3, longest=180)
    layout = build_layout(MeshConfig(), jax.devices()[:1])
    config = dataclasses.replace(CONFIG, batch_size=4)
    trainer = Trainer(*declare_qwen(load_qwen_config(model_dir), jnp.bfloat16), layout, config, "layer", 10)
    params = load_params(model_dir, layout)
    loader = PairLoader(pairs, np.zeros((len(pairs), 2)), 4, 1, max_length=512, seed=3)
    ref = trainer.score_pairs(params, loader, as_trained=True).logps
    loader = dataclasses.replace(loader, ref_logps=ref)
    state = trainer.init_state(params)
    state, metrics = trainer.step(state, loader.shuffled(0))
    check_first_loss(host_metrics(metrics), config, "bfloat16")
    for wrong in (np.zeros_like(ref), np.roll(ref, 1, axis=0)):
        state, metrics = trainer.step(state, dataclasses.replace(loader, ref_logps=wrong).shuffled(0))
        with pytest.raises(StageError, match=r"not ln 2 = 0.693147 within .*bfloat16"):
            check_first_loss(host_metrics(metrics), config, "bfloat16")


@pytest.mark.mesh
def test_bfloat16_masters_move_and_do_not_depend_on_the_mesh(model_dir: Path) -> None:
    """Stochastic rounding: at a learning rate that rounding to nearest would swallow, and alike on every mesh."""
    config = dataclasses.replace(CONFIG, learning_rate=1e-5, master_dtype="bfloat16")
    seen: list[Any] = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        trainer, params = make_trainer(model_dir, sizes, config)
        batch = make_loader(random_pairs(8), split=batch_split(trainer.layout)).shuffled(0)
        before = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), params)
        params = jax.tree.map(lambda x, like: jax.device_put(like, x.sharding), params, before)
        state, metrics = trainer.step(trainer.init_state(params), batch)
        check_params_changed(1, host_metrics(metrics), config)
        seen.append(jax.tree.map(np.asarray, state.params))
        moved = [
            float((a != b).mean()) for a, b in zip(jax.tree.leaves(seen[-1]), jax.tree.leaves(before), strict=True)
        ]
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(seen[-1]))
        assert 0.01 < np.mean(moved) < 0.9
    for a, b in zip(*map(jax.tree.leaves, seen), strict=True):
        # Gradients differ in the last bit between meshes, which flips a rounding now and then.
        assert (a != b).mean() < 1e-2


def test_weights_that_an_update_cannot_reach_stop_the_stage(model_dir: Path) -> None:
    trainer, params = make_trainer(model_dir, config=dataclasses.replace(CONFIG, learning_rate=1e-12))
    _, metrics = trainer.step(trainer.init_state(params), make_loader(random_pairs(8)).shuffled(0))
    with pytest.raises(StageError, match="of the parameters that have a gradient"):
        check_params_changed(1, host_metrics(metrics), trainer.setup.config)
    trainer, params = make_trainer(model_dir)
    _, metrics = trainer.step(trainer.init_state(params), make_loader(random_pairs(8)).shuffled(0))
    check_params_changed(1, host_metrics(metrics), CONFIG)


def test_a_batch_that_the_mesh_cannot_split_is_refused() -> None:
    layout = build_layout(MeshConfig(2, 4, 1))
    check_batch(layout, 16, 2)
    with pytest.raises(ConfigError, match=r"= 6 pairs cannot be split over 8 devices.*multiple of 16"):
        check_batch(layout, 12, 2)
