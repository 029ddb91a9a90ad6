"""Prompts of a user's own evaluation, and files of outputs that answer them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_jax.errors import DataError
from drift_jax.evaluation.json_rows import read_json
from drift_jax.records import Message
from drift_jax.row_problems import ROLES

_ID_KEYS = ("id", "session_id")
_OUTPUT_KEYS = ("output", "text", "response", "completion")
_SHOWN = 20


@dataclass(frozen=True)
class Prompt:
    """A dialogue that ends with a user turn; `row` is all of its row."""

    id: str
    messages: tuple[Message, ...]
    row: Mapping[str, Any]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSON array or JSONL: `prompt` is a list of messages or one text; `instruction` is one text.

    The id of a row is `id`, `session_id` or `meta.id`, else a hash of its messages. DSAT records and pairs do as well.

    Raises:
      DataError: rows cannot be used, or two have the same id; all are named.
    """
    rows = read_json(path, "prompts")
    prompts, problems, line_of = list[Prompt](), list[str](), dict[str, int]()
    for number, row in enumerate(rows, 1):
        try:
            messages = _messages(row)
        except ValueError as error:
            problems.append(f"  {path}, row {number}: {error}")
            continue
        name = _id_of(row) or hashlib.sha256(repr(messages).encode()).hexdigest()[:16]
        if line_of.setdefault(name, number) != number:
            problems.append(f"  {path}, row {number}: id {name!r} is already that of row {line_of[name]}")
        prompts.append(Prompt(name, messages, row))
    if problems:
        raise DataError(f"{len(problems)} of {len(rows)} prompts cannot be used:\n" + "\n".join(problems[:_SHOWN]))
    return prompts


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    value = row.get("prompt", row.get("instruction"))
    if isinstance(value, str) and value.strip():
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        raise ValueError("prompt must be a list of messages or a text, or instruction a text")
    messages = []
    for item in value:
        valid = isinstance(item, dict) and item.get("role") in ROLES and isinstance(item.get("content"), str)
        if not valid:
            raise ValueError(
                f"a message needs a role ({', '.join(ROLES)}) and a content, found {json.dumps(item)[:80]}"
            )
        messages.append(Message(item["role"], item["content"]))
    if messages[-1].role != "user":
        raise ValueError("the last message must be the user's")
    return tuple(messages)


def _id_of(row: Mapping[str, Any]) -> str | None:
    for holder in (row, row.get("meta") if isinstance(row.get("meta"), dict) else {}):
        for key in _ID_KEYS:
            if holder and holder.get(key) is not None:
                return str(holder[key])
    return None


def read_outputs(path: Path, prompts: Sequence[Prompt]) -> dict[str, str]:
    """Outputs by prompt id, of rows with `output` (or `text`): one text, or a list of one.

    Rows belong to prompts by their id; where no row has one, by `instruction`, else by their place.

    Raises:
      DataError: a row has no output, or it cannot be told to which prompts rows belong.
    """
    rows = read_json(path, "outputs")
    texts, bad = list[str](), list[str]()
    for number, row in enumerate(rows, 1):
        text = next((row[key] for key in _OUTPUT_KEYS if key in row), None)
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str):
            bad.append(f"  {path}, row {number}: {' or '.join(_OUTPUT_KEYS)} must be a text")
        texts.append(text if isinstance(text, str) else "")
    if bad:
        raise DataError(f"{len(bad)} of {len(rows)} outputs cannot be used:\n" + "\n".join(bad[:_SHOWN]))
    ids = [_id_of(row) for row in rows]
    if all(ids):
        return _matched(path, [str(name) for name in ids], texts, {prompt.id: prompt.id for prompt in prompts})
    if all(isinstance(row.get("instruction"), str) for row in rows):
        names = {prompt.messages[-1].content: prompt.id for prompt in prompts}
        return _matched(path, [row["instruction"] for row in rows], texts, names)
    if len(rows) != len(prompts):
        raise DataError(
            f"{path} has {len(rows)} outputs without ids and there are {len(prompts)} prompts: give each row the id of "
            "its prompt, or as many rows as prompts, in their order."
        )
    return {prompt.id: text for prompt, text in zip(prompts, texts, strict=True)}


def _matched(path: Path, keys: Sequence[str], texts: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    found = {names[key]: text for key, text in zip(keys, texts, strict=True) if key in names}
    if not found:
        raise DataError(f"none of the {len(keys)} rows of {path} belongs to one of the {len(names)} prompts.")
    return found
