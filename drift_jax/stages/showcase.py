"""A few prompts answered greedily by the policy before and after the run, for a person to read."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.distributed import on_main
from drift_jax.files import write_json
from drift_jax.models.hf import load_qwen_config
from drift_jax.records import Message
from drift_jax.sampling.base import SampleRequest, SamplingParams
from drift_jax.sampling.local import LocalSampler, split_policy
from drift_jax.stages.devices import layout_of_all
from drift_jax.stages.inputs import Summary, open_policy, open_tokenizer

_MAX_NEW_TOKENS = 96


def showcase_stage(config: RunConfig, before: Path, after: Path, out_path: Path, console: Console) -> Summary:
    """Writes [{"prompt", "before", "after"}, ...] to `out_path`."""
    prompts = config.recipe.showcase_prompts
    replies = [_answer(config, model_dir, prompts, console) for model_dir in (before, after)]
    rows = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, *replies, strict=True)]
    on_main(lambda: write_json(out_path, rows))
    return {}


def _answer(config: RunConfig, model_dir: Path, prompts: tuple[str, ...], console: Console) -> list[str]:
    tokenizer = open_tokenizer(model_dir, config.data.thinking)
    dtype = config.sampling.compute_dtype
    policy = split_policy(
        open_policy(model_dir, layout_of_all(config, load_qwen_config(model_dir)), dtype, dtype, console)
    )
    params = SamplingParams(
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=_MAX_NEW_TOKENS,
        seed=0,
        eos_ids=tokenizer.eos_ids,
        vocab_size=tokenizer.vocab_size,
    )
    requests = [
        SampleRequest(str(i), 0, tuple(tokenizer.encode_chat([Message("user", prompt)])))
        for i, prompt in enumerate(prompts)
    ]
    ways = policy.layout.ways("batch")
    completions = LocalSampler(policy, -(-len(prompts) // ways) * ways, config.model.attention).sample(requests, params)
    return [tokenizer.decode(c.token_ids) for c in completions]
