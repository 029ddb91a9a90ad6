"""`drift mine` on rows of another format, and where nothing is found: what is said, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli_runs import Drift, drift  # noqa: F401
from tests.mining.test_mine import mine
from tests.mining.utterances import agent, user, write_rows

SAMPLE = Path(__file__).parents[2] / "data/sample/dsat.jsonl"


def test_an_empty_input(drift: Drift, tmp_path: Path) -> None:
    (tmp_path / "wf.jsonl").touch()
    code, _, err = drift("mine", tmp_path / "wf.jsonl", "--format", "wildfeedback", "--out", tmp_path / "out")
    assert code == 2 and "there is no row to mine" in " ".join(err.split())


def test_complaints_are_no_utterances(drift: Drift, tmp_path: Path) -> None:
    words = ("--format", "wildfeedback", "--out", tmp_path / "out")
    code, _, err = drift("mine", SAMPLE, *words)
    said = " ".join(err.split())
    assert code == 2 and f"21 of the first 21 rows in {SAMPLE} cannot be used" in said
    assert "UtteranceId must be an integer of at least 0; the row holds id, prompt" in said
    assert "No row has the fields of --format wildfeedback: is that the right one?" in said
    code, _, err = drift("mine", SAMPLE, "--format", "ultrafeedback", "--out", tmp_path / "out")
    said = " ".join(err.split())
    assert code == 2 and "instruction must be text; the row holds id" in said and "is that the right one?" in said


def test_nothing_but_broken_rows_is_an_error(drift: Drift, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = drift("mine", SAMPLE, "--format", "wildfeedback", "--out", out, "--on-bad-row", "skip")
    said = " ".join(err.split())
    assert code == 2 and f"no record was found: 64 of 64 rows cannot be used, the first of them {SAMPLE}:1: " in said
    assert "another --format than wildfeedback" in said and not (out / "dsat.jsonl").exists()


def test_broken_rows_beside_records_of_one_kind(drift: Drift, tmp_path: Path) -> None:
    rows = [user(0, "a"), agent(1, "b"), user(2, "thanks", sat=True), {"id": 1}]
    path = write_rows(tmp_path / "wf.jsonl", rows)
    stats = mine(drift, path, "--out", tmp_path / "out", "--on-bad-row", "skip")
    assert stats["notes"][-1] == "No DSAT record was found: the reasons in left_out and bad_rows say why."
    card = (tmp_path / "out/README.md").read_text()
    assert "`data.sat: sat.jsonl`" in card and "`data.dsat: dsat.jsonl`" not in card


def test_no_complaint_among_sound_rows_is_no_error(drift: Drift, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "wf.jsonl", [user(0, "a"), agent(1, "b"), user(2, "c")])
    code, out, err = drift("mine", path, "--out", tmp_path / "out", "--format", "wildfeedback")
    assert code == 0 and "mined.html" in out and "use it with" not in out, err
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["rows"]["bad"] == 0 and not sum(file["rows"] for file in stats["files"].values())
