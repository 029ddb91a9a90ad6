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


def read_outputs(path: Path, prompts: Sequence[Prompt]) -> tuple[dict[str, str], str | None]:
    """Outputs by prompt id, of rows with `output` (or `text`): one text, or a list of one; and what is left out.

    Rows belong to prompts by their id; where no row has one, by `instruction`, which is the last user turn of one
    prompt alone; where no row has that either, by their place.

    Raises:
      DataError: a row has no output, or it cannot be told to which prompts rows belong.
    """
    rows = read_json(path, "outputs")
    texts, bad = list[str](), list[str]()
    for number, row in enumerate(rows, 1):
        text = next((row[key] for key in _OUTPUT_KEYS if key in row), None)
        text = text[0] if isinstance(text, list) and len(text) == 1 else text
        if not isinstance(text, str):
            bad.append(f"  {path}, row {number}: {' or '.join(_OUTPUT_KEYS)} must be a text, or a list of one")
        texts.append(text if isinstance(text, str) else "")
    if bad:
        raise DataError(f"{len(bad)} of {len(rows)} outputs cannot be used:\n" + "\n".join(bad[:_SHOWN]))
    if (ids := _keys(path, [_id_of(row) or None for row in rows], "id")) is not None:
        return _matched(path, "id", ids, texts, {prompt.id: [prompt.id] for prompt in prompts})
    said = [row["instruction"] if isinstance(row.get("instruction"), str) else None for row in rows]
    if (instructions := _keys(path, said, "instruction")) is not None:
        names: dict[str, list[str]] = {}
        for prompt in prompts:
            names.setdefault(prompt.messages[-1].content, []).append(prompt.id)  # dialogues may end alike
        return _matched(path, "instruction", instructions, texts, names)
    if len(rows) != len(prompts):
        raise DataError(
            f"{path} has {len(rows)} outputs without ids and there are {len(prompts)} prompts: give each row the id of "
            "its prompt, or as many rows as prompts, in their order."
        )
    return {prompt.id: text for prompt, text in zip(prompts, texts, strict=True)}, None


def _keys(path: Path, keys: Sequence[str | None], what: str) -> list[str] | None:
    """The keys, where all rows have one; None where none has. Raises `DataError` where only some have."""
    found = [key for key in keys if key is not None]
    if found and len(found) < len(keys):
        without = [str(number) for number, key in enumerate(keys, 1) if key is None]
        raise DataError(
            f"{len(without)} of {len(keys)} rows of {path} have no {what}, and the others have one: row "
            f"{', '.join(without[:_SHOWN])}. It cannot be told to which prompts they belong: give every row the id of "
            "its prompt."
        )
    return found or None


def _matched(
    path: Path, what: str, keys: Sequence[str], texts: Sequence[str], names: Mapping[str, Sequence[str]]
) -> tuple[dict[str, str], str | None]:
    """Args: `names` has ids of prompts by key; a key of several prompts is of use to none."""
    found, line_of, problems = dict[str, str](), dict[str, int](), list[str]()
    for number, (key, text) in enumerate(zip(keys, texts, strict=True), 1):
        of = names.get(key, ())
        if line_of.setdefault(key, number) != number:
            problems.append(f"  {path}, row {number}: {what} {key!r:.80} is that of row {line_of[key]} too")
        elif len(of) > 1:
            problems.append(f"  {path}, row {number}: {what} {key!r:.80} ends {len(of)} prompts, such as {of[0]!r}")
        elif of:
            found[of[0]] = text
    if problems:
        raise DataError(
            f"{len(problems)} of {len(keys)} outputs cannot be used:\n"
            + "\n".join(problems[:_SHOWN])
            + "\nKeep one row for each prompt, such as those with sample 0, and give it the id of its prompt."
        )
    if not found:
        raise DataError(
            f"none of the {len(keys)} rows of {path} belongs to one of the {sum(map(len, names.values()))} prompts by "
            f"its {what}. Look whether they answer these prompts, and give each row the id of its prompt."
        )
    strange = len(keys) - len(found)
    return found, f"{strange} of {len(keys)} rows of {path} belong to no prompt" if strange else None
