"""One DPO step against stored numbers: torch in float64 said them, and torch is not needed to compare."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from drift_jax.config import MeshConfig, TrainConfig
from drift_jax.data.batches import PairLoader, put_batch
from drift_jax.data.pairs import TokenizedPair
from drift_jax.models.hf import iterate_hf_tensors, load_params, load_qwen_config
from drift_jax.models.qwen import declare_qwen
from drift_jax.sharding import build_mesh
from drift_jax.train import Trainer, host_metrics, loss_and_grads

GOLDENS = Path(__file__).parent / "goldens"
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
    config = TrainConfig(batch_size=len(pairs), **golden["objective"])
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    qwen = load_qwen_config(GOLDENS / kind)
    trainer = Trainer(*declare_qwen(qwen), mesh, config, "layer", total_steps=1)
    loader = PairLoader(pairs, np.array(golden["ref_logps"]), len(pairs), 1, max_length=128)
    params = load_params(GOLDENS / kind, mesh)
    metrics, grads = jax.jit(partial(loss_and_grads, trainer.setup))(params, put_batch(loader.shuffled(0), mesh))
    expected, ours = golden["values"][kind], host_metrics(metrics)
    message = SUSPECT + str(golden["made_with"])
    for name, value in expected["metrics"].items():
        assert ours[name] == pytest.approx(value, rel=1e-5), message
    norms = {name: float(np.linalg.norm(make())) for name, _, make in iterate_hf_tensors(grads, qwen, "float32")}
    assert norms == pytest.approx(expected["grad_norms"], rel=1e-5), message
