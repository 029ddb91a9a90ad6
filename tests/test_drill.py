"""Failure drills (`scripts/drill.py`): that they see what is lost, and a few of them on a small run."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli_runs import REPO, model_dir, write_yaml  # noqa: F401
from tests.tiny_pairs import write_dsat, write_pairs

sys.path.append(str(REPO / "scripts"))

import drill
from drills import faults, kills
from drills.operations import build_library, fail_operations
from drills.runs import Job, Witness, count_rows, differences, kind_of, snapshot
from drills.server import Server


@pytest.fixture(scope="module")
def job(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    write_dsat(folder / "dsat.jsonl", 12)
    write_pairs(folder / "seed.jsonl", 4)
    raw = {
        "run_dir": "unused",
        "model": {"path": str(model_dir), "compute_dtype": "float32", "remat": "none"},
        "data": {
            "dsat": str(folder / "dsat.jsonl"),
            "seed_train": str(folder / "seed.jsonl"),
            "test_rows": 4,
            "max_length": 96,
            "max_prompt_length": 64,
        },
        "recipe": {"iterations": 1, "seed_epochs": 1},
        "sampling": {"max_new_tokens": 8, "batch_size": 2, "compute_dtype": "float32", "max_input_length": 96},
        "train": {"batch_size": 4, "learning_rate": 1e-3},
        "checkpoint": {"every_steps": 1},
        "export": {"dtype": "float32"},
        "theory": {"every": None},
    }
    return Job(write_yaml(folder / "config.yaml", raw))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where drills keep the uninterrupted run and the compiled programs."""
    return tmp_path_factory.mktemp("drills")


def test_kills_of_a_whole_run_lose_nothing(job: Job, shared: Path) -> None:
    with faults.serving(job, shared / "kills") as (server, whole):
        seconds = float((whole.parent / "seconds").read_text())
        found = kills.kill_and_go_on([server], job, shared / "killed", whole, seconds, 3, random.Random(1))
    summary = drill.summarise([found], seconds, 1)
    assert found.problems == []
    assert found.kills >= 1 and summary["identical"] == summary["kills"] == found.kills
    assert (found.lost, found.doubled) == (0, 0)
    assert not (shared / "killed").exists()  # kept only where something is wrong


def test_file_operations_may_fail(job: Job, shared: Path) -> None:
    """Those at which most hangs: of the journal, a checkpoint, the weights, the manifest."""
    folder = shared / "operations"
    folder.mkdir()
    library = build_library(folder)
    if isinstance(library, str):
        pytest.skip(f"no file operation can be made to fail here: {library}")
    some = {
        ("fsync", "STAGE/completions.partial.jsonl"),
        ("rename", "STAGE/hf"),
        ("rename", "manifest.json"),
        ("write", "STAGE/checkpoints/*/d/*"),
        ("open", "STAGE/hf/tokenizer.json"),
    }
    with faults.serving(job, folder, {"LD_PRELOAD": str(library)}) as (server, whole):
        found = fail_operations(server, job, folder, whole, wanted=some)
    assert found["problems"] == [] and found["not_reached"] == []
    assert found["failed"] == len(some) and found["ends"]["refused"] >= 3


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    """What a run might leave, in little."""
    folder = tmp_path / "run"
    stage = folder / "iter_1"
    (stage / "checkpoints" / "2" / "params").mkdir(parents=True)
    (stage / "checkpoints" / "2" / "params" / "d").write_bytes(b"weights")
    rows = [{"id": f"r{i}", "sample": 0, "text": "x"} for i in range(4)]
    (stage / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"step": step, "loss": 0.7, "tokens_per_second": 12.5} for step in (1, 2)]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (stage / "eval.json").write_text(json.dumps({"preference": {"reference": f"{folder}/seed/hf"}}))
    return folder


def test_a_difference_is_seen_and_time_is_none(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "iter_1" / "eval.json").read_text().replace(str(run), str(other))
    (other / "iter_1" / "eval.json").write_text(text)
    metrics = other / "iter_1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("12.5", "99.0"))
    (other / ".lock").write_text("somebody")
    assert differences(snapshot(run), snapshot(other)) == []
    metrics.write_text(metrics.read_text().replace("0.7", "0.8"))
    (other / "iter_1" / "left.tmp").touch()
    (other / "iter_1" / "checkpoints" / "1").mkdir()
    (other / "iter_1" / "checkpoints" / "1" / "d").touch()
    assert differences(snapshot(run), snapshot(other)) == [
        "iter_1/checkpoints/1",
        "iter_1/left.tmp",
        "iter_1/metrics.jsonl",
    ]


def test_rows_are_counted(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert count_rows(other, run) == (0, 0)
    path = other / "iter_1" / "completions.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[1:], lines[2], lines[2], ""]))
    assert count_rows(other, run) == (1, 2)
    (other / "iter_1" / "metrics.jsonl").unlink()
    assert count_rows(other, run) == (3, 2)


def lines(*names: str) -> str:
    return "".join(json.dumps({"id": name, "sample": 0}) + "\n" for name in names)


@pytest.mark.parametrize(
    ("then", "lost", "doubled"),
    [
        (lines("r0", "r1", "r2", "r3"), 0, 0),
        (lines("r0", "r1", "r1", "r2", "r3"), 0, 1),  # asked for twice
        (lines("r0", "r2", "r3"), 2, 0),  # what was there has gone
        (None, 2, 0),  # begun anew in another file
    ],
    ids=["kept", "twice", "gone", "anew"],
)
def test_a_witness_tells_what_became_of_a_journal(run: Path, then: str | None, lost: int, doubled: int) -> None:
    journal = run / "iter_1" / "completions.partial.jsonl"
    journal.write_text(lines("r0", "r1") + '{"id": "torn')
    witness = Witness(run)
    with journal.open("r+") as file:
        file.truncate(len(lines("r0", "r1")))
        if then is not None:
            file.truncate(0)
            file.write(then)
    journal.unlink()
    said = "going on from the checkpoint of update 2"
    assert witness.ask(said)[:2] == (lost, doubled)


def test_a_witness_wants_the_newest_checkpoint_to_be_used(run: Path) -> None:
    assert Witness(run).ask("going on from the checkpoint of update 2")[:2] == (0, 0)
    assert Witness(run).ask("iter_1/train: finished before, skipped")[:2] == (0, 0)
    lost, _, problems = Witness(run).ask("going on from the checkpoint of update 1")
    assert lost == 1 and "update 2" in problems[0]
    (run / "iter_1" / "hf").mkdir()
    assert Witness(run).ask("")[:2] == (0, 0)  # its stage was over


def test_a_process_that_ends_otherwise_is_no_kill(tmp_path: Path) -> None:
    with Server() as server:
        server.start(["presets", "--no-such-option"], tmp_path / "log")
        assert server.wait(60) == 2 and server.wait(0) is None
        server.start(["--help"], tmp_path / "log")
        while server.wait(0.05) is None:
            pass
        server.start(["doctor"], tmp_path / "log")
        assert server.kill() == -9


def test_kinds() -> None:
    deep = "seed/checkpoints/12.orbax-checkpoint-tmp/params/ocdbt.process_0/d/0123456789abcdef"
    assert kind_of(deep) == "STAGE/checkpoints/*/d/*"
    assert kind_of("iter_2/checkpoints/7/checksums.json") == "STAGE/checkpoints/*/checksums.json"
    assert kind_of("iter_2/checkpoints/7") == "STAGE/checkpoints/*"
    assert kind_of(".manifest.json.4711.tmp") == ".manifest.json.*.tmp" and kind_of("") == ""


@pytest.mark.parametrize("words", [[], ["--faults", "nothing"], ["--kills", "1", "--model", "nowhere"]], ids=str)
def test_what_cannot_be_drilled_is_refused(words: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["drill.py", *words])
    with pytest.raises(SystemExit) as stopped:
        drill.parse_args()
    assert stopped.value.code == 2
