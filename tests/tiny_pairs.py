"""Tokenised pairs of random ids, and a tiny model directory with a tokenizer, for tests of the step and the stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from drift_jax.data.pairs import TokenizedPair
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import VOCAB, build_tiny_model


def random_pairs(count: int, seed: int = 0, longest: int = 40) -> list[TokenizedPair]:
    """Pairs whose prompts and completions have 1 to `longest` tokens."""
    rng = np.random.default_rng(seed)

    def ids(low: int) -> np.ndarray:
        return rng.integers(3, VOCAB, rng.integers(low, longest)).astype(np.int32)

    return [TokenizedPair(f"p{i}", ids(1), ids(1), ids(1)) for i in range(count)]


def build_tiny_policy(out_dir: Path, **overrides: Any) -> Path:
    """A tiny Qwen2 with the tokenizer of `tests.tiny`: everything a run needs."""
    build_tiny_model(out_dir, **overrides)
    build_tiny_tokenizer(out_dir)
    return out_dir


def write_dsat(path: Path, count: int, start: int = 0) -> Path:
    """DSAT records that differ in content."""
    rows = [
        {
            "id": f"d{start + i}",
            "prompt": [{"role": "user", "content": f"Tell me a story about number {start + i}."}],
            "rejected": [{"role": "assistant", "content": f"Number {start + i} was the best of all numbers."}],
            "user_preference": {"role": "user", "content": "That is too short, say more."},
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(path: Path, count: int, start: int = 0) -> Path:
    """Seed pairs that differ in content."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {start + i}?"}],
            "chosen": [{"role": "assistant", "content": f"A good answer to {start + i}."}],
            "rejected": [{"role": "assistant", "content": f"A bad one, {start + i}, and a longer one."}],
            "meta": {"id": f"s{start + i}"},
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
