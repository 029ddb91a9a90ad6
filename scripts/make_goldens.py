"""Writes tests/goldens/ anew: a tiny model, pairs, and what torch says in float64 about one DPO step on them.

    python scripts/make_goldens.py

tests/test_goldens.py holds our step to these numbers where torch is not installed. Make them anew only when the
definition of the loss changed on purpose; if nothing did and the numbers move, the code is wrong, not the file.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # runs from a checkout that is not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from drift_jax.config import TrainConfig  # noqa: E402
from tests.tiny_models import build_tiny_model  # noqa: E402
from tests.tiny_pairs import random_pairs  # noqa: E402
from tests.torch_reference import torch_reference  # noqa: E402

SIZES = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
OBJECTIVE = {"beta": 0.1, "label_smoothing": 0.0, "rpo_alpha": 0.001}


def make_goldens(out: Path) -> None:
    """Writes the model, the pairs and the values."""
    shutil.rmtree(out, ignore_errors=True)
    pairs = random_pairs(6, seed=11, longest=20)
    ref_logps = -np.random.default_rng(2).uniform(60, 62, (len(pairs), 2)).round(3)
    goldens = {}
    for kind in ("qwen2", "qwen3"):
        model = build_tiny_model(out / kind, kind, tied=True, **SIZES)
        (model / "generation_config.json").unlink()
        metrics, grads = torch_reference(model, pairs, ref_logps, TrainConfig(**OBJECTIVE))
        norms = {name: float(np.linalg.norm(grad)) for name, grad in grads.items()}
        goldens[kind] = {"metrics": {k: float(v) for k, v in metrics.items()}, "grad_norms": norms}
    rows = [
        {
            "id": p.id,
            "prompt": p.prompt_ids.tolist(),
            "chosen": p.chosen_ids.tolist(),
            "rejected": p.rejected_ids.tolist(),
        }
        for p in pairs
    ]
    content = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "objective": OBJECTIVE,
        "ref_logps": ref_logps.tolist(),
        "pairs": rows,
        "values": goldens,
    }
    (out / "dpo_step.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    make_goldens(REPO / "tests" / "goldens")
