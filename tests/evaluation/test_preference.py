"""Implicit rewards against torch, over meshes; what their numbers say of pairs that are known; their intervals."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from drift_jax.config import RunConfig, build_config
from drift_jax.data.pairs import TokenizedPair
from drift_jax.errors import ConfigError
from drift_jax.evaluation.bootstrap import ratio_interval
from drift_jax.evaluation.preference import PairLogps, preference_numbers
from drift_jax.evaluation.preference_report import build_preference_report
from drift_jax.evaluation.report import to_markdown
from drift_jax.records import Message
from drift_jax.stages.inputs import open_tokenizer
from drift_jax.stages.preference import Target, describe, implicit_rewards, score_targets
from drift_jax.stages.tokens import load_tokenized
from tests.tiny_pairs import build_tiny_policy, write_pairs

QUIET = Console(file=io.StringIO())
ALL = {"fsdp": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reference with other weights, and pairs, the last of which is cut."""
    base = tmp_path_factory.mktemp("preference")
    build_tiny_policy(base / "policy", tied=True)
    shutil.copytree(base / "policy", base / "reference")
    weights = load_file(base / "policy/model.safetensors")
    save_file({n: w * 0.8 if "mlp" in n else w for n, w in weights.items()}, base / "reference/model.safetensors")
    write_pairs(base / "pairs.jsonl", 7)
    with (base / "pairs.jsonl").open("a") as file:
        prompt, long = [{"role": "user", "content": "And?"}], "one two three " * 40
        sides = {
            side: [{"role": "assistant", "content": text}] for side, text in (("chosen", long), ("rejected", "No."))
        }
        file.write(json.dumps({"prompt": prompt, **sides, "meta": {"id": "cut"}}) + "\n")
    return base


def make_config(base: Path, **mesh: int) -> RunConfig:
    return build_config(
        {
            "run_dir": str(base),
            "model": {"path": str(base / "policy"), "compute_dtype": "float32", "remat": "none"},
            "data": {"max_length": 128, "max_prompt_length": 64},
            "train": {"batch_size": 8, "beta": 0.3},
            "mesh": {"fsdp": 1} | mesh if mesh else ALL,
        }
    )


def score(base: Path, **mesh: int) -> PairLogps:
    target = Target("policy", base / "policy", base / "reference")
    return score_targets(make_config(base, **mesh), [target], base / "pairs.jsonl", QUIET).of["policy"]


@pytest.fixture(scope="module")
def scored(base: Path) -> PairLogps:
    return score(base)


def tokenized(base: Path) -> list[TokenizedPair]:
    return load_tokenized(make_config(base), base / "pairs.jsonl", open_tokenizer(base / "policy")).pairs


def torch_logps(model_dir: Path, pairs: list[TokenizedPair]) -> np.ndarray:
    """Nats of both completions in float64, a sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    found = []
    for pair in pairs:
        for completion in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, completion]).astype(np.int64))
            with torch.no_grad():
                every = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(-1, ids[1:, None])[:, 0]
            found.append(float(every[len(pair.prompt_ids) - 1 :].sum()))
    return np.asarray(found).reshape(-1, 2)


def test_rewards_and_token_log_probs_equal_torch(base: Path, scored: PairLogps) -> None:
    pairs = tokenized(base)
    logps, ref = torch_logps(base / "policy", pairs), torch_logps(base / "reference", pairs)
    np.testing.assert_allclose(scored.logps, logps, rtol=1e-5)
    np.testing.assert_allclose(scored.ref_logps, ref, rtol=1e-5)
    metrics = preference_numbers(scored, 0.3)["metrics"]
    rewards = 0.3 * (logps - ref)
    margins = rewards[:, 0] - rewards[:, 1]
    tokens = np.array([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs])
    expected = {
        "rewards/accuracies": (margins > 0).mean(),
        "rewards/margins": margins.mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "token_logps/chosen": logps[:, 0].sum() / tokens[:, 0].sum(),
        "token_logps/rejected": logps[:, 1].sum() / tokens[:, 1].sum(),
        "ref_token_logps/rejected": ref[:, 1].sum() / tokens[:, 1].sum(),
        "tokens/chosen": tokens[:, 0].mean(),
    }
    assert {name: metrics[name]["value"] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert all(number["low"] <= number["value"] <= number["high"] for number in metrics.values())


def test_another_reference_is_seen(base: Path, scored: PairLogps) -> None:
    """The negative twin: against itself the policy prefers nothing, not even in the last bit."""
    target = Target("policy", base / "policy", base / "policy")
    same = score_targets(make_config(base), [target], base / "pairs.jsonl", QUIET).of["policy"]
    numbers = preference_numbers(same, 0.3)
    assert numbers["ties"] == len(same.ids) == 8
    assert numbers["metrics"]["rewards/margins"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert numbers["lengths"]["margin_length_correlation"] is None
    assert abs(preference_numbers(scored, 0.3)["metrics"]["rewards/margins"]["value"]) > 1


@pytest.mark.mesh
@pytest.mark.parametrize(
    "mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 2}]
)
def test_scores_do_not_depend_on_the_mesh(base: Path, scored: PairLogps, mesh: dict[str, int]) -> None:
    found = score(base, **mesh)
    np.testing.assert_allclose(found.logps, scored.logps, rtol=1e-5)
    np.testing.assert_allclose(found.ref_logps, scored.ref_logps, rtol=1e-5)


def test_rewards_of_single_replies_are_those_of_pairs(base: Path, scored: PairLogps) -> None:
    """An odd number of replies to a prompt, in another order than in the file."""
    rows = [json.loads(line) for line in (base / "pairs.jsonl").open()][:3]
    replies = [
        (f"{i}{side}", [Message("user", row["prompt"][0]["content"])], row[side][0]["content"])
        for side in ("rejected", "chosen")
        for i, row in enumerate(rows)
    ][1:]
    models = str(base / "policy"), str(base / "reference")
    found = implicit_rewards(make_config(base), *models, replies, QUIET)
    expected = scored.rewards(0.3)[:3].T[::-1].ravel()[1:]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_models_with_other_tokenizers_are_refused(base: Path, tmp_path: Path) -> None:
    build_tiny_policy(tmp_path / "other", tied=True)
    template = tmp_path / "other/tokenizer_config.json"
    template.write_text(template.read_text().replace("assistant", "robot"))
    targets = [Target("x", base / "policy", tmp_path / "other")]
    with pytest.raises(ConfigError, match="different tokenizers or chat templates"):
        score_targets(make_config(base), targets, base / "pairs.jsonl", QUIET)


# --- what the numbers say -----------------------------------------------------------------------------------


def random_logps(count: int = 40, seed: int = 3) -> PairLogps:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 60, (count, 2)).astype(np.float64)
    ref = -tokens * rng.uniform(1, 3, (count, 2))
    return PairLogps([f"p{i}" for i in range(count)], ref + rng.normal(0.5, 4, (count, 2)), ref, tokens)


def test_swapping_the_sides_turns_the_preference_round() -> None:
    pairs = random_logps()
    columns = {name: getattr(pairs, name)[:, ::-1] for name in ("logps", "ref_logps", "tokens")}
    found, other = (preference_numbers(p, 0.1)["metrics"] for p in (pairs, dataclasses.replace(pairs, **columns)))
    assert other["rewards/margins"]["value"] == pytest.approx(-found["rewards/margins"]["value"])
    assert other["rewards/accuracies"]["value"] == pytest.approx(1 - found["rewards/accuracies"]["value"])
    assert other["token_logps/chosen"] == found["token_logps/rejected"]


def test_a_preference_for_length_shows() -> None:
    pairs = random_logps()
    longer = dataclasses.replace(pairs, logps=pairs.ref_logps + pairs.tokens)
    assert preference_numbers(longer, 0.1)["lengths"]["margin_length_correlation"] == pytest.approx(1)
    assert abs(preference_numbers(pairs, 0.1)["lengths"]["margin_length_correlation"]) < 0.5


def test_one_pair_has_numbers_and_no_interval() -> None:
    numbers = preference_numbers(random_logps(1), 0.1)
    assert numbers["metrics"]["rewards/margins"]["low"] is None
    json.dumps(numbers, allow_nan=False)


def test_a_report_names_policy_and_reference() -> None:
    targets = [Target("iter_1", Path("run/iter_1/hf"), Path("run/seed/hf"))]
    stages = {"iter_1": describe(targets)["iter_1"] | preference_numbers(random_logps(), 0.1)}
    text = to_markdown(build_preference_report(stages, "pairs.jsonl", {"not encodable": 2}))
    assert "run/iter_1/hf against run/seed/hf" in text and "Left out: 2 not encodable." in text


# --- intervals ----------------------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator], tuple[np.ndarray, ...]]


def normal(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return (rng.normal(1, 2, 30),)


def skewed(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return (rng.exponential(1, 50),)


def per_token(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    tokens = rng.integers(5, 200, 30).astype(np.float64)
    return tokens * rng.normal(-2, 0.5, 30), tokens


def coverage_of(draw: Draw, truth: float, **options: Any) -> float:
    rng, held = np.random.default_rng(1), 0
    for seed in range(2000):
        interval = ratio_interval(*draw(rng), seed=seed, resamples=500, **options)
        assert interval is not None
        held += interval.low <= truth <= interval.high
    return held / 2000


@pytest.mark.parametrize(("draw", "truth"), [(normal, 1.0), (skewed, 1.0), (per_token, -2.0)])
def test_intervals_have_their_nominal_coverage(draw: Draw, truth: float) -> None:
    assert coverage_of(draw, truth) == pytest.approx(0.95, abs=0.02)


def test_the_level_of_an_interval_is_seen() -> None:
    """The negative twin."""
    assert coverage_of(skewed, 1.0, level=0.9) < 0.93


def test_values_that_hardly_vary_have_a_finite_interval() -> None:
    values = np.zeros(50)
    assert ratio_interval(values) == (0.0, 0.0)
    values[7] = 1.0
    low, high = ratio_interval(values) or (np.nan, np.nan)
    assert low < 0.02 < high < 1
    # Three rows of many: a resample without them has no spread, whatever rounding leaves of it.
    few = np.zeros(32)
    few[[0, 5, 10]] = 1 / 6, 1 / 6, 1 / 3
    low, high = ratio_interval(few) or (np.nan, np.nan)
    assert low < few.mean() < high < 0.2
    assert ratio_interval(values[:1]) is None and ratio_interval(values, np.zeros(50)) is None
