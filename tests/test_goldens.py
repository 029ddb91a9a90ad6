"""One DPO step, and one update of every preset, against stored numbers that torch said in float64."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from drift_jax.config import MeshConfig, RunConfig, build_config
from drift_jax.data.batches import put_batch
from drift_jax.data.pairs import TokenizedPair, tokenize_pair
from drift_jax.data.rules import build_rules
from drift_jax.data.tokenizer import load_tokenizer
from drift_jax.models.hf import load_params, load_qwen_config
from drift_jax.records import read_pairs
from drift_jax.sharding import build_layout, use_layout
from drift_jax.stages.dpo import build_loader, build_trainer
from drift_jax.stages.reference import RefLogps
from drift_jax.step import loss_and_grads
from drift_jax.train import host_metrics
from tests.hf_tensors import to_hf_tensors

GOLDENS = Path(__file__).parent / "goldens"
PRESETS = json.loads((GOLDENS / "presets.json").read_text(encoding="utf-8"))
MODEL = {"path": "unused", "compute_dtype": "float32"}
SUSPECT = (
    "The loss or a gradient moved. Unless its definition was changed on purpose, this is a bug in the code that was "
    "changed last; do not run `make goldens`. Suspect also a new jax or flax, if that is all that changed. Values of "
)


def load_pairs(rows: list[dict]) -> list[TokenizedPair]:
    return [TokenizedPair(r["id"], *(np.array(r[k], np.int32) for k in ("prompt", "chosen", "rejected"))) for r in rows]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_one_step_equals_the_golden(kind: str) -> None:
    golden = json.loads((GOLDENS / "dpo_step.json").read_text())
    pairs = load_pairs(golden["pairs"])
    train = {"batch_size": len(pairs), **golden["objective"]}
    config = build_config({"run_dir": "unused", "model": MODEL, "train": train})
    layout = build_layout(MeshConfig(), jax.devices()[:1])
    trainer, params = build_trainer(config, GOLDENS / kind, layout, 1), load_params(GOLDENS / kind, layout)
    ref = np.array(golden["ref_logps"])
    loader = build_loader(config, trainer, pairs, RefLogps(ref, np.zeros_like(ref)))
    with use_layout(layout):
        batch = put_batch(loader.shuffled(0), layout)
        metrics, grads = jax.jit(partial(loss_and_grads, trainer.setup))(params, batch)
    expected, ours, qwen = golden["values"][kind], host_metrics(metrics), load_qwen_config(GOLDENS / kind)
    message = SUSPECT + str(golden["made_with"])
    for name, value in expected["metrics"].items():
        assert ours[name] == pytest.approx(value, rel=1e-5), message
    norms = {name: float(np.linalg.norm(value)) for name, value in to_hf_tensors(grads, qwen).items()}
    assert norms == pytest.approx(expected["grad_norms"], rel=1e-5), message


def preset_config(name: str) -> RunConfig:
    """The config of `paper, trl0.12` and the like: a preset and, after the comma, its cut."""
    settings = PRESETS["settings"]
    preset, _, truncation = name.partition(", ")
    data = {key: settings[key] for key in ("max_length", "max_prompt_length")}
    train = {"learning_rate": settings["learning_rate"], "warmup_ratio": 0.0, "batch_size": len(PRESETS["pairs"])}
    return build_config(
        {
            "run_dir": "unused",
            "model": MODEL,
            "preset": preset,
            "data": data | ({"truncation": truncation} if truncation else {}),
            "train": train | {"seed": settings["seed"]},
        }
    )


@pytest.mark.parametrize("name", PRESETS["values"])
def test_one_update_of_a_preset_equals_the_golden(name: str, tmp_path: Path) -> None:
    """From messages to moved weights: tokens, cuts, loss, gradients by tensor, updates by tensor."""
    config, expected = preset_config(name), PRESETS["values"][name]
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PRESETS["pairs"]))
    tokenizer, rules, data = load_tokenizer(GOLDENS / "qwen2"), build_rules(config.data), config.data
    pairs = [
        tokenize_pair(pair, tokenizer, data.max_prompt_length, data.max_length, rules)
        for pair in read_pairs(rows).records
    ]
    ref = np.array(PRESETS["ref_logps"])
    layout, qwen = build_layout(MeshConfig(), jax.devices()[:1]), load_qwen_config(GOLDENS / "qwen2")
    trainer, params = build_trainer(config, GOLDENS / "qwen2", layout, 1), load_params(GOLDENS / "qwen2", layout)
    batch = build_loader(config, trainer, pairs, RefLogps(ref, np.zeros_like(ref))).shuffled(0)
    before = jax.tree.map(np.asarray, params)
    with use_layout(layout):
        _, grads = jax.jit(partial(loss_and_grads, trainer.setup))(params, put_batch(batch, layout))
    state, metrics = trainer.step(trainer.init_state(params), batch)
    moved = jax.tree.map(lambda new, old: new - old, state.params, before)

    message = SUSPECT + str(PRESETS["made_with"])
    ours = host_metrics(metrics)
    assert {key: ours[key] for key in expected["metrics"]} == pytest.approx(expected["metrics"], rel=1e-5), message
    for what, tree in (("grad_norms", grads), ("update_norms", moved)):
        norms = {key: float(np.linalg.norm(value)) for key, value in to_hf_tensors(tree, qwen).items()}
        assert norms == pytest.approx(expected[what], rel=1e-4), f"{what}: {message}"


def test_no_two_presets_have_the_same_golden() -> None:
    """A golden that another preset would meet as well could not tell them apart."""
    losses = [value["metrics"]["loss"] for value in PRESETS["values"].values()]
    assert all(abs(a - b) > 1e-4 * a for i, a in enumerate(losses) for b in losses[:i])
