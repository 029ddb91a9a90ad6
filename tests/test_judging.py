"""Many questions to a judge: what is kept, what is asked again, and what is counted when answers are of no use."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drift_jax import stopping
from drift_jax.config import JudgeConfig
from drift_jax.endpoint import Retry
from drift_jax.errors import StageError
from drift_jax.judging import Question, ask_all
from drift_jax.stopping import Stopped
from tests.http_servers import Answer, Small, serve
from tests.wildbench_files import answer, judge_of

NO_WAIT = Retry(attempts=3, first_wait_s=0.001)


def questions(count: int, schema: dict[str, Any] | None = None) -> list[Question[int]]:
    return [Question(f"q{i}", f"What is {i}?", schema, lambda found: int(found["n"])) for i in range(count)]


def config(small: Small, **changes: Any) -> JudgeConfig:
    return JudgeConfig(base_url=small.url, model="judge", **changes)


def number(prompt: str) -> int:
    found = re.search(r"\d+", prompt)
    assert found is not None
    return int(found[0])


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_answers_are_kept_and_not_asked_for_again(tmp_path: Path) -> None:
    cache = tmp_path / "verdicts.jsonl"
    with serve(judge_of(lambda prompt: {"n": number(prompt)}), delay_s=0.02) as small:
        first = ask_all(
            questions(6), config(small, concurrency=3, price_prompt=2.0, price_completion=10.0), cache, quiet()
        )
        assert first.values == {f"q{i}": i for i in range(6)} and list(first.values) == [f"q{i}" for i in range(6)]
        assert len(small.seen) == 6 and 1 < small.most <= 3
        again = ask_all(questions(8), config(small), cache, quiet())
        assert len(small.seen) == 8 and again.tally.cached == 6 and again.values["q7"] == 7
    assert first.tally.tokens.prompt == 600 and first.tally.dollars == pytest.approx((600 * 2 + 60 * 10) / 1e6)
    assert again.tally.tokens.prompt == 800 and again.tally.dollars is None
    assert "api_key" not in cache.read_text()
    # With everything in the cache no server is needed.
    gone = JudgeConfig(base_url="http://127.0.0.1:9/v1", model="judge")
    assert ask_all(questions(8), gone, cache, quiet(), retry=NO_WAIT).values == again.values


@pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 7}])
def test_another_model_or_parameter_is_another_question(tmp_path: Path, change: dict[str, Any]) -> None:
    with serve(judge_of(lambda prompt: {"n": number(prompt)})) as small:
        ask_all(questions(2), config(small), tmp_path / "v.jsonl", quiet())
        changed = JudgeConfig(**({"base_url": small.url, "model": "judge"} | change))
        assert ask_all(questions(2), changed, tmp_path / "v.jsonl", quiet()).tally.cached == 0
        assert len(small.seen) == 4


def test_a_cache_that_was_torn_is_gone_on_with(tmp_path: Path) -> None:
    cache = tmp_path / "v.jsonl"
    with serve(judge_of(lambda prompt: {"n": number(prompt)})) as small:
        ask_all(questions(3), config(small), cache, quiet())
        cache.write_bytes(cache.read_bytes()[:-9])
        assert ask_all(questions(3), config(small), cache, quiet()).tally.cached == 2
        assert len(small.seen) == 4


def test_a_stop_keeps_the_answers_that_are_there_and_those_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, wait = tmp_path / "v.jsonl", stopping.wait

    def only_for_answers(futures: Any, timeout: float) -> Any:
        done, left = wait(futures, timeout)
        assert not left, "a question that was never asked has no answer to wait for"
        return done, left

    monkeypatch.setattr(stopping, "wait", only_for_answers)

    def verdict(prompt: str) -> dict[str, Any]:
        if len(small.seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"n": number(prompt)}

    with serve(judge_of(verdict), delay_s=0.1) as small:
        with stopping.heed_signals(), pytest.raises(Stopped):
            ask_all(questions(20), config(small, concurrency=3), cache, quiet())
        asked = len(small.seen)
        assert 6 <= asked < 12 and len(cache.read_text().splitlines()) == asked
        with stopping.heed_signals():
            found = ask_all(questions(20), config(small), cache, quiet())
        assert len(small.seen) == 20 and found.tally.cached == asked
        assert found.values == {f"q{i}": i for i in range(20)}


def test_malformed_answers_are_counted_and_left_out(tmp_path: Path) -> None:
    """One question never gets a usable answer, one gets it at the second attempt, one is answered in a thought."""
    asked: dict[int, int] = {}

    def verdict(prompt: str) -> dict[str, Any] | str:
        i = number(prompt)
        asked[i] = asked.get(i, 0) + 1
        if i == 0:
            return "I would rather not say."
        if i == 1 and asked[i] == 1:
            return '{"n": "many"}'
        return f'Let me think {{about}} it.\n```json\n{{"n": {i}}}\n```' if i == 2 else {"n": i}

    with serve(judge_of(verdict)) as small:
        found = ask_all(questions(4), config(small), tmp_path / "v.jsonl", quiet())
        assert found.values == {"q1": 1, "q2": 2, "q3": 3} and list(found.failures) == ["q0"]
        row = found.tally.row()
        assert (row["failed"], row["malformed_answers"], row["answered"]) == (1, 3 + 1, 3)
        assert row["prompt_tokens"] == 100 * (3 + 2 + 1 + 1)
        # What failed is asked again, and only that.
        before = len(small.seen)
        ask_all(questions(4), config(small), tmp_path / "v.jsonl", quiet())
        assert len(small.seen) == before + 3


@pytest.mark.parametrize(
    "said", ['{"n": 7, "p": NaN}', '{"n": 7, "p": -Infinity}', '{"n": 7, "p": 1e999}', '{"n": NaN}']
)
def test_a_number_that_json_has_not_is_a_malformed_answer(tmp_path: Path, said: str) -> None:
    """What was paid for can be read again."""
    with serve(judge_of(lambda _: said if len(small.seen) == 1 else {"n": 7, "p": 1.5})) as small:
        for asked in (2, 2):
            found = ask_all(questions(1), config(small), tmp_path / "v.jsonl", quiet())
            assert found.values == {"q0": 7} and found.tally.malformed_answers == 1 and len(small.seen) == asked


@pytest.mark.parametrize("half", ["\\ud83d", "\ud83d", "\\uDE42\\ud83d"], ids=["escaped", "as it is", "two"])
def test_half_of_a_surrogate_pair_is_mended(tmp_path: Path, half: str) -> None:
    said = f'{{"n": 7, "why": "good {half}", "{half}": [{{"{half}": "\\ud83d\\ude42"}}]}}'
    with serve(judge_of(lambda _: said)) as small:
        for _ in range(2):
            found = ask_all(questions(1), config(small), tmp_path / "v.jsonl", quiet())
            assert found.values == {"q0": 7} and len(small.seen) == 1 and found.tally.malformed_answers == 0
    mark = "?" * half.upper().count("\\U") or "?"
    assert found.rows["q0"]["answer"] == {"n": 7, "why": f"good {mark}", mark: [{mark: "🙂"}]}


def test_only_malformed_answers_are_no_reason_to_stop(tmp_path: Path) -> None:
    with serve(judge_of(lambda _: "no")) as small:
        found = ask_all(questions(20), config(small), tmp_path / "v.jsonl", quiet())
    assert not found.values and found.tally.failed == 20 and found.tally.malformed_answers == 60


def test_a_busy_server_is_waited_for(tmp_path: Path) -> None:
    refused: set[int] = set()

    def verdict(prompt: str) -> dict[str, Any] | Answer:
        i = number(prompt)
        if i not in refused:
            refused.add(i)
            return (429, {"error": "slow down"}) if i % 2 else (503, {})
        return {"n": i}

    with serve(judge_of(verdict)) as small:
        found = ask_all(questions(4), config(small), tmp_path / "v.jsonl", quiet(), retry=NO_WAIT)
    assert found.tally.failed == 0 and len(small.seen) == 8


def test_a_server_that_answers_nothing_stops_it(tmp_path: Path) -> None:
    with serve(lambda path, body: (401, {"error": "who are you"})) as small:
        with pytest.raises(
            StageError, match=r"gave no answer to 16 questions in a row: .*who are you.*v\.jsonl and not asked again"
        ):
            ask_all(questions(40), config(small, concurrency=1), tmp_path / "v.jsonl", quiet(), retry=NO_WAIT)
        assert len(small.seen) <= 17


@pytest.mark.parametrize("answered", [1, 0], ids=["it dies", "it is dead when the run goes on"])
def test_a_server_that_answers_no_more_stops_it_and_a_rerun_goes_on(tmp_path: Path, answered: int) -> None:
    alive = True

    def verdict(prompt: str) -> dict[str, Any] | Answer:
        return {"n": number(prompt)} if alive or len(small.seen) <= answered else (401, {"error": "expired"})

    with serve(judge_of(verdict)) as small:
        judge, cache = config(small, concurrency=1), tmp_path / "v.jsonl"
        if not answered:
            ask_all(questions(1), judge, cache, quiet())
            small.seen.clear()
        alive = False
        with pytest.raises(StageError, match=r"gave no answer to 16 questions in a row: .*expired"):
            ask_all(questions(60), judge, cache, quiet(), retry=NO_WAIT)
        assert len(small.seen) <= answered + 17 and len(cache.read_text().splitlines()) == 1
        alive = True
        found = ask_all(questions(60), judge, cache, quiet())
    assert found.tally.cached == 1 and found.values == {f"q{i}": i for i in range(60)}


def test_silence_now_and_then_stops_nothing(tmp_path: Path) -> None:
    """Every 16th question is answered, if only with what cannot be used."""

    def verdict(prompt: str) -> str | Answer:
        return "no" if number(prompt) % 16 == 15 else (401, {})

    with serve(judge_of(verdict)) as small:
        found = ask_all(questions(48), config(small, concurrency=1), tmp_path / "v.jsonl", quiet(), retry=NO_WAIT)
    assert found.tally.failed == 48 and found.tally.malformed_answers == 9


def test_some_failures_are_left_out(tmp_path: Path) -> None:
    def verdict(prompt: str) -> dict[str, Any] | Answer:
        return (500, {}) if number(prompt) == 1 else {"n": number(prompt)}

    console = Console(file=io.StringIO(), width=300)
    with serve(judge_of(verdict)) as small:
        found = ask_all(questions(3), config(small), tmp_path / "v.jsonl", console, retry=NO_WAIT)
    assert list(found.values) == ["q0", "q2"] and "500" in found.failures["q1"]
    assert isinstance(console.file, io.StringIO) and "1 of 3 questions have no usable answer" in console.file.getvalue()


def test_the_key_is_sent_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the server repeats it in what it says."""
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    console = Console(file=io.StringIO(), width=300)

    def reply(path: str, body: Any) -> Answer:
        if number(body["messages"][0]["content"]) == 1:
            return 401, {"error": "Incorrect API key provided: sk-very-secret"}
        return answer('{"n": 0}')

    with serve(reply) as small:
        found = ask_all(
            questions(2), config(small, api_key_env="JUDGE_KEY"), tmp_path / "v.jsonl", console, retry=NO_WAIT
        )
    assert "Incorrect API key provided" in found.failures["q1"]
    assert isinstance(console.file, io.StringIO)
    for text in (console.file.getvalue(), json.dumps(found.failures), (tmp_path / "v.jsonl").read_text()):
        assert "sk-very-secret" not in text


def test_how_the_server_is_asked(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    with serve(judge_of(lambda prompt: {"n": number(prompt)})) as small:
        ask_all(questions(1), config(small), tmp_path / "a.jsonl", quiet())
        ask_all(questions(1, schema), config(small), tmp_path / "b.jsonl", quiet())
    forms = [body["response_format"] for _, body in small.seen]
    assert forms[0] == {"type": "json_object"} and forms[1]["json_schema"]["schema"] == schema


def test_a_server_that_fails_at_structured_output_is_asked_without(tmp_path: Path) -> None:
    """As vLLM does where a package is missing: 500 for every request with a schema."""

    def reply(path: str, body: Any) -> Answer:
        return (500, {"error": {"message": ""}}) if "response_format" in body else answer('{"n": 3}')

    with serve(reply) as small:
        judge = config(small, concurrency=1)
        found = ask_all(questions(3, {"type": "object"}), judge, tmp_path / "v.jsonl", quiet(), retry=NO_WAIT)
    assert found.tally.failed == 0 and len(small.seen) == NO_WAIT.attempts + 3
