"""A journal survives what kills its writer: torn lines, full disks, a second process."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drift_jax import journal as journals
from drift_jax.errors import DataError, StageError
from drift_jax.files import write_json
from drift_jax.journal import Journal, read_rows
from drift_jax.stages.journal import open_journals
from tests.cli_runs import REPO

ROWS: list[dict[str, Any]] = [{"id": f"r{i}", "sample": 0, "text": f"größer 🙂 \u2028 第{i}"} for i in range(3)]


def test_a_line_that_was_torn_anywhere_is_cut_off(tmp_path: Path) -> None:
    """At every byte, also between the bytes of one character."""
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append(ROWS)
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for end in range(second, len(whole)):
        path.write_bytes(whole[:end])
        kept = ROWS[: whole[:end].count(b"\n")]
        assert read_rows(path, torn=True) == kept
        with Journal(path) as journal:
            assert journal.rows == kept
            journal.append(ROWS[len(kept) :])
        assert path.read_bytes() == whole


def test_a_broken_line_in_the_midst_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": "b\n{"id": "c"}\n')
    with pytest.raises(DataError, match=r"j\.jsonl:2 is not JSON"):
        Journal(path)
    path.write_bytes(b'{"id": "a"}\n{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"j\.jsonl:2 is not JSON"):
        Journal(path)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append(ROWS[:1])
        with monkeypatch.context() as patch:
            patch.setattr(journals.os, "fsync", full)
            with pytest.raises(StageError, match=r"cannot write .*No space left.*it goes on from here"):
                journal.append(ROWS[1:])
        assert read_rows(tmp_path / "j.jsonl") == ROWS[:1]
        journal.append(ROWS[1:])
    assert read_rows(tmp_path / "j.jsonl") == ROWS


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), "half \ud83d"])
def test_what_json_cannot_hold_does_not_spoil_the_file(tmp_path: Path, value: Any) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append(ROWS[:1])
        with pytest.raises(
            StageError, match=r"cannot write .*j\.jsonl: a row holds what JSON cannot .*goes on from here"
        ):
            journal.append([ROWS[1], {"id": value}])
        journal.append(ROWS[1:])
    assert read_rows(tmp_path / "j.jsonl") == ROWS


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    script = (
        "import sys; from pathlib import Path; from drift_jax.journal import Journal\n"
        f"journal = Journal(Path({str(path)!r})); print('open', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    with pytest.raises(StageError, match=r"j\.jsonl is being written by another process"):
        Journal(path)
    other.kill()
    other.communicate()
    with Journal(path) as journal:
        journal.append(ROWS)


def test_temporary_files_of_a_killed_writer_go(tmp_path: Path) -> None:
    for name in (".completions.jsonl.123.tmp", ".keep.tmp", "completions.jsonl.1.tmp"):
        (tmp_path / name).write_text("x")
    with open_journals(tmp_path, 1):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {".keep.tmp", "completions.jsonl.1.tmp", "completions.partial.jsonl"}
    write_json(tmp_path / "a.json", 1)
    assert json.loads((tmp_path / "a.json").read_text()) == 1
