"""Which Qwen a `config.json` describes, and a refusal by name of what is not computed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drift_jax.errors import ModelError
from drift_jax.reading import read_json

SUPPORTED = ("qwen2", "qwen3")
_LARGEST = 2**31 - 1  # of a size: as large as an index can be
# Directories that configs/ names and that a checkout lacks at first.
_MADE_BY = {
    ".cache/demo_model": "`make quickstart` or `python scripts/get_demo_model.py` fetches this one.",
    ".cache/tiny_model": "`python scripts/make_tiny_model.py` makes this one.",
}
_AGAIN = "Take config.json from the model's own repository again."


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


def how_to_get(path: str) -> str | None:
    """The command that makes a model directory, of those that configs/ names."""
    return _MADE_BY.get("/".join(Path(path).parts[-2:]))


def load_hf_config(model_dir: str | Path) -> dict[str, Any]:
    """`config.json` of a model directory. Raises `ModelError` when it is missing or not JSON."""
    path = Path(model_dir) / "config.json"
    if not path.exists() and not path.is_symlink():
        raise ModelError(f"no config.json in {model_dir}: this is not a Hugging Face model directory.")
    config = read_json(path, "Download it again.", ModelError)
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
    read = _Keys(config, source)
    heads = read.size("num_attention_heads")
    embed = read.size("hidden_size")
    qwen = QwenConfig(
        model_type=model_type,
        vocab_size=read.size("vocab_size"),
        embed=embed,
        layers=read.size("num_hidden_layers"),
        heads=heads,
        kv_heads=read.size("num_key_value_heads", heads),
        head_dim=read.size("head_dim", embed // heads),
        mlp=read.size("intermediate_size"),
        rope_theta=_rope_theta(read),
        norm_eps=read.positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        tied=read.switch("tie_word_embeddings"),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        pad_token_id=read.token("pad_token_id"),
    )
    if qwen.heads % qwen.kv_heads:
        raise ModelError(
            f"{source}: num_attention_heads ({qwen.heads}) must be a multiple of num_key_value_heads ({qwen.kv_heads})."
        )
    _refuse_uncomputed(config, qwen, source)
    return qwen


@dataclass(frozen=True)
class _Keys:
    """Values of a config.json, held to what they can be. Raises `ModelError` naming key and value."""

    config: Mapping[str, Any]
    source: str

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on; `default` where there is none or null, which some configs have for it."""
        value = self.config.get(key)
        if value is None and default is not None:
            value = default
        if value is None:
            raise ModelError(f"{self.source}: key {key!r} is missing. {_AGAIN}")
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise ModelError(f"{self.source}: {key} must be a whole number from 1 on, found {value!r:.80}. {_AGAIN}")
        return value

    def positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
            raise ModelError(f"{self.source}: {key} must be a number above 0, found {value!r:.80}. {_AGAIN}")
        return float(value)

    def switch(self, key: str) -> bool:
        value = self.config.get(key, False)
        if not isinstance(value, bool):
            raise ModelError(f"{self.source}: {key} must be true or false, found {value!r:.80}. {_AGAIN}")
        return value

    def token(self, key: str) -> int | None:
        value = self.config.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < self.size("vocab_size")):
            raise ModelError(
                f"{self.source}: {key} must be a token id below vocab_size ({self.config['vocab_size']}) or null, "
                f"found {value!r:.80}. {_AGAIN}"
            )
        return value

    def block(self, key: str) -> Mapping[str, Any]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise ModelError(f"{self.source}: {key} must be an object or null, found {value!r:.80}. {_AGAIN}")
        return value


def _rope_theta(read: _Keys) -> float:
    config, source = read.config, read.source
    # transformers 5 writes rope_parameters; 4 wrote rope_theta beside rope_scaling.
    rope = read.block("rope_parameters")
    scaling = read.block("rope_scaling")
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
    return read.positive("rope_theta", theta)


def _refuse_uncomputed(config: Mapping[str, Any], qwen: QwenConfig, source: str) -> None:
    problems = []
    if config.get("use_sliding_window"):
        problems.append(f"use_sliding_window = true (sliding_window = {config.get('sliding_window')})")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        problems.append(f"layer_types = {kinds!r:.80}")
    elif windowed := {str(kind) for kind in kinds} - {"full_attention"}:
        problems.append(f"layer_types with {sorted(windowed)}")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act = {config['hidden_act']!r}")
    if config.get("quantization_config"):
        problems.append("quantization_config (quantised weights)")
    if qwen.model_type == "qwen3" and config.get("attention_bias"):
        # transformers then also adds a bias to o_proj, which no published dense Qwen3 has.
        problems.append("attention_bias = true for qwen3")
    if problems:
        raise ModelError(f"{source}: not computed here: " + "; ".join(problems) + ".")
