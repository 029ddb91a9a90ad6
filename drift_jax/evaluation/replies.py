"""Replies of several methods, from whatever files they are in: completions and pairs of a run, outputs of a model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_jax.errors import ConfigError, DataError
from drift_jax.evaluation.json_rows import read_value
from drift_jax.evaluation.prompts import Prompt
from drift_jax.reading import split_name

_TEXT_KEYS = ("text", "output", "response", "completion", "chosen")
_ID_KEYS = ("id", "session_id")
_FILES = ("completions.jsonl", "model_outputs.json")  # of a folder, the first that is there
_SHOWN = 20


@dataclass(frozen=True)
class Reply:
    """`prompt`: what identifies it among files; `messages`: the dialogue, empty where no file holds it."""

    method: str
    prompt: str
    sample: int
    text: str
    messages: tuple[dict[str, str], ...]
    row: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.method, self.prompt, self.sample, self.text


def name_sources(given: Sequence[str]) -> dict[str, Path]:
    """Name -> file, of `[NAME=]PATH`; a path may be a run (its last iteration), a stage, or a folder with outputs.

    Raises:
      ConfigError: names are not unique.
      DataError: a folder has no replies.
    """
    found: dict[str, Path] = {}
    for source in given:
        name, path = split_name(source)
        file = _file_of(path)
        name = name or _name_of(path)
        if name in found:
            raise ConfigError(f"two methods are called {name}: name them, as in NAME={path}.")
        found[name] = file
    return found


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    iterations = sorted((p for p in path.glob("iter_*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
    for folder in (path, *reversed(iterations)):
        for file in _FILES:
            if (folder / file).is_file():
                return folder / file
    raise DataError(f"{path} has no replies: a run with completions.jsonl in an iteration, or {_FILES[1]}, is needed.")


def _name_of(path: Path) -> str:
    parts = path.absolute().parts
    if path.is_dir() or parts[-1] in _FILES:
        parts = parts if path.is_dir() else parts[:-1]
        return "-".join(parts[-2:]) if parts[-1].startswith("iter_") else parts[-1]
    return path.stem


def read_replies(name: str, path: Path, prompts: Mapping[str, Prompt]) -> tuple[list[Reply], int]:
    """Replies of a method, and how many rows had nothing but spaces in them.

    Args:
      prompts: dialogues by id, for rows that have none.

    Raises:
      DataError: rows have no reply, or the same prompt and sample twice; all are named.
    """
    value = read_value(path)
    rows = value if isinstance(value, list) else [value]  # JSONL of one line is an object
    replies, problems, empty = list[Reply](), list[str](), 0
    lines: dict[tuple[str, int], int] = {}
    seen: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        text = _text_of(row) if isinstance(row, dict) else None
        if text is None:
            problems.append(f"  {path}, row {number}: none of {', '.join(_TEXT_KEYS)} is a text or one message")
            continue
        messages, known = _messages_of(row), _id_of(row)
        prompt = known or _hash(messages) or f"row {number}"
        sample = row["sample"] if isinstance(row.get("sample"), int) else seen[prompt]
        seen[prompt] += 1
        if lines.setdefault((prompt, sample), number) != number:
            problems.append(f"  {path}, row {number}: {prompt!r}, sample {sample} is row {lines[prompt, sample]} too")
        if not text.strip():
            empty += 1
            continue
        if not messages and prompt in prompts:
            messages = tuple({"role": m.role, "content": m.content} for m in prompts[prompt].messages)
        replies.append(Reply(name, prompt, sample, text, messages, row))
    if problems:
        raise DataError(f"{len(problems)} of {len(rows)} replies cannot be used:\n" + "\n".join(problems[:_SHOWN]))
    if not replies:
        raise DataError(f"{path}: all {len(rows)} replies are empty.")
    return replies, empty


def keep_common(replies: Sequence[Reply]) -> tuple[list[Reply], dict[str, int]]:
    """Replies to prompts that all methods have replies to, and of each method how many are left out.

    Raises:
      DataError: there is no such prompt.
    """
    methods = dict.fromkeys(reply.method for reply in replies)
    of = {method: {reply.prompt for reply in replies if reply.method == method} for method in methods}
    common = set.intersection(*of.values())
    if not common:
        raise DataError(
            "no prompt has replies of all methods: rows belong together by id, session_id or meta.id, else by their "
            "prompt or instruction. Give them common ids, or --set prompts=all to compare replies to other prompts."
        )
    left = {method: sum(r.method == method and r.prompt not in common for r in replies) for method in methods}
    return [reply for reply in replies if reply.prompt in common], left


def _text_of(row: Mapping[str, Any]) -> str | None:
    for key in _TEXT_KEYS:
        value = row.get(key)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return None


def _messages_of(row: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    value = row.get("prompt", row.get("instruction"))
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return tuple({"role": str(m.get("role")), "content": str(m.get("content"))} for m in value)
    return ()


def _id_of(row: Mapping[str, Any]) -> str | None:
    meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
    return next((str(holder[k]) for holder in (row, meta or {}) for k in _ID_KEYS if holder.get(k) is not None), None)


def _hash(messages: Sequence[Mapping[str, str]]) -> str | None:
    if not messages:
        return None
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True).encode()).hexdigest()[:16]
