"""What the rules of keys work on: the file, strict checks of values, and what a rule says."""

from __future__ import annotations

import functools
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from drift_jax.config import RunConfig
from drift_jax.handbook.keys import Stack


class Refused(Exception):
    """Why a value cannot be translated, and what to do. Collected over a file, raised as one `ConfigError`."""


class Outcome(NamedTuple):
    """What a key of the file does here."""

    settings: Mapping[str, Any]  # our dotted keys
    note: str = ""

    def text(self) -> str:
        """One line for people."""
        settings = ", ".join(f"{key} = {shown(value)}" for key, value in self.settings.items())
        return f"{settings} ({self.note})" if settings and self.note else settings or self.note


@dataclass(frozen=True)
class HandbookFile:
    """A handbook file while it is translated."""

    values: Mapping[Any, Any]  # what is in force: the stack's defaults, then the file's values that are not null
    absent: tuple[str, ...]  # defaults in force whose key the file does not name
    stack: Stack
    devices: int

    def count(self, key: str) -> int:
        """A factor of the batch; 1 where it is wrong, which is reported with its own key."""
        value = self.values[key]
        return value if type(value) is int and value > 0 else 1


Rule = Callable[[Any, HandbookFile], Outcome]


def check(annotation: Any, value: Any) -> Any:
    """The value as that type, nothing converted but whole numbers to floats. Raises `Refused`."""
    return _validate(TypeAdapter(annotation), value)


def fitting(key: str, value: Any) -> Any:
    """The value, checked as our dotted key is. Raises `Refused`."""
    return _validate(_adapter(key), value)


def word(value: Any, words: Mapping[Any, Any]) -> Any:
    """What one of a few words stands for. Raises `Refused` for any other value."""
    if not isinstance(value, str | bool) or value not in words:
        raise Refused(f"must be {' or '.join(map(shown, words))}, found {shown(value)}.")
    return words[value]


def shown(value: Any) -> str:
    """A value as the YAML file has it, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # dates, sets, bytes, a list that holds itself
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _validate(adapter: TypeAdapter, value: Any) -> Any:
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise Refused("; ".join(map(_problem, error.errors())) + ".") from None


def _problem(error: Any) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    return f"{where + ': ' if where else ''}{error['msg']}, found {shown(error['input'])}"


@functools.cache
def _adapter(key: str) -> TypeAdapter:
    section, _, leaf = key.rpartition(".")
    owner = typing.get_type_hints(RunConfig)[section] if section else RunConfig
    return TypeAdapter(typing.get_type_hints(owner, include_extras=True)[leaf])
