"""Runs that share reference log-probs: what is found is what would have been computed, and nothing else is found."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from drift_jax.config import RunConfig, build_config
from drift_jax.data.pairs import TokenizedPair
from drift_jax.recipe import run
from drift_jax.sharding import build_layout
from drift_jax.stages.dpo import TrainJob, build_loader, build_trainer, train_stage
from drift_jax.stages.reference import RefLogps, write_ref_logps
from drift_jax.stages.reference_cache import ReferenceCache, reference_key
from drift_jax.telemetry import read_metrics
from drift_jax.train import Trainer
from tests.tiny_pairs import build_tiny_policy, random_pairs, write_pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("reference_cache")
    build_tiny_policy(base / "model", tied=True)
    write_pairs(base / "seed.train.jsonl", 12)
    write_pairs(base / "seed.test.jsonl", 3, start=12)
    return base


def config_of(base: Path, run_dir: Path, cache: Path | None, **train: Any) -> RunConfig:
    """Bfloat16, where other batches would be other numbers; two epochs, so that the second has other neighbours."""
    raw = {
        "run_dir": str(run_dir),
        "model": {"path": str(base / "model"), "compute_dtype": "bfloat16", "remat": "none"},
        "data": {
            "seed_train": str(base / "seed.train.jsonl"),
            "seed_test": str(base / "seed.test.jsonl"),
            "max_length": 128,
            "max_prompt_length": 100,
        },
        "recipe": {"iterations": 0, "seed_epochs": 2},
        "train": {"batch_size": 8, "learning_rate": 2e-4, "reference_cache": cache and str(cache)} | train,
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    }
    return build_config(raw)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of each reference pass over pairs to train on."""
    found: list[int] = []
    score = Trainer.score_pairs

    def counting(self: Trainer, params: Any, loader: Any, *rest: Any, **more: Any) -> Any:
        if True in rest:  # as_trained
            found.append(len(loader.pairs))
        return score(self, params, loader, *rest, **more)

    monkeypatch.setattr(Trainer, "score_pairs", counting)
    return found


def run_quietly(config: RunConfig) -> str:
    out = io.StringIO()
    run(config, Console(file=out, width=160))
    return out.getvalue()


def results(run_dir: Path) -> list[Any]:
    rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(run_dir / "seed")]
    files = ("eval.json", "ref_logps.npz", "hf/model.safetensors")
    return [rows, *((run_dir / "seed" / file).read_bytes() for file in files)]


def only_file(cache: Path) -> Path:
    (file,) = cache.iterdir()
    return file


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has left its log-probs in `cache`, a directory that was not there."""
    run_quietly(config_of(base, base / "first", base / "some" / "cache"))
    return only_file(base / "some" / "cache")


def test_a_sweep_has_one_reference_pass_and_the_same_results(
    base: Path, first: Path, tmp_path: Path, passes: list[int]
) -> None:
    said = run_quietly(config_of(base, tmp_path / "b", first.parent, beta=0.3, learning_rate=1e-3))
    assert not passes and f"reference log-probs: those of an earlier run, {first}" in said
    said = run_quietly(config_of(base, tmp_path / "c", None, beta=0.3, learning_rate=1e-3))
    assert passes == [12] and "earlier run" not in said
    assert results(tmp_path / "b") == results(tmp_path / "c") != results(base / "first")
    assert only_file(first.parent) == first, "neither has left another"


def test_another_packing_is_not_taken(base: Path, first: Path, tmp_path: Path, passes: list[int]) -> None:
    shutil.copytree(first.parent, tmp_path / "cache")
    run_quietly(config_of(base, tmp_path / "b", tmp_path / "cache", batch_size=4))
    assert passes == [12] and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_stage_alone_finds_what_a_run_has_left(base: Path, first: Path, tmp_path: Path, passes: list[int]) -> None:
    """Told no hash of its reference, it makes it itself."""
    config = config_of(base, tmp_path / "unused", first.parent)
    pairs = base / "seed.train.jsonl", base / "seed.test.jsonl"
    train_stage(config, TrainJob(base / "model", base / "model", *pairs, tmp_path / "out", 2), Console(quiet=True))
    assert not passes and (tmp_path / "out/ref_logps.npz").read_bytes() == first.read_bytes()


# --- one file ----------------------------------------------------------------------------------------------------


def scores_of(count: int) -> RefLogps:
    return RefLogps(np.full((count, 2), -1.0), np.full((count, 2), -0.5))


def test_a_damaged_file_is_said_and_written_anew(tmp_path: Path) -> None:
    pairs, path, said = random_pairs(3), tmp_path / "ref_logps.npz", []
    cache = ReferenceCache(tmp_path / "cache", "key", pairs, said.append)
    write_ref_logps(path, pairs, scores_of(3))
    cache.store(path)
    cache.path.write_bytes(path.read_bytes()[:-100])
    assert not cache.fetch(tmp_path / "other.npz") and not (tmp_path / "other.npz").exists()
    (message,) = said
    assert message.startswith(f"train.reference_cache: {cache.path}") and message.endswith("runs instead.")
    cache.store(path)
    assert cache.fetch(tmp_path / "other.npz") and len(said) == 1
    assert (tmp_path / "other.npz").read_bytes() == path.read_bytes()


def test_a_directory_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    pairs, path, said = random_pairs(3), tmp_path / "ref_logps.npz", []
    write_ref_logps(path, pairs, scores_of(3))
    (tmp_path / "cache").write_text("a file")
    cache = ReferenceCache(tmp_path / "cache", "key", pairs, said.append)
    assert not cache.fetch(tmp_path / "other.npz")
    cache.store(path)
    (message,) = said
    assert "train.reference_cache: nothing is kept there for other runs: " in message and "cache" in message


def test_log_probs_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    pairs, path = random_pairs(3), tmp_path / "ref_logps.npz"
    cache = ReferenceCache(tmp_path / "cache", "key", pairs, pytest.fail)
    sound = scores_of(3)
    write_ref_logps(path, pairs, sound._replace(logps=np.array([[-1.0, -1.0], [np.nan, -1.0], [-1.0, -1.0]])))
    cache.store(path)
    assert not cache.path.exists() and not cache.fetch(tmp_path / "other.npz")
    write_ref_logps(path, pairs, sound)
    cache.store(path)
    assert cache.fetch(tmp_path / "other.npz") and (tmp_path / "other.npz").read_bytes() == path.read_bytes()


# --- what a name is made of -------------------------------------------------------------------------------------


def key_of(
    base: Path, config: RunConfig, pairs: list[TokenizedPair], held_out: list[TokenizedPair], model: str = "hash"
) -> str:
    trainer = build_trainer(config, base / "model", build_layout(config.mesh), 3)
    return reference_key(config, trainer, build_loader(config, trainer, pairs), held_out, model)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"batch_size": 4}},
        {"train": {"seed": 1}},
        {"train": {"accumulation_steps": 2}},
        {"train": {"tokens_per_device": 256}},
        {"train": {"eval_batch_size": 2}},
        {"train": {"master_dtype": "bfloat16"}},
        {"model": {"compute_dtype": "float32"}},
        {"model": {"scan_layers": False}},
        {"mesh": {"data": 1, "fsdp": 4}},
        {"mesh": {"fsdp": 1, "tensor": 4}},
        {"mesh": {"rules": {"mlp": ()}}},
        {"data": {"max_length": 64}},
    ],
    ids=str,
)
def test_what_a_log_prob_depends_on_is_in_the_name(base: Path, changes: dict[str, dict[str, Any]]) -> None:
    config, pairs = config_of(base, base / "unused", None), random_pairs(12)
    changed = dataclasses.replace(
        config, **{of: dataclasses.replace(getattr(config, of), **keys) for of, keys in changes.items()}
    )
    assert key_of(base, config, pairs[:9], pairs[9:]) != key_of(base, changed, pairs[:9], pairs[9:])


def test_pairs_their_order_and_the_model_are_in_the_name(base: Path) -> None:
    config, pairs = config_of(base, base / "unused", None), random_pairs(12)
    (train, test), other = (pairs[:9], pairs[9:]), random_pairs(1, seed=1)
    keys = [
        key_of(base, config, train, test),
        key_of(base, config, train[::-1], test),
        key_of(base, config, train[:8] + other, test),
        key_of(base, config, train, test[:2] + other),
        key_of(base, config, pairs[:10], pairs[10:]),
        key_of(base, config, train, test, model="another"),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "train",
    [
        {"beta": 0.5},
        {"learning_rate": 1e-3},
        {"optimizer": "adamw"},
        {"label_smoothing": 0.1},
        {"rpo_alpha": 1.0},
        {"nll_reduction": "sequence_mean"},
        {"moment_dtype": "bfloat16"},
        {"warmup_ratio": 0.0},
        {"eval_every": 1},
    ],
    ids=str,
)
def test_what_a_sweep_changes_is_not_in_the_name(base: Path, train: dict[str, Any]) -> None:
    config, pairs = config_of(base, base / "unused", None), random_pairs(12)
    changed = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    assert key_of(base, config, pairs[:9], pairs[9:]) == key_of(base, changed, pairs[:9], pairs[9:])
