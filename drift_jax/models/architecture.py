"""Which Qwen a `config.json` describes, and a refusal by name of what is not computed here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drift_jax.errors import ModelError

SUPPORTED = ("qwen2", "qwen3")


@dataclass(frozen=True)
class QwenConfig:
    """Sizes and switches of a Qwen2, Qwen2.5 or Qwen3 dense model (names after `config.json` in comments)."""

    model_type: str
    vocab_size: int
    embed: int  # hidden_size
    layers: int  # num_hidden_layers
    heads: int  # num_attention_heads
    kv_heads: int  # num_key_value_heads
    head_dim: int
    mlp: int  # intermediate_size
    rope_theta: float
    norm_eps: float  # rms_norm_eps
    tied: bool  # tie_word_embeddings
    qkv_bias: bool  # Qwen2
    qk_norm: bool  # Qwen3
    pad_token_id: int | None = None
    pad_trains: bool = True  # False: reading the pad token's embedding gives no gradient (see PAD_EMBEDDINGS)

    @property
    def num_parameters(self) -> int:
        attention = self.embed * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        small = 2 * self.embed + (2 * self.head_dim if self.qk_norm else 0)
        small += self.head_dim * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        tables = self.vocab_size * self.embed * (1 if self.tied else 2)
        return self.layers * (attention + 3 * self.embed * self.mlp + small) + tables + self.embed


# transformers makes the embedding with `padding_idx=pad_token_id`, and torch then drops the gradient of that row. Where
# a model pads with a token that means something (its turn end, or "!" where the id is 0), its embedding never learns.
PAD_EMBEDDINGS: Mapping[str, Callable[[QwenConfig], QwenConfig]] = {
    "trained": lambda config: replace(config, pad_trains=True),
    "frozen": lambda config: replace(config, pad_trains=False),
}


def load_hf_config(model_dir: str | Path) -> dict[str, Any]:
    """`config.json` of a model directory. Raises `ModelError` when it is missing or not JSON."""
    path = Path(model_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"no config.json in {model_dir}: this is not a Hugging Face model directory.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error}). Download it again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold a JSON object, found {type(config).__name__}.")
    return config


def qwen_config_from_hf(config: Mapping[str, Any], source: str = "config.json") -> QwenConfig:
    """`config.json` of transformers 4 or 5 -> sizes.

    Raises:
      ModelError: another architecture, or a feature that would change the numbers and is not computed here
        (rope scaling, sliding windows, another activation), named with its value.
    """
    model_type = config.get("model_type")
    if model_type not in SUPPORTED:
        raise ModelError(
            f"{source}: architecture {model_type!r} ({config.get('architectures')}) is not supported; "
            f"supported model_type: {', '.join(SUPPORTED)} (dense Qwen2, Qwen2.5, Qwen3)."
        )
    try:
        heads = int(config["num_attention_heads"])
        embed = int(config["hidden_size"])
        qwen = QwenConfig(
            model_type=model_type,
            vocab_size=int(config["vocab_size"]),
            embed=embed,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or embed // heads),
            mlp=int(config["intermediate_size"]),
            rope_theta=_rope_theta(config, source),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            pad_token_id=config.get("pad_token_id"),
        )
    except KeyError as missing:
        raise ModelError(f"{source}: key {missing} is missing.") from None
    if qwen.heads % qwen.kv_heads:
        raise ModelError(
            f"{source}: num_attention_heads ({qwen.heads}) must be a multiple of num_key_value_heads ({qwen.kv_heads})."
        )
    _refuse_uncomputed(config, qwen, source)
    return qwen


def _rope_theta(config: Mapping[str, Any], source: str) -> float:
    # transformers 5 writes rope_parameters; 4 wrote rope_theta beside rope_scaling.
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    for name, block in (("rope_parameters", rope), ("rope_scaling", scaling)):
        kind = block.get("rope_type", block.get("type", "default"))
        if kind != "default":
            raise ModelError(
                f"{source}: {name} of type {kind!r} is not computed here; only plain rotary embeddings are. "
                f"Remove {name} if your texts fit the model's original context."
            )
    theta = rope.get("rope_theta", scaling.get("rope_theta", config.get("rope_theta")))
    if theta is None:
        raise ModelError(f"{source}: neither rope_theta nor rope_parameters.rope_theta is given.")
    return float(theta)


def _refuse_uncomputed(config: Mapping[str, Any], qwen: QwenConfig, source: str) -> None:
    problems = []
    if config.get("use_sliding_window"):
        problems.append(f"use_sliding_window = true (sliding_window = {config.get('sliding_window')})")
    windowed = [kind for kind in config.get("layer_types") or [] if kind != "full_attention"]
    if windowed:
        problems.append(f"layer_types with {sorted(set(windowed))}")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act = {config['hidden_act']!r}")
    if config.get("quantization_config"):
        problems.append("quantization_config (quantised weights)")
    if qwen.model_type == "qwen3" and config.get("attention_bias"):
        # transformers then also adds a bias to o_proj, which no published dense Qwen3 has.
        problems.append("attention_bias = true for qwen3")
    if problems:
        raise ModelError(f"{source}: not computed here: " + "; ".join(problems) + ".")
