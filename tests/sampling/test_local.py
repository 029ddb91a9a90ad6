"""The JAX sampler: greedy tokens equal transformers', and a row knows nothing of its neighbours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from drift_jax.config import MeshConfig
from drift_jax.errors import ConfigError, ModelError
from drift_jax.models.policy import Policy, load_policy
from drift_jax.sampling.base import Completion, SampleRequest, SamplingParams
from drift_jax.sampling.local import LocalSampler, split_policy
from drift_jax.sampling.slots import round_length
from drift_jax.sharding import build_layout
from tests.tiny_models import VOCAB, build_tiny_model

EOS = (1, 2)
LENGTHS = (3, 7, 20, 64, 65, 130, 257, 400)
GREEDY = SamplingParams(0.0, 1.0, 0, 24, 0, EOS, VOCAB)
WARM = SamplingParams(0.9, 0.95, 50, 24, 5, EOS, VOCAB)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("sampler") / "m", request.param, tied=request.param == "qwen3")


def open_policy(model_dir: Path, sizes: tuple[int, int, int] = (1, 1, 1)) -> Policy:
    return load_policy(model_dir, build_layout(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))]), "float32")


def requests() -> list[SampleRequest]:
    rng = np.random.default_rng(0)
    return [SampleRequest(f"r{n}", 0, tuple(rng.integers(3, VOCAB, n).tolist())) for n in LENGTHS]


def assert_same(a: Completion, b: Completion) -> None:
    """The same tokens; log-probs of another batch shape may differ in their last bits."""
    assert (a.row_id, a.sample, a.token_ids, a.finish_reason) == (b.row_id, b.sample, b.token_ids, b.finish_reason)
    np.testing.assert_allclose(a.token_logps, b.token_logps, rtol=1e-5, atol=1e-5)


def test_greedy_tokens_equal_transformers_generate(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ours = LocalSampler(open_policy(model_dir), 4).sample(requests(), GREEDY)
    for request, completion in zip(requests(), ours, strict=True):
        out = model.generate(
            torch.tensor([request.prompt_ids]),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=list(EOS),
            pad_token_id=0,
        )
        assert list(completion.token_ids) == out[0, len(request.prompt_ids) :].tolist(), request.row_id


def test_stops_on_any_eos_id_and_says_so(model_dir: Path) -> None:
    sampler = LocalSampler(open_policy(model_dir), 4)
    free = sampler.sample(requests(), GREEDY)
    for completion in free:
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] in EOS else "length")
    # Declare a token that a row is known to produce at its fifth place an EOS id: the row ends there.
    row = next(c for c in free if len(c.token_ids) == 24)
    stop = row.token_ids[4]
    ends = SamplingParams(0.0, 1.0, 0, 24, 0, (*EOS, stop), VOCAB)
    again = {c.row_id: c for c in sampler.sample(requests(), ends)}[row.row_id]
    assert again.finish_reason == "stop"
    assert again.token_ids == row.token_ids[: row.token_ids.index(stop) + 1]
    assert any(c.finish_reason == "length" for c in free)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_row_does_not_depend_on_batch_order_or_neighbours(model_dir: Path, batch_size: int) -> None:
    policy = open_policy(model_dir)
    expected = {c.row_id: c for c in LocalSampler(policy, 4).sample(requests(), WARM)}
    others = [SampleRequest("new", 0, (5, 6, 7)), *requests()[::-1]]
    got = LocalSampler(policy, batch_size).sample(others, WARM)
    assert [c.row_id for c in got] == [r.row_id for r in others]
    for completion in got[1:]:
        assert_same(completion, expected[completion.row_id])


def test_samples_of_a_prompt_share_its_computation(model_dir: Path) -> None:
    """Four samples, with slots for two at a time: the prompt goes through the layers once, and the draws differ."""
    sampler, prompt = LocalSampler(open_policy(model_dir), 2), requests()[3].prompt_ids
    computed: list[int] = []
    prefill = sampler.jitted.prefill

    def count(params: object, ids: jax.Array, positions: jax.Array) -> object:
        computed.append(int((np.asarray(positions) > 0).sum()) + 1)
        return prefill(params, ids, positions)

    sampler.jitted = sampler.jitted._replace(prefill=count)
    draws = sampler.sample([SampleRequest("x", n, prompt) for n in range(4)], WARM)
    assert computed == [len(prompt) - 1]
    assert len({c.token_ids for c in draws}) == 4
    for draw in draws:  # as if each had been alone
        (alone,) = sampler.sample([SampleRequest("x", draw.sample, prompt)], WARM)
        assert_same(draw, alone)


def test_weights_that_are_no_numbers_are_an_error(model_dir: Path) -> None:
    policy = open_policy(model_dir)
    broken = jax.tree.map(lambda x: x * np.nan, policy.params)
    with pytest.raises(ModelError, match="row 'r3' are not finite"):
        LocalSampler(dataclasses.replace(policy, params=broken), 2).sample(requests()[:1], WARM)


def test_seed_and_sample_index_make_other_completions(model_dir: Path) -> None:
    sampler = LocalSampler(open_policy(model_dir), 4)
    prompt = requests()[3].prompt_ids
    draws = sampler.sample([SampleRequest("x", n, prompt) for n in range(4)], WARM)
    assert len({c.token_ids for c in draws}) == 4
    other = SamplingParams(0.9, 0.95, 50, 24, 6, EOS, VOCAB)
    assert sampler.sample([SampleRequest("x", 0, prompt)], other)[0].token_ids != draws[0].token_ids


def test_ids_beyond_the_tokenizer_are_never_drawn(model_dir: Path) -> None:
    hot = SamplingParams(5.0, 1.0, 0, 24, 0, (1,), 40)
    for completion in LocalSampler(open_policy(model_dir), 8).sample(requests(), hot):
        assert max(completion.token_ids) < 40


@pytest.mark.mesh
def test_the_mesh_changes_no_token(model_dir: Path) -> None:
    """Three samples of each prompt on four parts of two slots: prompts packed, copied, and a cache that grows."""
    wanted = [SampleRequest(r.row_id, n, r.prompt_ids) for r in requests()[:6] for n in range(3)]
    expected = LocalSampler(open_policy(model_dir), 4).sample(wanted, WARM)
    got = LocalSampler(split_policy(open_policy(model_dir, (2, 2, 2))), 8).sample(wanted, WARM)
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


def test_batch_that_the_mesh_cannot_split(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling.batch_size \(3\) cannot be split over 2 devices"):
        LocalSampler(open_policy(model_dir, (2, 1, 1)), 3)


def test_buckets() -> None:
    assert [round_length(n) for n in (1, 128, 129, 300, 400, 600, 1000)] == [128, 128, 256, 384, 512, 768, 1024]
    assert [round_length(n, 4) for n in (1, 129, 200, 257, 600)] == [128, 192, 256, 320, 640]
