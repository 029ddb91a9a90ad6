"""Updates whose gradient is not finite, through `drift train`: stopped or left out, and counted."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from drift_jax.config import TrainConfig
from drift_jax.data.batches import PairLoader
from drift_jax.errors import StageError
from drift_jax.guards import MOST_SKIPPED, FiniteWatch
from drift_jax.manifest import Manifest
from drift_jax.records import read_pairs
from drift_jax.telemetry import read_metrics
from tests.cli_runs import Drift, base, change_config, drift, model_dir  # noqa: F401
from tests.tiny_pairs import write_pairs

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

from drills import hooks

Poison = Callable[..., None]


@pytest.fixture()
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Sets which updates have a NaN, instead of those before."""
    clean = PairLoader.shuffled

    def put(*updates: int) -> None:
        monkeypatch.setattr(PairLoader, "shuffled", clean)
        hooks.poison(*updates)

    return put


@pytest.fixture()
def job(base: Path) -> list[Any]:
    """Six updates of eight pairs on as many devices, each saved."""
    write_pairs(base / "pairs" / "pairs.train.jsonl", 24)
    config = change_config(
        base / "config.yaml",
        train={"epochs": 2, "learning_rate": 1e-3},
        checkpoint={"every_steps": 1, "keep": 9},
    )
    return ["train", config, "--model", base / "model", "--pairs", base / "pairs", "--out"]


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir())


def test_it_stops_before_anything_is_saved_and_goes_on_without_that_update(
    job: list[Any], tmp_path: Path, drift: Drift, poison: Poison
) -> None:
    out = tmp_path / "out"
    poison(4)
    code, _, err = drift(*job, out)
    assert code == 2 and "the gradient of update 4 is not finite (norm nan, loss nan); its pairs: " in err
    named = err.split("its pairs: ")[1].split(". Nothing")[0].split(", ")
    ids = {pair.id for pair in read_pairs(tmp_path / "pairs" / "pairs.train.jsonl").records}
    assert len(named) == 8 and set(named) < ids
    assert steps_of(out) == [1, 2, 3]
    assert math.isnan(read_metrics(out)[-1]["grad_norm"])

    code, _, err = drift(*job, out)
    assert code == 2 and "the gradient of update 4" in err and steps_of(out) == [1, 2, 3], "the same again"

    code, said, _ = drift(*job, out, "--set", "train.on_nonfinite=skip")
    assert code == 0 and "going on from the checkpoint of update 3" in said and "It is left out" in said
    summary = Manifest(out).summary("train")
    assert summary["skipped_updates"] == 1 and "update 4" in summary["warnings"][0]
    rows = {row["step"]: row for row in read_metrics(out)}
    assert [*rows] == [1, 2, 3, 4, 5, 6] and [step for step in rows if math.isnan(rows[step]["grad_norm"])] == [4]
    others = [rows[step]["loss"] for step in (1, 2, 3, 5, 6)]
    assert summary["loss"] == pytest.approx(sum(others) / 5, rel=1e-6)


def test_without_such_an_update_both_ways_end_in_the_same_weights(
    job: list[Any], tmp_path: Path, drift: Drift, poison: Poison
) -> None:
    def weights(name: str, *updates: int, policy: str) -> np.ndarray:
        poison(*updates)
        changes = ("--set", f"train.on_nonfinite={policy}", "--set", "export.dtype=float32")
        code, _, err = drift(*job, tmp_path / name, *changes)
        assert code == 0, err
        return np.concatenate([x.ravel() for x in load_file(tmp_path / name / "hf" / "model.safetensors").values()])

    plain = weights("stop", policy="stop")
    # Two programs: the last bit of a sum may differ, and the optimizer divides by small numbers.
    assert np.abs(weights("skip", policy="skip") - plain).max() < 2e-5
    assert "skipped_updates" not in Manifest(tmp_path / "skip").summary("train")
    assert np.abs(weights("left_out", 6, policy="skip") - plain).max() > 1e-4
    # The very first update as well, where policy and reference would be compared.
    weights("first", 1, 2, policy="skip")
    assert Manifest(tmp_path / "first").summary("train")["skipped_updates"] == 2
    # The second update has a rate above 0, whatever became of the first.
    weights("second_moves", 1, policy="skip")


def row(norm: float) -> dict[str, float]:
    return {"grad_norm": norm, "loss": norm}


def test_a_stage_does_not_skip_for_ever() -> None:
    config = TrainConfig(on_nonfinite="skip")
    watch = FiniteWatch(config)
    for step in range(1, MOST_SKIPPED):
        (said,) = watch.update(step, row(math.inf), ["a", "b"])
        assert f"update {step} is not finite (norm inf, loss inf); its pairs: a, b. It is left out" in said
    rows = [{"step": step, **row(math.nan)} for step in range(1, MOST_SKIPPED)]
    with pytest.raises(StageError, match=f"{MOST_SKIPPED}th in a row"):
        watch.update(MOST_SKIPPED, row(math.nan), ["a"])
    with pytest.raises(StageError, match=f"{MOST_SKIPPED}th in a row"):
        FiniteWatch(config, rows).update(MOST_SKIPPED, row(math.nan), ["a"])
    # One that is finite is between them, whether or not it was written down.
    gap = FiniteWatch(config, rows)
    assert len(gap.update(MOST_SKIPPED + 1, row(math.nan), [str(i) for i in range(20)])) == 1
    assert gap.update(MOST_SKIPPED + 2, row(1.0), ["a"]) == [] and gap.skipped == MOST_SKIPPED
    with pytest.raises(StageError, match=r"pairs: 0, 1, 2, 3, 4, 5, 6, 7 and 12 more\. Nothing of it is saved"):
        FiniteWatch(dataclasses.replace(config, on_nonfinite="stop")).update(1, row(math.nan), [*map(str, range(20))])
