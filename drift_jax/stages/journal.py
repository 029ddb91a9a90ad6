"""JSONL files that rows are appended to while work goes on, so that what was done survives a crash.

On several hosts each process has a journal of its own. What is done is what stands in any of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

import jax

from drift_jax.errors import DataError, StageError


def read_rows(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """Rows of a file that a stage wrote. Raises `DataError` naming the line that is not JSON.

    Args:
      torn: whether the last line may be unfinished, and is then passed over.
    """
    rows = []
    text = path.read_text(encoding="utf-8")
    if torn:
        text = text[: text.rfind("\n") + 1]
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} is not JSON ({error}). Remove the file to make it again.") from None
    return rows


@final
class Journal:
    """Rows on disk, one line each. A torn last line (the process was killed while writing) is cut off on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            whole = path.read_bytes()
            kept = whole[: whole.rfind(b"\n") + 1]
            if len(kept) < len(whole):
                os.truncate(path, len(kept))
        self.rows: list[dict[str, Any]] = read_rows(path) if path.exists() else []
        self._file = path.open("a", encoding="utf-8")

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes and flushes. Raises `StageError` when the disk is full; what was appended before stays."""
        try:
            for row in rows:
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise StageError(
                f"cannot write {self.path}: {error}. Free space and run again; it goes on from here."
            ) from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


_NAME = "completions.partial"


@final
class Journals:
    """The journal of this process, and the rows that it answers for: its own, and on process 0 those of none."""

    def __init__(self, own: Journal | None, left: Iterable[Path], merged: Path | None = None) -> None:
        self._own, self._left = own, tuple(left)
        rows = read_rows(merged) if merged is not None and merged.exists() else []
        rows += [row for path in self._left for row in read_rows(path, torn=True)] + (own.rows if own else [])
        self.rows = {(row["id"], row["sample"]): row for row in rows}

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keeps rows, by (id, sample), and writes them where this process has a journal. Raises `StageError`."""
        if self._own is not None:
            rows = list(rows)
            self._own.append(rows)
            self.rows.update({(row["id"], row["sample"]): row for row in rows})

    def remove(self) -> None:
        """Removes the journals, those that other processes left to this one included."""
        for path in (*self._left, *([self._own.path] if self._own else ())):
            path.unlink(missing_ok=True)

    def __enter__(self) -> Journals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own is not None:
            self._own.__exit__(kind, error, trace)


def open_journals(out_dir: Path, writers: int) -> Journals:
    """The journal of this process under `out_dir`, if it is one of the first `writers`.

    Process 0 also reads what a run with more writers left, and what a run had merged that was stopped before the stage
    counted as finished. Raises `DataError` for a line that is not JSON.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    index = jax.process_index()
    if index >= writers:
        return Journals(None, ())
    number = {path: path.name.split(".")[2] for path in sorted(out_dir.glob(f"{_NAME}.*.jsonl"))}
    left = [path for path, text in number.items() if text.isdigit() and int(text) >= writers]
    own = Journal(out_dir / (f"{_NAME}.{index}.jsonl" if index else f"{_NAME}.jsonl"))
    return Journals(own, left, out_dir / "completions.jsonl") if index == 0 else Journals(own, ())
