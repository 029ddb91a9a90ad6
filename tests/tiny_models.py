"""Tiny random checkpoints made by transformers, so that what is compared against is theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 512


def build_tiny_model(out_dir: Path, kind: str = "qwen2", tied: bool = False, **overrides: Any) -> Path:
    """A Qwen2 or Qwen3 with random biases and norms, scaled so that the largest logits are of order 10."""
    # Here, because processes that tests start import this file too, and need none of it.
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-6,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    if kind == "qwen2":
        config: Any = Qwen2Config(**(sizes | dict(rope_theta=1e6) | overrides))
    else:
        config = Qwen3Config(**(sizes | dict(rope_theta=1e6, head_dim=32) | overrides))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(0.15 * noise)
    model.save_pretrained(out_dir)
    return out_dir
