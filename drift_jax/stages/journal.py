"""The journals of a stage: on several hosts each process has one of its own, and what is done stands in any of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import (
    Any,
    Literal,
    NotRequired,  # pydantic needs these on Python 3.11
    final,
)

import jax
from typing_extensions import TypedDict

from drift_jax.files import remove_leftovers
from drift_jax.journal import Journal, read_rows

_NAME = "completions.partial"


@final
class Journals:
    """The journal of this process, and the rows that it answers for: its own, and on process 0 those of none."""

    def __init__(self, own: Journal | None, left: Iterable[Path], merged: Path | None = None) -> None:
        self._own, self._left = own, tuple(left)
        rows = read_completions(merged) if merged is not None and merged.exists() else []
        rows += [row for path in self._left for row in read_completions(path, torn=True)] + (own.rows if own else [])
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
            self._own.close()


def open_journals(out_dir: Path, writers: int) -> Journals:
    """The journal of this process under `out_dir`, if it is one of the first `writers`.

    Process 0 also reads what a run with more writers left, and what a run had merged that was stopped before the stage
    counted as finished. Raises `DataError` for a line that is not JSON.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    index = jax.process_index()
    if index == 0:
        remove_leftovers(out_dir)
    if index >= writers:
        return Journals(None, ())
    number = {path: path.name.split(".")[2] for path in sorted(out_dir.glob(f"{_NAME}.*.jsonl"))}
    left = [path for path, text in number.items() if text.isdigit() and int(text) >= writers]
    merged = out_dir / "completions.jsonl" if index == 0 else None
    if merged is not None and merged.exists():
        read_completions(merged)  # before a journal of ours lies there
    own = Journal(out_dir / (f"{_NAME}.{index}.jsonl" if index else f"{_NAME}.jsonl"), _Completion)
    try:
        return Journals(own, left, merged) if index == 0 else Journals(own, ())
    except BaseException:
        own.close()
        raise


class _Completion(TypedDict):
    """A row of completions.jsonl and of its journals."""

    id: str
    sample: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    request: NotRequired[str]
    mean_logp: NotRequired[float]
    control_token: NotRequired[str]


def read_completions(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """Rows as `sample.completion_row` makes them. Arguments and errors as in `journal.read_rows`."""
    return read_rows(path, torn, _Completion)
