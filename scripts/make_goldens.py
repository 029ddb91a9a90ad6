"""Writes tests/goldens/ anew: tiny models, pairs, and what torch says in float64 about one DPO step on them.

    python scripts/make_goldens.py

dpo_step.json has ids as its input, presets.json has messages: one update of every preset, tokens included.
tests/test_goldens.py holds our step to these numbers where torch is not installed. Make them anew only when the
definition of the loss changed on purpose; if nothing did and the numbers move, the code is wrong, not the file.
"""

from __future__ import annotations

import dataclasses
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
from drift_jax.data.batches import epoch_order  # noqa: E402
from drift_jax.records import Pair, pair_to_row, read_pairs  # noqa: E402
from tests.old_trl import Settings  # noqa: E402
from tests.preset_judges import JUDGES, judge_update  # noqa: E402
from tests.tiny import build_tiny_tokenizer  # noqa: E402
from tests.tiny_models import build_tiny_model  # noqa: E402
from tests.tiny_pairs import random_pairs  # noqa: E402
from tests.torch_reference import torch_reference  # noqa: E402

SIZES = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
PAD = 381  # the turn end of tests.tiny's tokenizer: as in SmolLM2, and torch never trains its embedding
PRESET_SETTINGS = {"learning_rate": 1e-3, "max_length": 200, "max_prompt_length": 64, "seed": 42}
OBJECTIVE = {"beta": 0.1, "label_smoothing": 0.0, "rpo_alpha": 0.001}


def make_goldens(out: Path) -> None:
    """Writes the model, the pairs and the values."""
    shutil.rmtree(out, ignore_errors=True)
    pairs = random_pairs(6, seed=11, longest=20)
    ref_logps = -np.random.default_rng(2).uniform(60, 62, (len(pairs), 2)).round(3)
    goldens = {}
    for kind in ("qwen2", "qwen3"):
        model = build_tiny_model(out / kind, kind, tied=True, pad_token_id=PAD, **SIZES)
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
    make_preset_goldens(out)
    print(f"wrote {out}")


def make_preset_goldens(out: Path) -> None:
    """Writes presets.json, and the tokenizer it needs beside the tiny qwen2."""
    model = build_tiny_tokenizer(out / "qwen2")
    pairs = [shorten(pair) for pair in read_pairs(REPO / "data" / "sample" / "seed.test.jsonl").records]
    ref = -np.random.default_rng(3).uniform(200, 210, (len(pairs), 2)).round(3)
    # Of one batch that holds all pairs: groups are taken in the loader's order.
    order = epoch_order(len(pairs), PRESET_SETTINGS["seed"], 0)
    settings = Settings(
        learning_rate=PRESET_SETTINGS["learning_rate"],
        steps=1,
        max_length=PRESET_SETTINGS["max_length"],
        max_prompt_length=PRESET_SETTINGS["max_prompt_length"],
    )
    rows = [pair_to_row(pairs[i]) for i in order]
    values = {name: judge_update(model, rows, ref[order].tolist(), judge, settings) for name, judge in JUDGES.items()}
    content = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": PRESET_SETTINGS,
        "ref_logps": ref.tolist(),
        "pairs": [pair_to_row(pair) for pair in pairs],
        "values": values,
    }
    (out / "presets.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def shorten(pair: Pair) -> Pair:
    """Short texts of different lengths, so that cuts and groups make a difference; "!" has id 0 and ends each."""
    cut = 20 + sum(pair.id.encode()) % 90
    return dataclasses.replace(pair, chosen=pair.chosen[:cut] + "!", rejected=pair.rejected[: 130 - cut] + "!")


if __name__ == "__main__":
    make_goldens(REPO / "tests" / "goldens")
