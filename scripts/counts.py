"""What a pair needs, counted for benchmarks."""

from __future__ import annotations


def count_seen(prompt: int, *sides: int) -> int:
    """Positions that all queries of a pair see: a prompt token those before it and itself, a side's also the prompt."""
    return sum(n * (n + 1) // 2 for n in (prompt, *sides)) + prompt * sum(sides)
