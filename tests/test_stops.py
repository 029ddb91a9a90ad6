"""`drift train` is killed, stopped and damaged at many points, and leaves what an uninterrupted run leaves."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from drift_jax.checkpoint import CHECKSUMS_FILE, find_damage
from drift_jax.stages.journal import read_completions
from drift_jax.stopping import STOPPED
from drift_jax.telemetry import read_metrics
from tests.cli_runs import model_dir, write_yaml  # noqa: F401
from tests.processes import finish, free_port, start_one
from tests.test_kill import Server, server  # noqa: F401
from tests.tiny_pairs import write_dsat, write_pairs

TIME = ("tokens_per_second",)  # columns that no two runs share
UPDATES = 24


def write_job(folder: Path, model: Path, **checkpoint: Any) -> list[str]:
    """`drift train` of 24 updates over eight epochs, in bfloat16 weights: their rounding is random."""
    pairs = folder / "pairs"
    pairs.mkdir()
    write_pairs(pairs / "pairs.train.jsonl", 12)
    write_pairs(pairs / "pairs.test.jsonl", 4, start=12)
    raw = {
        "run_dir": "unused",
        "model": {"path": "unused", "compute_dtype": "float32"},
        "data": {"max_length": 128, "max_prompt_length": 64},
        "train": {"batch_size": 4, "epochs": 8, "learning_rate": 1e-3, "master_dtype": "bfloat16", "eval_every": 10},
        "checkpoint": {"every_steps": 4, **checkpoint},
    }
    config = write_yaml(folder / "config.yaml", raw)
    return ["train", str(config), "--model", str(model), "--pairs", str(pairs), "--out"]


def results(out: Path) -> dict[str, Any]:
    rows = [{k: v for k, v in row.items() if k not in TIME} for row in read_metrics(out)]
    files = ("hf/model.safetensors", "eval.json", "ref_logps.npz")
    return {"metrics": rows, **{name: (out / name).read_bytes() for name in files}}


def stop_at(pid: int, metrics: Path, rows: int, number: signal.Signals) -> None:
    """Sends a signal once a run that goes on has cut its metrics and there are so many rows."""
    process, before = os.pidfd_open(pid), metrics.stat().st_ino
    while metrics.stat().st_ino == before or metrics.read_bytes().count(b"\n") < rows:
        assert not select.select([process], [], [], 0.001)[0], "it was over before"
    signal.pidfd_send_signal(process, number)
    os.close(process)


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


def damage(checkpoint: Path) -> None:
    """One bit of the largest file."""
    path = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_was_done_is_not_lost(tmp_path: Path, model_dir: Path, server: Server) -> None:
    job, whole, out, log = write_job(tmp_path, model_dir), tmp_path / "whole", tmp_path / "out", tmp_path / "log"

    def go_on(**hooks: tuple[str, str]) -> int:
        log.write_text("")
        return server.start([*job, str(out)], log, hooks)

    def killed_at(name: str, when: str) -> None:
        go_on(die=(name, when))
        assert server.wait() == -signal.SIGKILL, log.read_text()

    server.start([*job, str(whole)], log)
    assert server.wait() == 0, log.read_text()
    killed_at("ref_logps.npz", "before")
    killed_at("4", "before")  # the first checkpoint is written, and has no name
    assert "reference log-probs: 0/12" not in log.read_text() and steps_of(out) == []
    killed_at("8", "after")  # it counts, and so do its rows
    assert len(read_metrics(out)) >= 8 and steps_of(out) == [4, 8]
    stop_at(go_on(), out / "metrics.jsonl", 9, signal.SIGTERM)
    assert server.wait() == STOPPED, log.read_text()
    assert "which is saved" in log.read_text()
    stopped = steps_of(out)[-1]
    assert 9 <= stopped < UPDATES and read_metrics(out)[-1]["step"] == stopped
    damage(out / "checkpoints" / str(stopped))
    killed_at("hf", "before")
    said = log.read_text()
    assert f"checkpoint of update {stopped} is damaged" in said
    assert "going on from the checkpoint of update 8\n" in said or stopped > 12
    assert not (out / "hf").exists() and steps_of(out)[-1] == UPDATES
    kept = tmp_path / "kept"
    shutil.copytree(out, kept)
    server.start([*job, str(kept)], log)
    assert server.wait() == 0 and results(kept) == results(whole), "what was gone on from is not what was there"
    for step in steps_of(out):
        damage(out / "checkpoints" / str(step))
    go_on()
    assert server.wait() == 0, log.read_text()
    assert "this stage starts again from its first update" in log.read_text()
    assert results(out) == results(whole)
    assert not list(out.rglob("*partial*")) and not list(out.rglob("*tmp*"))


@pytest.mark.slow
def test_two_processes_stop_at_the_same_update(tmp_path: Path, model_dir: Path) -> None:
    """One of them is asked to; both save that update together and end."""
    job, out, port = write_job(tmp_path, model_dir, every_steps="end"), tmp_path / "out", free_port()
    words = ["drift_jax", *job, out, "--set", "train.epochs=200", "--set", "train.master_dtype=float32"]
    own = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id"]
    processes = [start_one([*words, *own, index], 1) for index in range(2)]
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and len(read_metrics(out)) > 3):
        assert time.monotonic() < deadline and processes[0].poll() is None, finish(processes, 1)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    ends = finish(processes, 60)
    assert [code for code, _ in ends] == [STOPPED, STOPPED], ends
    (step,) = steps_of(out)
    assert f"stopped after update {step} of 600, which is saved" in ends[0][1]
    assert [row["step"] for row in read_metrics(out)] == list(range(1, step + 1))
    assert find_damage(out / "checkpoints" / str(step)) is None
    assert (out / "checkpoints" / str(step) / CHECKSUMS_FILE).exists()
    assert json.loads((out / "manifest.json").read_text())["stages"]["train"]["finished"] is None


@pytest.mark.slow
def test_two_processes_that_are_stopped_while_they_sample_go_on(tmp_path: Path, model_dir: Path) -> None:
    """One of them is asked to; both end. What they had drawn is not drawn again, and all is as if nothing had been."""
    raw = {
        "run_dir": "unused",
        "model": {"path": "unused", "compute_dtype": "float32"},
        "data": {"test_rows": 0},
        "sampling": {"max_new_tokens": 100, "batch_size": 2, "compute_dtype": "float32", "max_input_length": 200},
    }
    config, data = write_yaml(tmp_path / "config.yaml", raw), write_dsat(tmp_path / "dsat.jsonl", 160)
    words = ["drift_jax", "sample", config, "--model", model_dir, "--input", data, "--out"]

    def two(out: Path) -> list[Any]:
        own = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id"]
        return [start_one([*words, out, *own, index], 1) for index in range(2)]

    out, whole = tmp_path / "out", tmp_path / "whole"
    alone = start_one([*words, whole], 1)
    processes, deadline = two(out), time.monotonic() + 200
    first = out / "completions.partial.jsonl"
    while not (first.exists() and b"\n" in first.read_bytes()):
        assert time.monotonic() < deadline and processes[0].poll() is None, finish(processes, 1)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    ends = finish(processes, 60)
    assert [code for code, _ in ends] == [STOPPED, STOPPED], ends
    drawn = len(read_completions(first))
    assert 0 < drawn < 80
    ends = finish(two(out), 200)
    assert [code for code, _ in ends] == [0, 0], ends
    assert f"sampling, 1 of 2 hosts: {80 - drawn}/{80 - drawn} rows" in ends[0][1]
    assert [code for code, _ in finish([alone], 200)] == [0]
    assert (out / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert not list(out.glob("*partial*"))
