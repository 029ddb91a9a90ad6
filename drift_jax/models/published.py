"""Sizes of published Qwen models as their `config.json` has them: for plans and benchmarks without a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from drift_jax.errors import ModelError
from drift_jax.models.architecture import how_to_get, load_hf_config

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2.5": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 32768},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": 40960,
        "head_dim": 128,
    },
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
    "qwen2.5-32b": (5120, 64, 40, 8, 27648, 152064, 1e-5, False),
    "qwen2.5-72b": (8192, 80, 64, 8, 29568, 152064, 1e-6, False),
    "qwen3-0.6b": (1024, 28, 16, 8, 3072, 151936, 1e-6, True),
    "qwen3-1.7b": (2048, 28, 16, 8, 6144, 151936, 1e-6, True),
    "qwen3-4b": (2560, 36, 32, 8, 9728, 151936, 1e-6, True),
    "qwen3-8b": (4096, 36, 32, 8, 12288, 151936, 1e-6, False),
    "qwen3-14b": (5120, 40, 40, 8, 17408, 151936, 1e-6, False),
    "qwen3-32b": (5120, 64, 64, 8, 25600, 151936, 1e-6, False),
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    name: _COMMON | _FAMILIES[name.split("-")[0]] | dict(zip(_KEYS, sizes, strict=True))
    for name, sizes in _SIZES.items()
}
# Instruct and base models of a family have the same sizes.
_HUB_NAME = re.compile(r"(?:qwen/)?(qwen[\d.]+-[\d.]+b)(?:-instruct|-base)?")


def write_architecture(name: str, folder: Path) -> Path:
    """Writes `config.json` of a published model into a folder, which is returned."""
    (folder / "config.json").write_text(json.dumps(ARCHITECTURES[name]), encoding="utf-8")
    return folder


def find_architecture(path: str, revision: str | None = None) -> dict[str, Any]:
    """`config.json` of `model.path`: of a directory, of a known model, or from the hub, without any weights.

    Raises:
      ModelError: there is neither a directory nor a known name nor an answer from the hub.
    """
    if Path(path).is_dir():
        return load_hf_config(path)
    known = _HUB_NAME.fullmatch(path.lower())
    if known and known[1] in ARCHITECTURES:
        return ARCHITECTURES[known[1]]
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        how = how_to_get(path)
        raise ModelError(
            f"no model directory at {path}. {how + ' Or give' if how else 'Give'} one with a config.json, a hub id "
            f"(org/name), or the name of a known model: {', '.join(ARCHITECTURES)}."
        )
    from huggingface_hub import hf_hub_download

    try:
        return load_hf_config(Path(hf_hub_download(path, "config.json", revision=revision)).parent)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{path} is no directory here and no known model, and the hub did not give its config.json "
            f"({type(error).__name__}: {error}). Check the name and the network, or put its config.json into a "
            f"directory and pass that as model.path. Known without a network: {', '.join(ARCHITECTURES)}."
        ) from None
