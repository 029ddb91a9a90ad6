"""Reads the files that benchmarks exchange: a JSON array of objects, or one object a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drift_jax.errors import DataError
from drift_jax.reading import parse_json, read_text, why_not_json

Row = dict[str, Any]


def read_value(path: Path) -> Any:
    """The JSON value in a file, or the list of those on its lines.

    Raises:
      DataError: the file cannot be read, or is neither.
    """
    text = read_text(path)
    try:
        return parse_json(text, finite=False)  # upstream writes NaN where a judge gave no number
    except ValueError as error:
        whole = error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # what else ends a line to Python may stand in a text
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line, finite=False))
        except ValueError as error:
            if not rows:  # not even the first line is a value
                raise DataError(f"{path} is not JSON, nor one object a line: {why_not_json(whole)}. Mend it.") from None
            raise DataError(
                f"{path}:{number} is not JSON: {why_not_json(error, in_line=True)}. Mend that line."
            ) from None
    return rows


def read_json(path: Path, what: str) -> list[Row]:
    """Rows that are objects, at least one.

    Raises:
      DataError: as `read_value`, or there are no such rows.
    """
    value = read_value(path)
    value = [value] if isinstance(value, dict) else value  # a file of one line
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{path} must hold {what}: a JSON array of objects, at least one, or one object a line.")
    return value
