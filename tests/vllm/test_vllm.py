"""The sampler and the hand-off with real vLLM servers."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUIET, Running, make_config
from jaxtyping import Float
from scipy import stats

from drift_jax.config import RunConfig
from drift_jax.data.tokenizer import load_tokenizer
from drift_jax.errors import ConfigError, EndpointError, StageError
from drift_jax.models.hf import load_qwen_config
from drift_jax.sampling import supervise
from drift_jax.sampling.base import Completion, Sampler, SampleRequest, SamplingParams
from drift_jax.sampling.server import VllmServer
from drift_jax.sampling.vllm import VllmSampler, build_body
from drift_jax.stages.engines import VllmEngine
from tests.greedy import assert_greedy, real_prompts
from tests.tiny_models import VOCAB

IDS = 384  # of the tiny tokenizer; the tiny models have VOCAB rows
PARAMS = SamplingParams(
    temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=12, seed=42, eos_ids=(381, 379), vocab_size=IDS
)
TINY = [SampleRequest(f"r{i}", 0, tuple(range(5 + i % 7, 25 + i % 11))) for i in range(40)]


def change(params: SamplingParams, **changes: Any) -> SamplingParams:
    import dataclasses

    return dataclasses.replace(params, **changes)


def sampler_of(*running: Running, vocab: int = VOCAB, **given: Any) -> VllmSampler:
    return VllmSampler([r.connect() for r in running], vocab, 16, **given)


# --- what comes back --------------------------------------------------------------------------------------


def test_greedy_ids_equal_those_of_transformers(servers: dict[str, Running]) -> None:
    """32 real prompts of mixed length, float32; and the log-probs that come along."""
    demo = servers["demo"]
    tokenizer = load_tokenizer(demo.model_dir)
    prompts = real_prompts(tokenizer)
    vocab = load_qwen_config(demo.model_dir).vocab_size
    params = change(PARAMS, temperature=0.0, eos_ids=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size)
    requests = [SampleRequest(f"p{i}", 0, ids) for i, ids in enumerate(prompts)]
    drawn = sampler_of(demo, vocab=vocab).sample(requests, params)
    assert_greedy(demo.model_dir, vocab, prompts, drawn)
    for completion in drawn:
        ended = completion.token_ids[-1] in tokenizer.eos_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == params.max_new_tokens


def exact_probabilities(model_dir: Path, prompt: tuple[int, ...], temperature: float, top_k: int, top_p: float) -> Any:
    """Of the next token, by transformers in float64: the definition, written out with a sort."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].numpy()
    logits[IDS:] = -np.inf
    order = np.argsort(-logits)
    p = np.exp((logits[order] - logits[order[0]]) / temperature)
    if top_k:
        p[top_k:] = 0
    p /= p.sum()
    before = np.cumsum(p) - p
    p[before >= top_p] = 0
    probabilities = np.zeros(len(p))
    probabilities[order] = p / p.sum()
    return probabilities


def chi_square(counts: Float[np.ndarray, " V"], probabilities: Float[np.ndarray, " V"]) -> float:
    """The p-value of counts; tokens that are expected less than five times are one cell."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    cells = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    keep = cells[1] > 0
    assert not (cells[0][~keep] > 0).any(), "a token of probability zero was drawn"
    return float(stats.chisquare(cells[0][keep], cells[1][keep]).pvalue)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 0, 0.9), (1.3, 20, 0.95)])
def test_draws_follow_the_exact_softmax(
    servers: dict[str, Running], temperature: float, top_k: int, top_p: float
) -> None:
    """20,000 draws; the model's generation_config.json asks for greedy decoding with a repetition penalty."""
    untied, prompt = servers["untied"], TINY[0].prompt_ids
    params = change(PARAMS, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=1)
    counts = np.zeros(VOCAB)
    endpoint = untied.server.connect()
    for i in range(10):
        body = build_body("policy", SampleRequest(f"draw {i}", 0, prompt), params, VOCAB) | {"n": 2000}
        for choice in endpoint.post("/completions", body)["choices"]:
            counts[choice["token_ids"][0]] += 1
    assert counts.sum() == 20_000
    assert chi_square(counts, exact_probabilities(untied.model_dir, prompt, temperature, top_k, top_p)) > 1e-3
    warmer = exact_probabilities(untied.model_dir, prompt, temperature * 1.1, top_k, 1.0)
    assert chi_square(counts, warmer / warmer.sum()) < 1e-9


def test_one_draw_per_row_follows_it_too(servers: dict[str, Running]) -> None:
    """Seeds of rows, as a run has them, are as good as one random stream."""
    untied, prompt = servers["untied"], TINY[0].prompt_ids
    params = change(PARAMS, max_new_tokens=1)
    drawn = sampler_of(untied).sample([SampleRequest(f"r{i}", i % 3, prompt) for i in range(1500)], params)
    counts = np.bincount([c.token_ids[0] for c in drawn], minlength=VOCAB).astype(float)
    assert chi_square(counts, exact_probabilities(untied.model_dir, prompt, 0.7, 0, 0.9)) > 1e-3


def test_a_row_does_not_depend_on_the_others(servers: dict[str, Running]) -> None:
    sampler = sampler_of(servers["untied"])
    drawn = sampler.sample(TINY, PARAMS)
    assert sampler.sample(TINY[::-1], PARAMS) == drawn[::-1]
    assert sampler.sample(TINY[3:5], PARAMS) == drawn[3:5]
    assert sampler.sample(TINY, change(PARAMS, seed=43)) != drawn
    assert len({c.token_ids for c in drawn}) > 30


def test_a_completion_ends_with_its_eos(servers: dict[str, Running]) -> None:
    """Here half of the ids end one."""
    drawn = sampler_of(servers["untied"]).sample(TINY, change(PARAMS, eos_ids=tuple(range(0, 100)), temperature=1.0))
    reasons = {c.finish_reason for c in drawn}
    assert "stop" in reasons
    for c in drawn:
        ends = [i for i, token in enumerate(c.token_ids) if token < 100]
        assert ends == ([len(c.token_ids) - 1] if c.finish_reason == "stop" else [])
        assert len(c.token_logps) == len(c.token_ids)


def test_ids_that_only_pad_the_vocabulary_are_never_drawn(servers: dict[str, Running]) -> None:
    """And without the bias that keeps them away, the answer is refused."""
    params = change(PARAMS, temperature=2.0, top_p=1.0, max_new_tokens=64)
    drawn = sampler_of(servers["untied"]).sample(TINY, params)
    assert max(max(c.token_ids) for c in drawn) < IDS
    with pytest.raises(EndpointError, match=f"the tokenizer has {IDS} ids, later ones only pad"):
        sampler_of(servers["untied"], vocab=IDS).sample(TINY, params)


# --- the hand-off -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(
    running: Running, model_dir: Path, out_dir: Path, monkeypatch: pytest.MonkeyPatch, **vllm: Any
) -> Iterator[tuple[RunConfig, Sampler]]:
    """The engine over a running server, as the sample stage opens it."""
    monkeypatch.setenv("KEY_OF_TEST", running.key)
    given = {"base_urls": [running.url], "api_key_env": "KEY_OF_TEST"} | vllm
    config = make_config(model_dir, vllm=given)
    with VllmEngine(config, model_dir).open(TINY, out_dir, QUIET) as sampler:
        yield config, sampler


def greedy(sampler: Sampler) -> list[Completion]:
    return sampler.sample(TINY[:8], change(PARAMS, temperature=0.0))


def test_new_weights_are_loaded_in_place_and_proven(
    servers: dict[str, Running], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a reload the server is refused, with both numbers; after it, it answers as transformers does."""
    running, new = servers["untied"], models / "untied_new"
    with (
        pytest.raises(StageError, match="older weights") as caught,
        opened(running, new, tmp_path, monkeypatch, refresh="restart"),
    ):
        pass
    numbers = re.search(r"is (-[\d.]+) nats there and (-[\d.]+) here; tokens differ by ([\d.]+)", str(caught.value))
    assert numbers is not None and float(numbers[3]) > 0.01 and numbers[1] != numbers[2]
    with opened(running, running.model_dir, tmp_path, monkeypatch, refresh="restart") as (_, sampler):
        old = greedy(sampler)
    with opened(running, new, tmp_path, monkeypatch) as (_, sampler):
        fresh = greedy(sampler)
    assert_greedy(new, IDS, [request.prompt_ids for request in TINY[:8]], fresh)
    assert fresh != old
    with opened(running, running.model_dir, tmp_path, monkeypatch) as (_, sampler):
        assert greedy(sampler) == old
    assert json.loads((tmp_path / "probe.json").read_text())["dtype"] == "float32"


def test_a_head_that_kept_its_old_weights_is_found(
    servers: dict[str, Running], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's CPU build reloads a model with tied embeddings without its output head; a restart is what helps."""
    running = servers["tied"]
    with opened(running, running.model_dir, tmp_path, monkeypatch, refresh="restart") as (_, sampler):
        assert greedy(sampler)
    with (
        pytest.raises(StageError, match=r"just reloaded.*output head of a model with tied embeddings.*Restart it"),
        opened(running, models / "tied_new", tmp_path, monkeypatch),
    ):
        pass


def test_what_is_wrong_with_a_running_server_is_said(
    servers: dict[str, Running], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = servers["untied"]
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"served_name": "other"}, ConfigError, r"serves \['policy'\] and not 'other'"),
        ({"api_key_env": "WRONG_KEY"}, ConfigError, r"refuses the API key \(401\).*'WRONG_KEY'"),
        ({"api_key_env": ""}, ConfigError, r"refuses the API key \(401\).*'none'"),
        ({"base_urls": ["http://127.0.0.1:9"]}, StageError, "none of the servers of vllm.base_urls answers"),
    ]
    monkeypatch.setenv("WRONG_KEY", "wrong")
    for vllm, kind, message in cases:
        with pytest.raises(kind, match=message), opened(running, running.model_dir, tmp_path, monkeypatch, **vllm):
            pass
    with (
        pytest.raises(ConfigError, match="a model of other sizes"),
        opened(running, models / "tied", tmp_path, monkeypatch),
    ):
        pass
    both = [running.url, "http://127.0.0.1:9"]
    with opened(running, running.model_dir, tmp_path, monkeypatch, base_urls=both) as (_, sampler):
        assert len(greedy(sampler)) == 8


def test_a_server_that_ends_at_start_shows_why(models: Path, tmp_path: Path) -> None:
    config = make_config(models / "untied", vllm={"args": ["--no-such-option"]})
    log = tmp_path / "vllm.log"
    server = VllmServer(config, load_qwen_config(models / "untied"), models / "untied", log)
    with pytest.raises(StageError, match="(?s)exit code 2.*no-such-option") as caught:
        server.start(QUIET)
    assert str(log) in str(caught.value)


def test_the_key_is_nowhere_to_be_read(servers: dict[str, Running]) -> None:
    for running in servers.values():
        assert running.key and running.key not in running.server.log_path.read_text(errors="replace")
        process = running.server._process
        assert process is not None
        for pid in (process.pid, *supervise.descendants(process.pid)):
            with contextlib.suppress(OSError):
                assert running.key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


# --- last, since it ends a server -------------------------------------------------------------------------


def test_a_server_that_is_killed_loses_nothing(servers: dict[str, Running]) -> None:
    """Two servers; the second is killed while it works. Its requests are drawn by the other, each once."""
    survivor, victim = servers["untied"], servers["tied"]
    requests = [SampleRequest(f"r{i}", i % 2, TINY[i % 40].prompt_ids) for i in range(300)]
    params = change(PARAMS, max_new_tokens=32, eos_ids=(IDS - 1,))
    process = victim.server._process
    assert process is not None
    family = supervise.descendants(process.pid)
    alone = {(c.row_id, c.sample): c for c in sampler_of(survivor).sample(requests, params)}
    sampler_of(victim).sample(requests[:16], params)  # its first requests take long enough for the other to do all
    kept: list[Completion] = []
    at_kill: list[int] = []
    lines: list[str] = []

    def of_victim(completions: list[Completion]) -> int:
        """How many another model drew than the survivor's."""
        return sum(c != alone[c.row_id, c.sample] for c in completions)

    def keep(completions: list[Completion]) -> None:
        kept.extend(completions)
        # By what the victim has done: on a busy machine the survivor may be far ahead of it.
        if not at_kill and of_victim(kept):
            at_kill.append(of_victim(kept))
            engine = next(pid for pid in family if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
            os.kill(engine, 9)

    drawn = sampler_of(survivor, victim, report=lines.append).sample(requests, params, keep)
    assert at_kill and len(lines) == 1 and victim.url in lines[0]
    names = [(c.row_id, c.sample) for c in kept]
    assert len(names) == len(set(names)) == 300 and [(c.row_id, c.sample) for c in drawn] == [
        (r.row_id, r.sample) for r in requests
    ]
    assert at_kill[0] <= of_victim(drawn) <= at_kill[0] + 2 * 16  # the rest was about to be handed over
    victim.server.stop()
    assert not supervise.descendants(process.pid)
