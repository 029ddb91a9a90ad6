"""A JSONL file that rows are appended to while work goes on, so that what was done survives a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

from drift_jax.errors import DataError, StageError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that a stage wrote. Raises `DataError` naming the line that is not JSON."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
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
