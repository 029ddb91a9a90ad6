"""Our step against TRL's own DPOTrainer, live: the same model, pairs and order, every logged number."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from drift_jax.errors import DriftError
from tests.tiny_pairs import build_tiny_policy

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "scripts" / "compare_trl.py"
PAIRS = REPO / "data" / "sample" / "compare.jsonl"


@pytest.fixture(scope="module")
def compare_trl() -> Any:
    spec = importlib.util.spec_from_file_location("compare_trl", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_trl"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 with random biases that pads with its turn end, which torch then does not train."""
    return build_tiny_policy(tmp_path_factory.mktemp("trl") / "m", vocab_size=384, pad_token_id=381, eos_token_id=381)


def arguments(model_dir: Path, steps: int) -> Namespace:
    settings = {"batch_size": 4, "learning_rate": 1e-4, "max_length": 256, "beta": 0.1, "rpo_alpha": 0.001, "seed": 42}
    return Namespace(model=model_dir, pairs=PAIRS, steps=steps, set=[], **settings)


@pytest.fixture(scope="module")
def short_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 64 real pairs, each with the end of its last question and the beginnings of its replies.

    So that nearly all of them fit 256 tokens of a vocabulary of 384, with their ends. In rows of 768 tokens the two
    sides' float32 roundings grow to 1.3e-4 of the gradient's norm in thirty updates.
    """
    rows = [json.loads(line) for line in PAIRS.open(encoding="utf-8")]
    for i, row in enumerate(rows):
        row["prompt"] = [{"role": "user", "content": row["prompt"][-1]["content"][-100:]}]
        for side in ("chosen", "rejected"):
            row[side][0]["content"] = row[side][0]["content"][: 40 + 37 * i % 200]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_thirty_updates_equal_trl(model_dir: Path, short_pairs: Path) -> None:
    """64 real pairs, rmsprop and AdamW, learning rate 1e-4: within 1e-4 relative at every update."""
    command = [sys.executable, str(SCRIPT), "--model", str(model_dir), "--pairs", str(short_pairs)]
    command += ["--steps", "30", "--max-length", "256"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "64 of 64 pairs compared, 6 of them cut" in done.stdout
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1])
    assert result["steps"] == 30 and result["max_rel_diff"] < 1e-4, result["worst"]
    assert sum(line.startswith("| 30 | TRL |") for line in lines) == 2  # both optimizers, to the last update
    margins = [float(line.split("|")[8]) for line in lines if line.startswith("| 30 | drift_jax |")]
    assert min(margins) > 1, "the weights must move for this test to mean anything"


@pytest.mark.slow
def test_bfloat16_gradients_and_moments_hurt_nothing(compare_trl: Any, model_dir: Path, short_pairs: Path) -> None:
    """8 bytes a parameter against TRL's 12, over the same thirty updates: apart, but by less than a thousandth."""
    given = arguments(model_dir, 30)
    given.pairs, given.set = short_pairs, ["train.gradient_dtype=bfloat16", "train.moment_dtype=bfloat16"]
    comparison = compare_trl.make_comparison(given, "rmsprop", "float32")
    theirs, ours = compare_trl.run_trl(comparison, model_dir), compare_trl.run_ours(comparison, model_dir)
    worst = compare_trl.report("", theirs, ours, given.beta, Console(quiet=True))
    assert 1e-4 < worst["rel_diff"] < 1e-3, worst
    losses = [np.mean([row["loss"] for row in rows]) for rows in (theirs, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.fixture(scope="module")
def four_updates(compare_trl: Any, model_dir: Path) -> tuple[Any, list[dict[str, float]]]:
    comparison = compare_trl.make_comparison(arguments(model_dir, 4), "rmsprop", "float32")
    return comparison, compare_trl.run_trl(comparison, model_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"rmsprop_decay": 0.9}},  # the default of optax
        {"train": {"warmup_ratio": 0.5}},
        {"train": {"rpo_alpha": 0.01}},
        {"model": {"pad_embedding": "trained"}},
    ],
    ids=str,
)
def test_what_is_changed_is_seen(compare_trl: Any, four_updates: Any, model_dir: Path, changes: Any) -> None:
    """The negative twins of the test above."""
    comparison, theirs = four_updates
    config = comparison.config
    for section, values in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    ours = compare_trl.run_ours(dataclasses.replace(comparison, config=config), model_dir)
    worst = compare_trl.report("", theirs, ours, config.train.beta, Console(quiet=True))
    assert worst["rel_diff"] > 5e-4 if changes else worst["rel_diff"] < 1e-4, worst


def test_keys_that_trl_reads_too_are_not_set_for_one_side(compare_trl: Any, model_dir: Path) -> None:
    given = arguments(model_dir, 4)
    given.set = ["train.beta=0.2"]
    with pytest.raises(DriftError, match="--set train.beta=0.2: TRL's side would differ"):
        compare_trl.make_comparison(given, "rmsprop", "float32")


def test_other_tokens_than_those_of_trl_are_named(compare_trl: Any, four_updates: Any, model_dir: Path) -> None:
    comparison, _ = four_updates
    first = comparison.order[0]
    tokenized = list(comparison.tokenized)
    tokenized[first] = dataclasses.replace(tokenized[first], chosen_ids=tokenized[first].chosen_ids[:-1])
    with pytest.raises(DriftError, match=f"pair {tokenized[first].id}: TRL's chosen_ids differ"):
        compare_trl.run_trl(dataclasses.replace(comparison, tokenized=tokenized), model_dir)


@pytest.mark.demo
@pytest.mark.slow
def test_real_weights_equal_trl(demo_model_dir: Path) -> None:
    """The demo model in float32, four updates of one short pair; README.md shows those of four pairs."""
    command = [sys.executable, str(SCRIPT), "--model", str(demo_model_dir), "--steps", "4", "--batch-size", "1"]
    command += ["--optimizers", "rmsprop", "--max-length", "128", "--learning-rate", "1e-5"]
    # torch's threads wait for each other by spinning, which beside another test process takes thrice as long.
    # And a model of this size computes for longer than it compiles: without the flags of conftest.py.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["max_rel_diff"] < 1e-3, result["worst"]
