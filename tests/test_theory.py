"""Lemma 1, measured: gradients of single pairs against the plain step, over meshes, and while a stage trains."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from drift_jax.config import MeshConfig, RunConfig, TrainConfig, build_config
from drift_jax.data.batches import PairLoader, batch_split
from drift_jax.data.pairs import TokenizedPair
from drift_jax.errors import StageError
from drift_jax.manifest import Manifest
from drift_jax.models.hf import load_params, load_qwen_config
from drift_jax.models.qwen import declare_qwen
from drift_jax.optim import global_norm
from drift_jax.recipe import run
from drift_jax.records import read_pairs
from drift_jax.sharding import build_layout
from drift_jax.stages.dpo import TrainJob, train_stage
from drift_jax.stages.theory import Probe, draw_probe
from drift_jax.stopping import Stopped
from drift_jax.telemetry import read_metrics
from drift_jax.theory import PairGradients, apply_lemma, lemma_metrics, retention_metrics
from drift_jax.train import Trainer
from tests.plain_step import plain_batch, plain_step
from tests.test_methods import write_sat
from tests.tiny_models import build_tiny_model
from tests.tiny_pairs import build_tiny_policy, random_pairs, write_dsat, write_pairs

BETA, COUNT = 0.3, 4
CONFIG = TrainConfig(beta=BETA, label_smoothing=0.1, rpo_alpha=0.5, batch_size=8)
SINGLE = dataclasses.replace(CONFIG, label_smoothing=0.0, rpo_alpha=0.0, batch_size=1)
TIMES = ("tokens_per_second", "theory/seconds")
LEMMA_RTOL = 1e-6  # float32 slopes beside float64 weights


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("policy") / "m", tied=True, num_hidden_layers=2)


@cache
def some_pairs() -> list[TokenizedPair]:
    return random_pairs(COUNT)


def measure(model_dir: Path, sizes: tuple[int, ...] = (1, 1, 1)) -> PairGradients:
    layout = build_layout(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    trainer = Trainer(*declare_qwen(load_qwen_config(model_dir)), layout, CONFIG, "layer", total_steps=10)
    zeros = np.zeros((COUNT, 2))
    loader = PairLoader(some_pairs(), zeros, 1, 1, max_length=128, split=batch_split(layout))
    return trainer.measure_pairs(load_params(model_dir, layout), loader)


@cache
def on_one_device(model_dir: Path) -> PairGradients:
    return measure(model_dir)


def some_references(found: PairGradients) -> np.ndarray:
    """Of which the policy differs by up to 12 nats: weights from near 0 to near 1."""
    return found.logps - np.linspace(-12, 12, COUNT)[:, None] * np.array([1.0, -0.5])


# --- gradients ------------------------------------------------------------------------------------------------


@cache
def plainly(model_dir: Path) -> list[tuple[float, float, float]]:
    """Of each pair, from `jax.grad` of the plain step's loss: gradient norm, margin, ||d|| of the two log-probs."""
    layout = build_layout(MeshConfig(), jax.devices()[:1])
    params = load_params(model_dir, layout)
    step = plain_step(declare_qwen(load_qwen_config(model_dir))[0], SINGLE)
    refs, found = some_references(on_one_device(model_dir)), []
    for pair, ref in zip(some_pairs(), refs, strict=True):
        metrics, grads, _ = step(params, plain_batch([pair], ref[None], 1, 96))
        margin, norm = float(metrics["rewards/margins"]), float(global_norm(grads))
        found.append((norm, margin, norm * (1 + math.exp(margin)) / BETA))
    return found


def test_gradients_of_single_pairs_equal_the_plain_step(model_dir: Path) -> None:
    found = on_one_device(model_dir)
    lemma = apply_lemma(found, some_references(found), BETA)
    for i, (norm, margin, of_difference) in enumerate(plainly(model_dir)):
        assert lemma.margins[i] == pytest.approx(margin, abs=2e-5)
        assert lemma.norms[i] == pytest.approx(of_difference, rel=2e-5)
        assert lemma.grad_norms[i] == pytest.approx(norm, rel=2e-5)
    assert lemma.weights.min() < 0.1 and lemma.weights.max() > 0.9


def test_a_gradient_of_one_side_alone_is_seen(model_dir: Path) -> None:
    """The negative twin: without the rejected side the norms are others, far outside the tolerance."""
    found = on_one_device(model_dir)
    layout = build_layout(MeshConfig(), jax.devices()[:1])
    trainer = Trainer(*declare_qwen(load_qwen_config(model_dir)), layout, CONFIG, "layer", total_steps=10)
    loader = PairLoader(some_pairs(), np.zeros((COUNT, 2)), 1, 1, max_length=128)
    real = loader.by_length

    def of_one_side() -> Any:
        for rows, batch in real():
            yield rows, batch._replace(owners=np.where(batch.owners == 1, -1, batch.owners))

    object.__setattr__(loader, "by_length", of_one_side)
    broken = trainer.measure_pairs(load_params(model_dir, layout), loader)
    assert (abs(broken.norms / found.norms - 1) > 1e-2).all()


@pytest.mark.mesh
@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 2, 2, 2)])
def test_measurements_do_not_depend_on_the_mesh(model_dir: Path, sizes: tuple[int, ...]) -> None:
    found, expected = measure(model_dir, sizes), on_one_device(model_dir)
    np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-5)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-5)


# --- numbers --------------------------------------------------------------------------------------------------


def test_numbers_of_a_case_that_can_be_done_by_hand() -> None:
    found = PairGradients(np.array([[0.0, 0.0], [math.log(3) / BETA, 0.0]]), np.array([2.0, 4.0]))
    lemma = apply_lemma(found, np.zeros((2, 2)), BETA)  # margins 0 and ln 3, weights 1/2 and 1/4
    numbers = lemma_metrics(lemma, BETA, 0.3)
    expected = {"pairs": 2, "tau": 0.3, "p0": 0.5, "delta": 2.0, "d_norm": 3.0, "margin": math.log(3) / 2}
    expected |= {"bound": BETA * 0.3 * 0.5 * 2, "grad_norm": BETA * (0.5 * 2 + 0.25 * 4) / 2, "weight/mean": 0.375}
    expected |= {"weight/p50": 0.375, "weight/p05": 0.2625, "weight/p95": 0.4875}
    found_numbers = {name: numbers[f"theory/{name}"] for name in expected}
    assert found_numbers == pytest.approx(expected, rel=1e-6)


def test_the_lemma_holds_for_any_weights_and_a_wrong_bound_is_seen() -> None:
    rng = np.random.default_rng(0)
    for spread in (0.1, 3.0, 30.0, 300.0):
        gains = rng.normal(0, spread, (64, 2))
        lemma = apply_lemma(PairGradients(gains, rng.exponential(5, 64)), np.zeros((64, 2)), BETA)
        for tau in (1e-6, 0.25, 0.5, 1.0):
            numbers = lemma_metrics(lemma, BETA, tau)
            assert numbers["theory/bound"] <= numbers["theory/grad_norm"] * (1 + LEMMA_RTOL)
            if numbers["theory/p0"] == 0:
                assert numbers["theory/delta"] == numbers["theory/bound"] == 0
    lemma = apply_lemma(PairGradients(np.zeros((8, 2)), np.ones(8)), np.zeros((8, 2)), BETA)
    numbers = lemma_metrics(lemma, BETA, 0.5)
    assert numbers["theory/bound"] == pytest.approx(numbers["theory/grad_norm"], rel=1e-6)  # as sharp as it can be
    # The negative twin: without tau the "bound" is above what was measured.
    assert numbers["theory/bound"] / 0.5 > numbers["theory/grad_norm"] * (1 + LEMMA_RTOL)


def test_what_is_left_of_nothing_is_not_said() -> None:
    kept = retention_metrics("iter_1", np.array([1.0, 3.0]), np.array([1.0, 2.0]))
    assert kept == {"theory/iter_1/margin_then": 2.0, "theory/iter_1/margin": 1.5, "theory/iter_1/retention": 0.75}
    assert "theory/iter_1/retention" not in retention_metrics("iter_1", np.array([-1.0]), np.array([1.0]))


def test_the_measured_pairs_are_the_same_in_every_call() -> None:
    assert draw_probe(50, 8, 1).tolist() == draw_probe(50, 8, 1).tolist() != draw_probe(50, 8, 2).tolist()
    assert draw_probe(3, 8, 1).tolist() == [0, 1, 2]


# --- a stage --------------------------------------------------------------------------------------------------


def config_of(base: Path, **sections: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "run_dir": str(base / "run"),
        "model": {"path": str(base / "model"), "compute_dtype": "float32"},
        "data": {"test_rows": 2, "max_length": 128, "max_prompt_length": 100},
        "train": {"batch_size": 4, "learning_rate": 3e-6, "warmup_ratio": 0.0, "beta": BETA},
        "theory": {"every": 1, "pairs": 3, "tau": 0.3},
        "checkpoint": {"every_steps": 1, "keep": 1},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    }
    for section, keys in sections.items():
        raw[section] = raw.get(section, {}) | keys
    return build_config(raw)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("theory")
    build_tiny_policy(base / "model", tied=True, num_hidden_layers=2)
    write_pairs(base / "pairs.jsonl", 12)
    return base


def train(base: Path, out: str, earlier: tuple[Path, ...] = (), **sections: Any) -> list[dict[str, Any]]:
    job = TrainJob(base / "model", base / "model", base / "pairs.jsonl", None, base / out, 1, earlier)
    train_stage(config_of(base, **sections), job, Console(file=io.StringIO()))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(base / out)]


def without_theory(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("theory/")} for row in rows]


def test_a_stage_logs_the_lemma_changes_nothing_and_resumes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stage without it; stopped at its second measurement and gone on with; and once more without a stop."""
    plain = train(base, "off", theory={"every": None})
    assert not (base / "off/theory_pairs.jsonl").exists() and plain == without_theory(plain)
    real, calls = Probe.measure, []

    def stop(self: Probe, *args: Any) -> dict[str, float]:
        calls.append(args)
        if len(calls) == 2:
            raise Stopped
        return real(self, *args)

    monkeypatch.setattr(Probe, "measure", stop)
    with pytest.raises(Stopped):
        train(base, "on")
    rows = train(base, "on")
    assert len(calls) == 4 and [row["step"] for row in rows] == [1, 2, 3]
    assert without_theory(rows) == plain
    for row in rows:
        assert row["theory/pairs"] == 3 and row["theory/p0"] > 0
        assert 0 < row["theory/bound"] <= row["theory/grad_norm"] * (1 + LEMMA_RTOL)
        assert row["theory/weight/p05"] <= row["theory/weight/mean"] <= row["theory/weight/p95"]
    assert rows[0]["theory/margin"] != 0 and rows[-1]["theory/margin"] > rows[0]["theory/margin"]
    monkeypatch.setattr(Probe, "measure", real)
    # The same training again: the same rows, and of the first one's margins all is left.
    again = train(base, "again", (base / "on", base / "nothing"))
    assert again[-1].pop("theory/on/margin_then") == pytest.approx(rows[-1]["theory/margin"])
    assert again[-1].pop("theory/on/margin") == pytest.approx(rows[-1]["theory/margin"], rel=1e-5)
    assert again[-1].pop("theory/on/retention") == pytest.approx(1.0, rel=1e-5)
    assert again == rows
    # A stage that learns next to nothing has next to nothing of them.
    weak = train(base, "weak", (base / "on",), train={"learning_rate": 3e-8}, theory={"every": "end"})
    assert ["theory/bound" in row for row in weak] == [False, False, True]
    assert abs(weak[-1]["theory/on/retention"]) < 0.05
    saved = [json.loads(line) for line in (base / "on/theory_pairs.jsonl").read_text().splitlines()]
    assert np.mean([row["margin"] for row in saved]) == pytest.approx(rows[-1]["theory/margin"])


def test_a_run_of_spin_learns_from_its_last_policy_and_looks_back(base: Path) -> None:
    write_sat(base / "sat.jsonl", 6)
    config = config_of(
        base,
        data={"sat": str(base / "sat.jsonl")},
        recipe={"method": "spin", "iterations": 2},
        sampling={"max_new_tokens": 8, "max_input_length": 128, "compute_dtype": "float32", "other_speakers": "keep"},
        theory={"every": "end"},
        export={"dtype": "float32"},
    )
    run(config, Console(file=io.StringIO()))
    run_dir = base / "run"
    manifest = Manifest(run_dir)
    for name, policy in (("iter_1", base / "model"), ("iter_2", run_dir / "iter_1/hf")):
        for pair in read_pairs(run_dir / name / "pairs.train.jsonl").records:
            assert pair.chosen == f"A story that was liked, of number {pair.id[1:]}."
            assert pair.meta["rejected_from"]["sha256"] == manifest.model_hash(policy)
            assert pair.meta["chosen_from"]["sha256"] == manifest.file_hash(base / "sat.jsonl")
    last = [read_metrics(run_dir / name)[-1] for name in ("iter_1", "iter_2")]
    assert all(row["theory/bound"] <= row["theory/grad_norm"] * (1 + LEMMA_RTOL) for row in last)
    assert last[1]["theory/iter_1/margin_then"] == pytest.approx(last[0]["theory/margin"])
    other = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, method="drift-unguided"))
    other = dataclasses.replace(other, data=dataclasses.replace(config.data, dsat=str(base / "dsat.jsonl")))
    write_dsat(base / "dsat.jsonl", 6)
    with pytest.raises(StageError, match=r'iter_1/sample.*\n.*recipe\.method: was "spin", is now "drift-unguided"'):
        run(other, Console(file=io.StringIO()))
