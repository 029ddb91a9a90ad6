"""Scripts on mining, in a clone that has nothing beside it and from another working directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_runs import REPO
from tests.mining.utterances import read_file, write_rows


@pytest.fixture()
def clone(tmp_path: Path) -> Path:
    """What a clone of the repository has of it; the package is that of this environment."""
    folder = tmp_path / "alone" / "clone"
    (folder / "scripts").mkdir(parents=True)
    (folder / "data" / "sample").mkdir(parents=True)
    for name in ("scripts/make_wildfeedback.py", "scripts/detector_quality.py", "data/sample/dsat.jsonl"):
        shutil.copyfile(REPO / name, folder / name)
    return folder


def call(script: Path, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_a_clone_makes_logs_of_its_own_sample(clone: Path, tmp_path: Path) -> None:
    script, sample = clone / "scripts/make_wildfeedback.py", clone / "data/sample/dsat.jsonl"
    done = call(script, "--out", "a.jsonl", "--mb", 2, "--kb", 18, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"source: {sample}\n" and json.loads(done.stdout)["out"] == "a.jsonl"
    rows = read_file(tmp_path / "a.jsonl")
    assert {row["Role"] for row in rows} == {"User", "Agent"} and any(row.get("Disatisfaction") for row in rows)


def test_logs_are_made_of_the_file_beside_it_or_of_a_given_one(clone: Path, tmp_path: Path) -> None:
    script, sample = clone / "scripts/make_wildfeedback.py", clone / "data/sample/dsat.jsonl"
    beside = clone.parent / "shared/data/dsat_real.jsonl"
    beside.parent.mkdir(parents=True)
    shutil.copyfile(sample, beside)
    assert call(script, "--out", "a", "--mb", 0.1, cwd=tmp_path).stderr == f"source: {beside}\n"
    assert call(script, "--out", "b", "--mb", 0.1, "--source", sample, cwd=tmp_path).stderr == f"source: {sample}\n"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    done = call(script, "--out", "c", "--mb", 0.1, "--source", "none.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "none.jsonl is not there" in done.stderr and "--source" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "c").exists()


def test_a_clone_is_told_what_quality_is_measured_on(clone: Path, tmp_path: Path) -> None:
    script = clone / "scripts/detector_quality.py"
    done = call(script, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and f"{clone.parent / 'shared/data/dsat_real.jsonl'} is not there" in line
    assert "as FILE" in line and not done.stdout


def test_quality_is_measured_on_a_given_file(clone: Path, tmp_path: Path) -> None:
    script, rows = clone / "scripts/detector_quality.py", read_file(clone / "data/sample/dsat.jsonl")
    done = call(script, clone / "data/sample/dsat.jsonl", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and f"row '{rows[0]['id']}' has no text in signal" in line
    more = [{"role": "assistant", "content": "So."}, {"role": "user", "content": "And what else?"}]
    rows = [row | {"signal": "explicit", "prompt": [*row["prompt"], *more]} for row in rows]
    write_rows(tmp_path / "mine.jsonl", rows)
    done = call(script, "mine.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["all"]["turns"]["explicit"] == len(rows)
    write_rows(tmp_path / "mine.jsonl", [row | {"group": "one"} for row in rows])
    done = call(script, "mine.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "lacks complaints, or ordinary turns after a reply" in done.stderr
