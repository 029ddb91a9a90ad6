"""Real prompts of mixed length, and the judge of greedy completions: transformers in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from drift_jax.data.prompts import build_sampling_prompt
from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.records import read_dsat
from drift_jax.sampling.base import Completion
from tests.conftest import REPO


def real_prompts(tokenizer: ChatTokenizer) -> list[tuple[int, ...]]:
    """32 prompts of a sample stage, cut to 24 to 123 tokens."""
    records = read_dsat(REPO / "data" / "sample" / "dsat.jsonl").records[:32]
    lengths = [24 + 37 * i % 100 for i in range(32)]
    prompts = [
        tuple(build_sampling_prompt(record, "chat", tokenizer, length).ids.tolist())
        for record, length in zip(records, lengths, strict=True)
    ]
    assert len({len(prompt) for prompt in prompts}) > 20
    return prompts


def assert_greedy(
    model_dir: Path, vocab: int, prompts: Sequence[tuple[int, ...]], drawn: Sequence[Completion], atol: float = 1e-3
) -> None:
    """Each id is the most likely one after those before it, so these are the greedy ids; and so are their log-probs."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for prompt, completion in zip(prompts, drawn, strict=True):
        ids = torch.tensor(completion.token_ids)
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor(prompt), ids])[None]).logits[0, len(prompt) - 1 : -1]
        assert logits[:, :vocab].argmax(-1).tolist() == ids.tolist()
        logps = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        np.testing.assert_allclose(completion.token_logps, logps.numpy(), atol=atol)
