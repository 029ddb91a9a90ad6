"""What a pair needs, counted: whatever is computed besides (padding, prompts twice, remat) is not in these numbers."""

from __future__ import annotations

from drift_jax.models.architecture import QwenConfig


def count_seen(prompt: int, *sides: int) -> int:
    """Positions that all queries of a pair see: a prompt token those before it and itself, a side's also the prompt."""
    return sum(n * (n + 1) // 2 for n in (prompt, *sides)) + prompt * sum(sides)


def forward_flops(config: QwenConfig, prompt: int, *sides: int) -> float:
    """FLOPs of the forward pass of a pair; forward and backward are three times as many.

    Per token of prompt (once) and completions 2 FLOPs a weight of the layers' matmuls, per completion token
    2 * vocabulary * width, per query 4 * width of heads for every position it sees, in every layer.
    """
    queries, keys = config.head_dim * config.heads, config.head_dim * config.kv_heads
    weights = config.layers * config.embed * (2 * queries + 2 * keys + 3 * config.mlp)
    return (
        2.0 * weights * (prompt + sum(sides))
        + 2.0 * config.vocab_size * config.embed * sum(sides)
        + 4.0 * queries * config.layers * count_seen(prompt, *sides)
    )
