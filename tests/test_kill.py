"""`drift sample` is killed twenty times, and leaves what an uninterrupted run leaves."""

from __future__ import annotations

import os
import random
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from drift_jax.journal import read_rows
from tests.cli_runs import REPO, model_dir, write_yaml  # noqa: F401
from tests.tiny_pairs import write_dsat

sys.path.append(str(REPO / "scripts"))

from drills.server import Server

RESULTS = ("completions.jsonl", "pairs.train.jsonl", "pairs.test.jsonl", "drops.json")
SAMPLING_KILLS = 14
# One more each at the end of the job: at the renames and removals that finish it.
FINISHING_KILLS = [
    ("completions.jsonl", "before"),
    ("completions.jsonl", "after"),  # merged, and the journal is still there
    ("completions.partial.jsonl", "after"),  # merged, and nothing else says so
    ("drops.json", "before"),
    ("pairs.train.jsonl", "after"),
    ("manifest.json", "before"),
]


@pytest.fixture()
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture()
def job(tmp_path: Path, model_dir: Path) -> list[str]:
    """64 prompts; what is cut by length, which is most of it, is drawn a second time."""
    write_dsat(tmp_path / "dsat.jsonl", 64)
    raw = {
        "run_dir": "unused",
        "model": {"path": "unused", "compute_dtype": "float32"},
        "data": {"test_rows": 8},
        "sampling": {
            "max_new_tokens": 24,
            "batch_size": 2,
            "compute_dtype": "float32",
            "max_input_length": 128,
            "on_cut": "resample",
        },
    }
    config = write_yaml(tmp_path / "config.yaml", raw)
    return ["sample", str(config), "--model", str(model_dir), "--input", str(tmp_path / "dsat.jsonl"), "--out"]


def test_twenty_kills_leave_the_files_of_an_uninterrupted_run(tmp_path: Path, job: list[str], server: Server) -> None:
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    server.start([*job, str(whole)], log)
    assert server.wait() == 0, log.read_text()
    chance, rows_at = random.Random(0), [0]
    for _ in range(SAMPLING_KILLS):
        pid = server.start([*job, str(out)], log)
        wait_and_kill(pid, out / "completions.partial.jsonl", chance)
        assert server.wait() == -signal.SIGKILL, "it was over before it was killed"
        rows_at.append(len(journal_keys(out)))
    for place in FINISHING_KILLS:
        server.start([*job, str(out)], log, {"die": place})
        assert server.wait() == -signal.SIGKILL, place
    server.start([*job, str(out)], log)
    assert server.wait() == 0, log.read_text()
    total = len(read_rows(whole / "completions.jsonl"))
    assert rows_at == sorted(rows_at) and rows_at[-1] < total, "a kill lost rows, or came when all was sampled"
    assert len(set(rows_at)) > SAMPLING_KILLS // 2, f"kills did not hit the middle of sampling: {rows_at}"
    for name in RESULTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path.name for path in out.iterdir()} == {*RESULTS, "manifest.json", ".lock"}
    assert total > 64 and len(read_rows(whole / "pairs.train.jsonl")) > 3  # second draws, and pairs of both


def wait_and_kill(pid: int, journal: Path, chance: random.Random) -> None:
    """SIGKILL at a random moment: while it starts, or some batches and milliseconds after its first row."""
    process = os.pidfd_open(pid)
    seen = size_of(journal)
    batches = chance.choice([0, 1, 2, 4, 5])
    if batches == 0:
        over(process, chance.uniform(0, 1.5))
    while batches and not over(process, 0.0005):
        size = size_of(journal)
        batches -= size > seen
        seen = size
    over(process, chance.uniform(0, 0.02))
    signal.pidfd_send_signal(process, signal.SIGKILL)
    os.close(process)


def over(process: int, seconds: float) -> bool:
    """Waits as long for the process to end, and says whether it has."""
    return bool(select.select([process], [], [], seconds)[0])


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def journal_keys(out: Path) -> list[tuple[str, int]]:
    """Of all rows that were kept; none may be there twice."""
    journal = out / "completions.partial.jsonl"
    keys = [(row["id"], row["sample"]) for row in read_rows(journal, torn=True)] if journal.exists() else []
    assert len(keys) == len(set(keys))
    return keys
