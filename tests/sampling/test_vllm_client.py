"""The client of vLLM servers against small HTTP servers that are slow, die, refuse, or answer nonsense."""

from __future__ import annotations

from typing import Any

import pytest

from drift_jax.endpoint import Endpoint, Retry
from drift_jax.errors import EndpointError, StageError
from drift_jax.sampling.base import Completion, SampleRequest, SamplingParams
from drift_jax.sampling.vllm import Served, VllmSampler, build_body, read_completion, seed_of
from tests.http_servers import Small, completion, serve

PARAMS = SamplingParams(temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=8, seed=42, eos_ids=(9, 10), vocab_size=60)
REQUESTS = [SampleRequest(f"r{i}", 0, (1, 2, 3 + i)) for i in range(40)]


def connect(small: Small, attempts: int = 2) -> Served:
    return Served(Endpoint(small.url, retry=Retry(attempts=attempts, first_wait_s=0.01)), "policy")


def keys(completions: list[Completion]) -> list[tuple[str, int]]:
    return [(c.row_id, c.sample) for c in completions]


def good(_: str, body: Any) -> tuple[int, Any]:
    return completion(body)


def test_a_request_says_everything_that_shapes_it() -> None:
    body = build_body("policy", REQUESTS[0], PARAMS, 64)
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_tokens": 8, "prompt": [1, 2, 3], "model": "policy"}
    expected |= {"stop_token_ids": [9, 10], "ignore_eos": True, "repetition_penalty": 1.0, "min_p": 0.0, "n": 1}
    assert expected.items() <= body.items()
    assert body["logit_bias"] == {str(i): -100.0 for i in range(60, 64)}
    assert "logit_bias" not in build_body("policy", REQUESTS[0], PARAMS, 60)


def test_a_seed_is_of_its_row_and_sample() -> None:
    seeds = {seed_of(s, SampleRequest(row, n, (1,))) for s in (0, 1) for row in ("a", "b") for n in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, SampleRequest("a", 0, (1,))) == seed_of(0, SampleRequest("a", 0, (5, 6)))


def test_requests_are_spread_by_load_and_come_back_in_order() -> None:
    """The slow server gets fewer; no server has more in flight than `concurrency`."""
    seen: list[Completion] = []
    with serve(good, 0.02) as fast, serve(good, 0.2) as slow:
        sampler = VllmSampler([connect(fast), connect(slow)], 60, concurrency=3)
        drawn = sampler.sample(REQUESTS, PARAMS, seen.extend)
    assert keys(drawn) == keys([Completion(r.row_id, r.sample, (), "stop", ()) for r in REQUESTS])
    assert sorted(keys(seen)) == sorted(keys(drawn)) and len(seen) == 40
    assert max(fast.most, slow.most) <= 3
    assert len(fast.seen) > 2 * len(slow.seen) > 0
    assert drawn[5].token_ids[-1] == 9 and drawn[5].token_logps == (-1.0, -1.0, -1.0)


def test_a_dead_server_is_left_out_and_its_requests_go_to_the_others() -> None:
    answered: list[Any] = []

    def dies(_: str, body: Any) -> tuple[int, Any]:
        answered.append(body)
        return completion(body) if len(answered) <= 5 else (0, None)

    lines: list[str] = []
    with serve(dies) as dying, serve(good, 0.01) as other:
        sampler = VllmSampler([connect(dying), connect(other)], 60, 4, report=lines.append)
        drawn = sampler.sample(REQUESTS, PARAMS)
        assert len(lines) == 1 and dying.url in lines[0] and "other 1" in lines[0]
        alone = VllmSampler([connect(other)], 60, 4).sample(REQUESTS[::-1], PARAMS)
    assert drawn == alone[::-1]


def test_no_server_left_is_one_error_and_nothing_is_lost() -> None:
    answered: list[Any] = []

    def dies(_: str, body: Any) -> tuple[int, Any]:
        answered.append(body)
        return completion(body) if len(answered) <= 5 else (503, "overloaded")

    kept: list[Completion] = []
    with serve(dies) as dying, pytest.raises(StageError, match=r"no server of vllm.base_urls is left.*503.*run again"):
        VllmSampler([connect(dying)], 60, 2).sample(REQUESTS, PARAMS, kept.extend)
    assert len(kept) == 5


def test_our_own_server_is_started_again_but_not_for_ever() -> None:
    with serve(lambda *_: (0, None)) as dead, serve(good) as fresh:
        starts: list[int] = []

        def revive() -> Served:
            starts.append(1)
            return connect(fresh if len(starts) == 2 else dead)

        drawn = VllmSampler([connect(dead)], 60, 4, revive, lambda _: None).sample(REQUESTS, PARAMS)
        assert len(drawn) == 40 and len(starts) == 2
        with pytest.raises(StageError, match="has died 4 times without a completion"):
            VllmSampler([connect(dead)], 60, 4, lambda: connect(dead), lambda _: None).sample(REQUESTS, PARAMS)


def test_a_refusal_stops_the_stage_and_keeps_what_was_drawn() -> None:
    def refuses_one(_: str, body: Any) -> tuple[int, Any]:
        return (400, "too long") if body["prompt"][-1] == 30 else completion(body)

    kept: list[Completion] = []
    with serve(refuses_one) as small, pytest.raises(EndpointError, match="400 Bad Request.*too long"):
        VllmSampler([connect(small)], 60, 1).sample(REQUESTS, PARAMS, kept.extend)
    assert len(kept) == 27


def test_an_aborted_request_is_sent_again() -> None:
    aborted: list[Any] = []

    def aborts(_: str, body: Any) -> tuple[int, Any]:
        aborted.append(body)
        return completion(body, finish_reason="abort") if len(aborted) == 1 else completion(body)

    with serve(aborts) as small:
        assert len(VllmSampler([connect(small)], 60, 1).sample(REQUESTS[:3], PARAMS)) == 3
        assert len(small.seen) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [1, 2, 60]}, "holds token 60; the tokenizer has 60 ids"),
        ({"token_ids": [1, 2, 3]}, r"stopped at token 3, which is none of \[9, 10\]"),
        ({"finish_reason": "length"}, "was cut after 3 of 8 tokens.*--max-model-len"),
        ({"token_ids": None}, "lacks token ids or log-probs.*return_token_ids"),
        ({"logprobs": None}, "lacks token ids or log-probs"),
        ({"logprobs": {"token_logprobs": [-1.0, -1.0]}}, "has 3 tokens and 2 finite log-probs"),
        ({"logprobs": {"token_logprobs": [-1.0, -1.0, float("nan")]}}, "has 3 tokens and 2 finite log-probs"),
        ({"token_ids": [], "logprobs": {"token_logprobs": []}}, "has 0 tokens"),
        ({"finish_reason": "abort"}, "finish_reason 'abort'"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused(changes: dict[str, Any], message: str) -> None:
    _, answer = completion(build_body("policy", REQUESTS[0], PARAMS, 60), **changes)
    with pytest.raises(EndpointError, match=message):
        read_completion(answer, REQUESTS[0], PARAMS, "server")


def test_another_prompt_and_no_choices_are_refused() -> None:
    _, answer = completion(build_body("policy", REQUESTS[0], PARAMS, 60))
    assert read_completion(answer, REQUESTS[0], PARAMS, "server").finish_reason == "stop"
    with pytest.raises(EndpointError, match="prompt of 4 tokens; 3 were sent"):
        read_completion(answer | {"usage": {"prompt_tokens": 4}}, REQUESTS[0], PARAMS, "server")
    with pytest.raises(EndpointError, match="lacks token ids"):
        read_completion({"choices": []}, REQUESTS[0], PARAMS, "server")
