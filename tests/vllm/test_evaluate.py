"""`drift evaluate` with a real judge: a vLLM server with the demo model, which is fluent and no good judge."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Running

from drift_jax.sampling.server import SERVED_NAME
from tests.conftest import REPO
from tests.tiny_pairs import build_tiny_policy
from tests.wildbench_files import write_checkout, write_outputs, write_tasks

KEY = "EVALUATION_JUDGE_KEY"


@pytest.fixture
def judge(servers: dict[str, Running]) -> Running:
    return servers["demo"]


def command(judge: Running, tmp_path: Path, model: Path, *words: object) -> list[str]:
    keys = [f"judge.base_url={judge.url}", f"judge.model={SERVED_NAME}", f"judge.api_key_env={KEY}"]
    keys += ["judge.max_tokens=160", "judge.concurrency=2", "judge.price_prompt=1", "sampling.max_new_tokens=8"]
    options = [word for key in (*keys, "sampling.compute_dtype=float32") for word in ("--set", key)]
    files = ["--tasks", write_tasks(tmp_path / "tasks.json"), "--wildbench", tmp_path / "WildBench"]
    parts = [sys.executable, "-m", "drift_jax", "evaluate", "wildbench", model, *files, *options, *words]
    return list(map(str, parts))


def environment(judge: Running) -> dict[str, str]:
    return os.environ | {KEY: judge.key, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}


def test_sixteen_tasks_killed_half_way_and_resumed(judge: Running, tmp_path: Path) -> None:
    write_checkout(tmp_path / "WildBench")
    model = build_tiny_policy(tmp_path / "model", tied=True)
    words = command(judge, tmp_path, model, "--json-schema", "--name", "tiny", "--out", tmp_path / "out")
    verdicts, log = tmp_path / "out/verdicts.jsonl", tmp_path / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, cwd=REPO, env=environment(judge))
    try:
        deadline = time.monotonic() + 300
        while not (verdicts.exists() and verdicts.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = verdicts.read_bytes().count(b"\n")
    assert not (tmp_path / "out/report.json").exists()
    ended = subprocess.run(words, capture_output=True, text=True, cwd=REPO, env=environment(judge), timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    counted = report["judging"]["score"]
    # An empty output of the tiny model costs no question.
    assert counted["questions"] + report["score"]["empty"] == 16 and counted["from_cache"] == done >= 2
    assert counted["answered"] + counted["failed"] == counted["questions"]
    assert report["score"]["total"] == counted["answered"] + report["score"]["empty"]
    assert 1 <= report["score"]["score"] <= 10 and counted["prompt_tokens"] > 0 and counted["dollars"] > 0
    assert (tmp_path / "out/report.md").read_text().startswith("# WildBench: tiny")
    rows = json.loads((tmp_path / f"out/score.v2/eval={SERVED_NAME}/tiny.json").read_text())
    assert all(row["score"] in map(str, range(1, 11)) for row in rows)
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or judge.key not in path.read_text()
    assert judge.key not in ended.stdout + ended.stderr


def test_answers_of_no_use_are_counted(judge: Running, tmp_path: Path) -> None:
    """Of a template that does not say what the object holds, the demo model makes no score."""
    template = write_checkout(tmp_path / "WildBench") / "evaluation/eval_template.score.v2.md"
    template.write_text(template.read_text().partition("Score it")[0] + "How good is it?")
    ours = write_outputs(tmp_path / "ours.json", "ours", {i: f"The number is {i}." for i in range(3)})
    words = command(judge, tmp_path, ours, "--out", tmp_path / "out", "--set", "judge.max_tokens=48")
    ended = subprocess.run(words, capture_output=True, text=True, cwd=REPO, env=environment(judge), timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    counted = report["judging"]["score"]
    assert counted["failed"] > 0 and counted["malformed_answers"] >= 3 * counted["failed"]
    assert report["score"]["total"] == 3 - counted["failed"] and report["without_output"] == 13
    assert f"{counted['failed']} left out" in (tmp_path / "out/report.md").read_text()
