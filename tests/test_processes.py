"""Several processes on this machine as one run: the same numbers as one process, files once, no hang when one dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from drift_jax.telemetry import read_metrics
from tests.conftest import REPO
from tests.processes import finish, free_port, start_one

DEBUG = REPO / "configs" / "debug.yaml"
STAGES = ("seed", "iter_1", "iter_2")
# At the first update policy and reference are equal up to the last bit, and so is whose reward is higher.
SAME = 1e-5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """configs/debug.yaml with its model and data by absolute path, and less to sample."""
    folder = tmp_path_factory.mktemp("processes")
    script, model = REPO / "scripts" / "make_tiny_model.py", folder / "model"
    subprocess.run([sys.executable, script, "--out", model], check=True, cwd=REPO, capture_output=True)
    values = yaml.safe_load(DEBUG.read_text())
    values["model"]["path"] = str(model)
    values["data"]["test_rows"] = 8
    for key in ("dsat", "seed_train", "seed_test"):
        values["data"][key] = str(REPO / values["data"][key])
    path = folder / "debug.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(config: Path, run_dir: Path, count: int, devices: int, *words: str) -> list[subprocess.Popen[str]]:
    """`drift run` as `count` processes that have `devices` fake devices each."""
    port = free_port()
    command = ["drift_jax", "run", config, "--run-dir", run_dir, *words]
    several = [
        ["--coordinator", f"127.0.0.1:{port}", "--num-processes", count, "--process-id", i] for i in range(count)
    ]
    return [start_one(command + own * (count > 1), devices) for own in several]


def run(config: Path, run_dir: Path, count: int, devices: int, *words: str) -> list[str]:
    ends = finish(start(config, run_dir, count, devices, *words), 600)
    assert [code for code, _ in ends] == [0] * count, "\n".join(output[-3000:] for _, output in ends)
    return [output for _, output in ends]


def assert_same_metrics(ours: Path, expected: Path, stages: Sequence[str]) -> None:
    for stage in stages:
        rows, wanted = read_metrics(ours / stage), read_metrics(expected / stage)
        assert [row["step"] for row in rows] == [row["step"] for row in wanted] and rows
        for row, want in zip(rows, wanted, strict=True):
            names = want.keys() - {"tokens_per_second"}
            names -= {"rewards/accuracies"} if abs(want["rewards/margins"]) < SAME else set()
            assert {n: row[n] for n in names} == pytest.approx({n: want[n] for n in names}, rel=SAME, abs=SAME), stage


def drawn(iteration: Path) -> list[dict[str, Any]]:
    """The completions, without what names the policy's very bits."""
    rows = [json.loads(line) for line in (iteration / "completions.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "request"} for row in rows]


@pytest.mark.slow
def test_the_whole_recipe_equals_one_process(config: Path, tmp_path: Path) -> None:
    """On four devices. Four processes on two cores compile all four times: one iteration unless told otherwise."""
    run(config, tmp_path / "one", 1, 4)
    for count, iterations in ((2, 2), (4, int(os.environ.get("DRIFT_ITERATIONS_OF_FOUR", "1")))):
        assert_equals_one_process(config, tmp_path / "one", tmp_path / str(count), count, iterations)


def assert_equals_one_process(config: Path, one: Path, ours: Path, count: int, iterations: int) -> None:
    outputs = run(config, ours, count, 4 // count, "--set", f"recipe.iterations={iterations}")
    assert_same_metrics(ours, one, STAGES[: iterations + 1])
    # XLA itself may warn on any process, of a slow compilation for example.
    told = ("policy:", "seed/train", "reference log-probs", "DPO: ")
    assert [[text in output for text in told] for output in outputs] == [[True] * 4] + [[False] * 4] * (count - 1)

    def files(folder: Path) -> set[str]:
        beside = {".cache", "checkpoints", "tokens", *STAGES[iterations + 1 :]}
        every = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {str(path) for path in every if not set(path.parts) & beside}

    assert files(ours) == files(one)
    for iteration in range(1, iterations + 1):
        alone, several = (folder / f"iter_{iteration}" for folder in (one, ours))
        assert drawn(several) == drawn(alone)
        assert (several / "drops.json").read_text() == (alone / "drops.json").read_text()
    events = [json.loads(line) for line in (ours / "log.jsonl").read_text().splitlines()]
    assert len(events) == len({(event["stage"], event["event"]) for event in events})


@pytest.mark.slow
def test_hosts_may_sample_together(config: Path, tmp_path: Path) -> None:
    """A policy that fits on no host: all devices decode the same rows, and process 0 keeps them."""
    words = ("--set", "recipe.iterations=1", "--set", "data.seed_train=null", "--set", "train.max_steps=1")
    words += ("--set", "recipe.showcase_prompts=[]", "--set", "data.max_rows=8")
    run(config, tmp_path / "together", 2, 2, *words, "--set", "sampling.per_host=false")
    run(config, tmp_path / "one", 1, 4, *words)
    sampled = [drawn(tmp_path / name / "iter_1") for name in ("together", "one")]
    assert sampled[0] == sampled[1] and len(sampled[0]) == 16
    assert not list(tmp_path.rglob("completions.partial*"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_within_a_minute(config: Path, tmp_path: Path, victim: int) -> None:
    words = ("--set", "recipe.seed_epochs=1000", "--set", "checkpoint.every_steps=end")
    processes = start(config, tmp_path / "run", 2, 2, *words)
    metrics, deadline = tmp_path / "run" / "seed" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and processes[0].poll() is None, "training did not begin"
        time.sleep(0.5)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, output = finish([processes[1 - victim]], 60)[0]
    assert time.monotonic() - killed < 60
    assert code not in (0, 2)
    assert "has lost another one of this run" in output or "another task died" in output, output[-3000:]


@pytest.mark.slow
def test_what_is_wrong_is_said_once_and_by_all(config: Path, tmp_path: Path) -> None:
    ends = finish(start(config, tmp_path / "run", 2, 2, "--set", "data.dsat=/nowhere.jsonl"), 120)
    assert [code for code, _ in ends] == [2, 2]
    assert "/nowhere.jsonl does not exist" in ends[0][1] and "nowhere" not in ends[1][1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--coordinator", "127.0.0.1:1"), "--num-processes, --process-id must be given too"),
        (("--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "2"), "must be from 0 to 1"),
        (("--distributed", "on"), "did not find each other"),
    ],
)
def test_processes_that_cannot_start(words: tuple[str, ...], message: str, config: Path, tmp_path: Path) -> None:
    ((code, output),) = finish(start(config, tmp_path / "run", 1, 2, *words), 60)
    assert code == 2 and message in " ".join(output.split()), output
