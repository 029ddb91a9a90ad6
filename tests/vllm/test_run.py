"""`drift run` with a vLLM server of its own: stopped by hand, its server killed, itself killed, and run to the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import OWN_ENV, PYTHON

from drift_jax.manifest import Manifest
from drift_jax.sampling import supervise
from drift_jax.stopping import STOPPED
from tests.conftest import REPO
from tests.tiny_pairs import write_dsat

RECORDS, SAMPLES = 60, 4


@pytest.fixture(scope="module")
def config(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    raw = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(models / "untied"), "compute_dtype": "float32", "remat": "none"},
        "data": {
            "dsat": str(write_dsat(folder / "dsat.jsonl", RECORDS)),
            "test_rows": 4,
            "max_length": 160,
            "max_prompt_length": 100,
        },
        "recipe": {"iterations": 1},
        "sampling": {
            "engine": "vllm",
            "n": SAMPLES,
            "max_new_tokens": 48,
            "max_input_length": 128,
            "compute_dtype": "float32",
        },
        "train": {"batch_size": 8, "max_steps": 1},
        "vllm": {"python": PYTHON, "device": "cpu", "concurrency": 8, "env": OWN_ENV},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def heed_ctrl_c() -> None:
    """Also where the tests run in the background of a shell, which has all its children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """`drift run` in a process, and what it says."""

    def __init__(self, config: Path, name: str, *words: str) -> None:
        self.output = config.parent / f"{name}.txt"
        with self.output.open("wb") as out:
            command = [sys.executable, "-m", "drift_jax", "run", str(config), *words]
            self.process = subprocess.Popen(command, stdout=out, stderr=out, cwd=REPO, preexec_fn=heed_ctrl_c)
        self.family: set[int] = set()

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            said = self.output.read_text(errors="replace")[-3000:]
            assert self.process.poll() is None, f"it ended with exit code {self.process.returncode}:\n{said}"
            assert time.monotonic() < deadline, f"it did not happen in {seconds} s:\n{said}"
            time.sleep(0.1)

    def find(self, *names: bytes) -> int | None:
        """A process of the run whose command line has one of the names."""
        self.family |= set(supervise.descendants(self.process.pid))
        return next((pid for pid in self.family if any(name in command_of(pid) for name in names)), None)

    def wait_until_gone(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while left := [pid for pid in self.family if command_of(pid)]:
            assert time.monotonic() < deadline, [command_of(pid)[:200] for pid in left]
            time.sleep(0.1)


def command_of(pid: int) -> bytes:
    """Empty for a process that is gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def start(config: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(name: str, *words: str) -> Run:
        runs.append(Run(config, name, *words))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


def journal_of(config: Path) -> list[dict[str, Any]]:
    path = config.parent / "run" / "iter_1" / "completions.partial.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def test_ctrl_c_ends_everything(config: Path, start: Callable[..., Run]) -> None:
    run = start("interrupted")
    run.wait_for(lambda: run.find(b"vllm.entrypoints") is not None, 120)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == STOPPED
    run.wait_until_gone(5)
    assert not journal_of(config) and "iter_1/pair" not in run.output.read_text()


def test_killed_servers_and_runs_lose_nothing(config: Path, start: Callable[..., Run]) -> None:
    """The server's engine gets SIGKILL, then the run; what was sampled before is what the finished run has."""
    run = start("killed")
    run.wait_for(lambda: len(journal_of(config)) >= 16, 600)
    engine = run.find(b"EngineCore")
    assert engine is not None
    os.kill(engine, signal.SIGKILL)
    at_kill = len(journal_of(config))
    assert at_kill < RECORDS * SAMPLES - 60
    run.wait_for(lambda: len(journal_of(config)) >= at_kill + 24, 600)
    assert "vLLM has died and is started again" in " ".join(run.output.read_text().split())
    run.find()
    run.process.send_signal(signal.SIGKILL)
    run.wait_until_gone(60)
    before = {(row["id"], row["sample"]): row for row in journal_of(config)}
    assert len(before) == len(journal_of(config)) < RECORDS * SAMPLES

    run = start("finished")
    assert run.process.wait(900) == 0, run.output.read_text()[-3000:]
    run.wait_until_gone(5)
    folder = config.parent / "run" / "iter_1"
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    after = {(row["id"], row["sample"]): row for row in rows}
    assert len(after) == len(rows) == RECORDS * SAMPLES
    assert {key: after[key] for key in before} == before
    model = Path(yaml.safe_load(config.read_text())["model"]["path"])
    pair = json.loads((folder / "pairs.train.jsonl").read_text().splitlines()[0])
    assert pair["meta"]["sampler"] == "vllm"
    assert pair["meta"]["policy"] == Manifest(config.parent / "other").model_hash(model)
    assert (folder / "hf" / "model.safetensors").exists()


@pytest.fixture
def begun(config: Path, start: Callable[..., Run]) -> None:
    """There is a run to take over, also where this is the only test that was picked."""
    manifest = config.parent / "run" / "manifest.json"
    if manifest.exists():
        return
    run = start("begun")
    run.wait_for(manifest.exists, 120)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == STOPPED


@pytest.mark.usefixtures("begun")
def test_what_is_wrong_is_said_once(config: Path, start: Callable[..., Run]) -> None:
    for words, message in (
        (("--set", "sampling.temperature=0.5"), "sampling.temperature: was 0.7, is now 0.5"),
        (("--set", "vllm.python=/nowhere/python"), "there is no program /nowhere/python"),
        (("--set", "vllm.pyton=x"), "vllm.pyton: unknown key. Did you mean vllm.python?"),
    ):
        run = start("refused", *words)
        assert run.process.wait(120) == 2
        said = " ".join(run.output.read_text().split())
        assert said.count("error:") == 1 and message in said
