"""The judge that finds complaints, with a real server: protocol, retries, going on, malformed answers.

The demo model has 135M parameters: what it decides is noise, that it is read, counted and kept is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Running

from drift_jax.config import JudgeConfig
from drift_jax.data.mining.detect import build_detector
from drift_jax.data.mining.detector_config import DetectorConfig
from drift_jax.data.mining.dialogue import Complaint, Conversation, Turn
from drift_jax.errors import EndpointError, StageError
from drift_jax.journal import read_rows
from drift_jax.sampling.server import SERVED_NAME
from tests.http_servers import Answer, Small, serve

FOLLOW_UPS = ("That is wrong, I asked for Peru.", "Thanks! And of Chile?", "You forgot the year.", "Great, go on.")
LOGS = [
    Conversation(
        f"log {i}",
        (
            Turn("user", f"What is the capital of country {i}?"),
            Turn("assistant", f"It is city {i}."),
            Turn("user", FOLLOW_UPS[i % 4]),
            Turn("assistant", "Here you are."),
            Turn("user", FOLLOW_UPS[(i + 1) % 4]),
        ),
    )
    for i in range(5)
]


@pytest.fixture
def running(servers: dict[str, Running]) -> Running:
    return servers["demo"]


@pytest.fixture
def proxy(running: Running) -> Iterator[Small]:
    """Hands requests on; every third is lost or refused before that."""
    endpoint, count = running.server.connect(), 0

    def reply(path: str, body: Any) -> Answer:
        nonlocal count
        count += 1
        if count % 3 == 1:
            return [(0, None), (429, {}), (503, {})][count // 3 % 3]
        try:
            return 200, endpoint.post(path.removeprefix("/v1"), body)
        except EndpointError as error:
            return error.status or 500, {"error": str(error)}

    with serve(reply) as small:
        yield small


def config_of(url: str, **judge: Any) -> DetectorConfig:
    given = {"base_url": url, "model": SERVED_NAME, "max_tokens": 320, "concurrency": 2, "timeout_s": 300.0}
    return DetectorConfig(kind="judge", judge=JudgeConfig(**(given | judge)))


def run(config: DetectorConfig, journal: Path, most: int = 99) -> tuple[list[list[Complaint]], dict[str, Any]]:
    """Complaints of the first conversations, and what was counted."""
    detector, found = build_detector(config, journal), []
    conversations = detector.find(LOGS)
    try:
        for _, complaints in conversations:
            found.append(complaints)
            if len(found) == most:
                break
        return found, detector.stats()["judge"]
    finally:
        conversations.close()  # pyright: ignore[reportAttributeAccessIssue]
        detector.close()


def prompts(small: Small) -> list[str]:
    return [body["messages"][0]["content"] for _, body in small.seen]


def test_answers_are_read_kept_and_asked_for_once(proxy: Small, tmp_path: Path) -> None:
    """Stopped after one conversation; the next run goes on, and a third one asks nothing. A third of all is lost."""
    config, journal = config_of(proxy.url), tmp_path / "judge.jsonl"
    run(config, journal, most=1)
    before, kept = len(proxy.seen), read_rows(journal)
    assert 1 <= len(kept) < len(LOGS)
    found, counts = run(config, journal)
    rows = read_rows(journal)
    assert rows[: len(kept)] == kept and len({row["key"] for row in rows}) == len(rows) == len(LOGS)
    done = {row["conversation"] for row in kept}
    again = " ".join(prompts(proxy)[before:])
    assert all((f"country {one.id[4:]}?" in again) != (one.id in done) for one in LOGS)
    assert all("response_format" in body for _, body in proxy.seen)  # the server knows structured output
    lost = (len(proxy.seen) + 2) // 3
    assert lost >= 3 and counts["questions_without_answer"] == 0
    decided = sum(len(row["verdicts"]) for row in rows)
    assert counts["turns_asked_about"] == 10 == decided + counts["turns_undecided"]
    assert decided >= 5, [row["malformed"] for row in rows]
    assert counts["tokens_in"] > 700 * counts["calls"] and 0 < counts["tokens_out"] <= 320 * counts["calls"]
    assert counts["calls"] == len(LOGS) + counts["malformed_answers"] - sum(row["malformed"] == 3 for row in rows)
    print(json.dumps(counts))
    total = len(proxy.seen)
    assert run(config, journal) == (found, counts) and len(proxy.seen) == total


def test_answers_that_are_cut_off_are_counted(proxy: Small, tmp_path: Path) -> None:
    config, journal = config_of(proxy.url, max_tokens=8), tmp_path / "judge.jsonl"
    found, counts = run(config, journal)
    assert found == [[]] * len(LOGS)
    assert counts["malformed_answers"] == counts["calls"] == 3 * len(LOGS) and counts["turns_undecided"] == 10
    assert counts["tokens_out"] == 8 * counts["calls"]
    total = len(proxy.seen)
    assert run(config, journal) == (found, counts) and len(proxy.seen) == total


def test_the_key_is_sent_and_a_wrong_one_ends_the_run(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_JUDGE", running.key)
    config = config_of(running.url, api_key_env="KEY_OF_JUDGE", max_tokens=8)
    assert run(config, tmp_path / "judge.jsonl")[1]["questions_without_answer"] == 0
    monkeypatch.setenv("KEY_OF_JUDGE", "another")
    with pytest.raises(StageError, match=r"no answer to 5 questions in a row.*401") as caught:
        run(config, tmp_path / "other.jsonl")
    assert running.key not in str(caught.value) and not (tmp_path / "other.jsonl").exists()  # it had no row
