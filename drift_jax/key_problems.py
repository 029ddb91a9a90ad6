"""What pydantic has against the keys of a config, in words: a line for each key."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from drift_jax.credentials import found

_MAPPINGS = ("mesh.rules", "vllm.env")  # keys whose value has keys of its own


def list_keys(kind: type) -> tuple[dict[str, type], list[str]]:
    """The sections of a config's dataclass, and every key that it has, dotted."""
    hints = typing.get_type_hints(kind)
    sections = {n: hint for n, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}
    keys: list[str] = []
    for name in hints:
        inner = dataclasses.fields(sections[name]) if name in sections else ()
        keys += [f"{name}.{field.name}" for field in inner] or [name]
    return sections, keys


def describe_keys(error: ValidationError, sections: Mapping[str, type], keys: Sequence[str]) -> list[str]:
    """One line per wrong key.

    Args:
      sections: dataclass of each section.
      keys: all there are, dotted; an unknown one is told which of these, or of the sections, is like it.
    """
    lines: dict[str, None] = {}  # an ordered set: a key of several types has one error for each of them
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"][:2]))
        in_union = len(problem["loc"]) > 2 and isinstance(problem["loc"][2], str) and key not in _MAPPINGS
        if in_union and key in keys:
            section, leaf = key.split(".")
            lines[_union_line(sections[section], key, leaf, problem["input"])] = None
        else:
            lines[_line(problem, (*keys, *sections))] = None
    return list(lines)


def _union_line(section: type, key: str, leaf: str, value: Any) -> str:
    parts = typing.get_args(typing.get_type_hints(section, include_extras=True)[leaf])
    return f"  {key}: must be {' or '.join(map(_in_words, parts))}, found {value!r}."


def _in_words(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is Literal:
        return " or ".join(map(repr, typing.get_args(annotation)))
    return typing.get_args(annotation)[1].description


def _line(error: ErrorDetails, known: Sequence[str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        return f"  {key}: unknown key." + (f" Did you mean {close[0]}?" if close else "")
    if error["type"] in ("missing", "missing_argument"):
        return f"  {key}: this key is required."
    return f"  {key}: {error['msg'].removeprefix('Value error, ')}{found(error['loc'], error['input'])}."
