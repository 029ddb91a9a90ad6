"""The demo model, a trained one, through our own sampler and loader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from drift_jax.config import MeshConfig
from drift_jax.data.tokenizer import load_tokenizer
from drift_jax.models.policy import load_policy
from drift_jax.records import Message
from drift_jax.sampling.base import SampleRequest, SamplingParams
from drift_jax.sampling.local import LocalSampler
from drift_jax.sharding import build_layout
from tests.greedy import assert_greedy, real_prompts

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.demo
def test_the_demo_model_knows_the_capital_of_france(demo_model_dir: Path) -> None:
    tokenizer = load_tokenizer(demo_model_dir)
    policy = load_policy(demo_model_dir, build_layout(MeshConfig(), jax.devices()[:1]), "float32")
    params = SamplingParams(0.0, 1.0, 0, 16, 0, tokenizer.eos_ids, tokenizer.vocab_size)
    prompt = tuple(tokenizer.encode_chat([Message("user", "What is the capital of France?")]))
    (completion,) = LocalSampler(policy, 1).sample([SampleRequest("france", 0, prompt)], params)
    assert tokenizer.decode(completion.token_ids) == "The capital of France is Paris."
    assert completion.finish_reason == "stop"


@pytest.mark.demo
def test_greedy_ids_of_real_prompts_equal_those_of_transformers(demo_model_dir: Path) -> None:
    """32 prompts of mixed length through 8 slots, so that each slot is taken several times."""
    tokenizer = load_tokenizer(demo_model_dir)
    policy = load_policy(demo_model_dir, build_layout(MeshConfig(), jax.devices()[:1]), "float32")
    params = SamplingParams(0.0, 1.0, 0, 8, 0, tokenizer.eos_ids, tokenizer.vocab_size)
    prompts = real_prompts(tokenizer)
    requests = [SampleRequest(f"p{i}", 0, ids) for i, ids in enumerate(prompts)]
    assert_greedy(demo_model_dir, tokenizer.vocab_size, prompts, LocalSampler(policy, 8).sample(requests, params))


@pytest.mark.demo
@pytest.mark.parametrize("dtype,devices", [("float32", 1), ("float32", 8), ("bfloat16", 1)])
def test_loading_needs_little_more_than_the_parameters(demo_model_dir: Path, dtype: str, devices: int) -> None:
    words = ["--model", str(demo_model_dir), "--dtype", dtype, "--devices", str(devices)]
    done = subprocess.run(
        [sys.executable, str(REPO / "scripts/bench_load.py"), *words], check=True, stdout=subprocess.PIPE, text=True
    )
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["peak_rss_gib"] <= 1.3 * row["params_gib"] + 0.5, row
