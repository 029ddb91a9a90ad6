"""Sizes of published Qwen2.5 models as their `config.json` has them, for benchmarks without a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "tie_word_embeddings",
)

_SIZES: dict[str, tuple[Any, ...]] = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, 1e-6, True),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936, 1e-6, True),
    "qwen2.5-3b": (2048, 36, 16, 2, 11008, 151936, 1e-6, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, 1e-6, False),
    "qwen2.5-14b": (5120, 48, 40, 8, 13824, 152064, 1e-5, False),
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    name: _COMMON | dict(zip(_KEYS, sizes, strict=True)) for name, sizes in _SIZES.items()
}


def write_architecture(name: str, folder: Path) -> Path:
    """Writes `config.json` of a published model into a folder, which is returned."""
    (folder / "config.json").write_text(json.dumps(ARCHITECTURES[name]), encoding="utf-8")
    return folder
