"""`drift sample` from the command line: several completions a prompt, and directories that it must not touch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from drift_jax.data.tokenizer import load_tokenizer
from drift_jax.journal import read_rows
from drift_jax.run_lock import RunLock
from tests.cli_runs import Drift, base, change_config, drift, model_dir  # noqa: F401


def words(base: Path, out: Path) -> list[object]:
    options = ["--model", base / "model", "--input", base / "dsat.jsonl", "--out", out]
    return ["sample", base / "config.yaml", *options]


def rows_by_record(out: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(out / "completions.jsonl"):
        found.setdefault(row["id"], []).append(row)
    return found


def test_of_two_completions_the_likelier_is_chosen(drift: Drift, base: Path) -> None:
    """Sampled, shown, chosen by log-prob, what was cut drawn again; then the same on what was left of it."""
    sampling = {"n": 2, "chooser": "logprob", "on_cut": "resample", "max_new_tokens": 48, "other_speakers": "keep"}
    change_config(base / "config.yaml", sampling=sampling)
    code, out, err = drift(*words(base, base / "out"))
    assert code == 0, err
    shown = [line for line in out.splitlines() if line.startswith("  ")]
    assert (
        shown[0].startswith("  prompt: Tell me a story about number") and "  complaint: That is too short" in shown[1]
    )
    assert "sampling cut ones again: " in out and "/s, done in " in out
    tokenizer = load_tokenizer(base / "model")
    completions = rows_by_record(base / "out")
    for row in (row for rows in completions.values() for row in rows):
        again = any(other["sample"] == row["sample"] + 2 for other in completions[row["id"]])
        assert again == (row["sample"] < 2 and row["finish_reason"] == "length")
        assert row["mean_logp"] < 0 and "token_logps" not in row
        hidden = [i for i in row["token_ids"][:-1] if i in tokenizer.control_ids and not tokenizer.decode([i])]
        assert ("control_token" in row) == bool(hidden) or row["finish_reason"] == "length"
    pairs = read_rows(base / "out/pairs.train.jsonl")
    assert pairs
    for pair in pairs:
        choice, meta = pair["meta"]["chooser"], pair["meta"]
        place = choice["candidates"].index(meta["sample"])
        assert choice["name"] == "logprob" and choice["mean_logp"][place] == max(choice["mean_logp"])
        (row,) = [row for row in completions[meta["id"]] if row["sample"] == meta["sample"]]
        assert (row["finish_reason"], row["text"]) == ("stop", pair["chosen"][0]["content"])
    resume(drift, base)


def resume(drift: Drift, base: Path) -> None:
    """A run stopped among its second draws draws the rest of them, and leaves the same rows."""
    rows = (base / "out/completions.jsonl").read_bytes().splitlines(keepends=True)
    assert any(json.loads(row)["sample"] >= 2 for row in rows)
    kept = [row for i, row in enumerate(rows) if json.loads(row)["sample"] < 2 or i % 2]
    left = base / "left"
    left.mkdir()
    (left / "completions.partial.jsonl").write_bytes(b"".join(reversed(kept)) + rows[0][:30])
    code, out, err = drift(*words(base, left))
    assert code == 0, err
    assert "sampling: 0/0 rows" in out and f"sampling cut ones again: {len(rows) - len(kept)}/" in out
    strip = ("mean_logp",)  # other rows were decoded beside: last digits may differ
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in strip} for row in read_rows(path / "completions.jsonl")]
        for path in (left, base / "out")
    )
    assert ours == theirs


def test_directories_that_are_not_ours(drift: Drift, base: Path) -> None:
    """Of another run that works there, of a file, and of completions that were drawn otherwise."""
    lock = RunLock(base / "busy")
    lock.acquire()
    code, _, err = drift(*words(base, base / "busy"))
    assert code == 2 and "busy is in use by process" in " ".join(err.split())
    assert not (base / "busy/manifest.json").exists()
    lock.release()
    (base / "file").touch()
    code, _, err = drift(*words(base, base / "file"))
    assert code == 2 and err.startswith("error: there can be no directory")
    assert drift(*words(base, base / "out"))[0] == 0
    (base / "other").mkdir()
    shutil.copy(base / "out/completions.jsonl", base / "other")
    change_config(base / "config.yaml", sampling={"seed": 7})
    code, _, err = drift(*words(base, base / "other"))
    assert code == 2 and "holds 16 completions of another policy, input or way of sampling" in " ".join(err.split())
    assert len(read_rows(base / "other/completions.jsonl")) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": {"chooser": "judge", "n": 2}}, "name its server and model in judge.base_url and judge.model"),
        ({"sampling": {"chooser": "longest_within"}}, "sampling.chooser (longest_within) picks one of sampling.n (1)"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    drift: Drift, base: Path, change: dict[str, Any], message: str
) -> None:
    change_config(base / "config.yaml", **change)
    code, _, err = drift(*words(base, base / "out"))
    assert code == 2 and message in " ".join(err.split())
    assert not (base / "out").exists()
