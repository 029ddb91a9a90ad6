"""Reads the files that benchmarks exchange: a JSON array of objects, or one object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drift_jax.errors import DataError

Row = dict[str, Any]


def read_value(path: Path) -> Any:
    """The JSON value in a file, or the list of those on its lines.

    Raises:
      DataError: the file cannot be read, or is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.object[error.start]:#x} at {error.start}.") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            raise DataError(f"{path} is not JSON, nor one object a line: {error.msg} at line {error.lineno}.") from None


def read_json(path: Path, what: str) -> list[Row]:
    """Rows that are objects, at least one.

    Raises:
      DataError: as `read_value`, or there are no such rows.
    """
    value = read_value(path)
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{path} must hold {what}: a JSON array of objects, at least one, or one object a line.")
    return value
