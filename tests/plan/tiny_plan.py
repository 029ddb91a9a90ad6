"""A small run to plan for: sizes of which no two can be taken for each other in a compiled program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drift_jax.config import RunConfig, build_config
from drift_jax.plan.slices import Slice, open_local

ARCHITECTURE: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 1096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


def raw_config(model_dir: str = "tiny", **sections: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "run_dir": "unused",
        "model": {"path": model_dir, "compute_dtype": "float32"},
        "data": {"max_length": 192, "max_prompt_length": 64},
        "sampling": {"batch_size": 8, "max_new_tokens": 32, "max_input_length": 100, "compute_dtype": "float32"},
        "train": {"batch_size": 16},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section
    return raw


def tiny_config(**sections: dict[str, Any]) -> RunConfig:
    return build_config(raw_config(**sections))


def write_model(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE))
    return folder


def eight_devices(hbm_gib: float | None = None) -> Slice:
    return open_local(8, hbm_gib)
