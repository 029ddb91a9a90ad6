"""What breaks the format in a row of a JSONL file of records (`records.py`), in words; nothing if it is sound."""

from __future__ import annotations

from typing import Any, Literal

Row = dict[str, Any]
LoggedSide = Literal["chosen", "rejected"]  # where the logged reply stands: of SAT, of DSAT records

# Characters of a dialogue's messages, about a million tokens. A tokenizer takes 240 bytes of memory for each.
LONGEST_DIALOGUE = 4 << 20
ROLES = ("system", "user", "assistant")
PAIR_KEYS = ("prompt", "chosen", "rejected")
_ABSENT = object()  # a missing key, which is reported once for the whole row


def logged_keys(side: LoggedSide) -> tuple[str, ...]:
    """What a SAT or DSAT record must have."""
    return ("prompt", side, "user_preference")


def logged_problems(side: LoggedSide, row: Row) -> list[str]:
    """Of a SAT or DSAT record."""
    return (
        _missing(row, logged_keys(side))
        + _prompt_problems(row.get("prompt", _ABSENT))
        + _reply_problems(row.get(side, _ABSENT), side)
        + _message_problems(row.get("user_preference", _ABSENT), "user_preference", "user")
        + _length_problems(row, logged_keys(side))
        + _id_problems(row, "id")
    )


def pair_problems(row: Row) -> list[str]:
    """Of a pair."""
    meta = row.get("meta", {})
    return (
        _missing(row, PAIR_KEYS)
        + _prompt_problems(row.get("prompt", _ABSENT))
        + _reply_problems(row.get("chosen", _ABSENT), "chosen")
        + _reply_problems(row.get("rejected", _ABSENT), "rejected")
        + _length_problems(row, PAIR_KEYS)
        + _id_problems(row, "id")
        + (
            _id_problems(meta, "id", "meta.")
            if isinstance(meta, dict)
            else [f"meta must be an object, found {name_kind(meta)}"]
        )
    )


def _missing(row: Row, keys: tuple[str, ...]) -> list[str]:
    absent = [key for key in keys if key not in row]
    if not absent:
        return []
    return [f"missing {', '.join(absent)}; a row needs {', '.join(keys)}, found {', '.join(row)[:200] or 'none'}"]


def _prompt_problems(prompt: Any) -> list[str]:
    """A prompt is an optional system message, then user and assistant in turn, from user to user."""
    if prompt is _ABSENT:
        return []
    if not isinstance(prompt, list):
        return [f"prompt must be a list of messages, found {name_kind(prompt)}"]
    if not prompt:
        return ["prompt is an empty list; it must end with a user message"]
    problems = [why for i, item in enumerate(prompt) for why in _message_problems(item, f"prompt[{i}]")]
    if problems:
        return problems
    roles = [item["role"] for item in prompt]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if turns != expected or len(turns) % 2 == 0:
        problems.append(
            "prompt roles must be an optional system, then user and assistant in turn, ending with user; "
            f"found {', '.join(roles)[:200]}"
        )
    return problems


def _reply_problems(reply: Any, key: str) -> list[str]:
    if reply is _ABSENT:
        return []
    if not isinstance(reply, list) or len(reply) != 1:
        found = f"a list of {len(reply)}" if isinstance(reply, list) else name_kind(reply)
        return [f"{key} must be a list of one assistant message, found {found}"]
    return _message_problems(reply[0], f"{key}[0]", "assistant")


def _message_problems(message: Any, where: str, role: str | None = None) -> list[str]:
    if message is _ABSENT:
        return []
    if not isinstance(message, dict):
        return [f"{where} must be an object with role and content, found {name_kind(message)}"]
    problems = []
    unknown = sorted(set(message) - {"role", "content"})
    if unknown:
        problems.append(f"{where} may hold role and content only, found also {', '.join(unknown)[:200]}")
    allowed = (role,) if role else ROLES
    if message.get("role") not in allowed:
        problems.append(f"{where}.role must be {' or '.join(allowed)}, found {message.get('role')!r:.80}")
    content = message.get("content")
    if not isinstance(content, str):
        problems.append(f"{where}.content must be a string, found {name_kind(content)}")
    elif not content.strip():
        problems.append(f"{where}.content is empty")
    return problems


def _length_problems(row: Row, keys: tuple[str, ...]) -> list[str]:
    parts = [row.get(key) for key in keys]
    messages = [message for part in parts for message in (part if isinstance(part, list) else [part])]
    texts = [message.get("content") for message in messages if isinstance(message, dict)]
    total = sum(len(text) for text in texts if isinstance(text, str))
    if total <= LONGEST_DIALOGUE:
        return []
    return [f"the messages have {total:,} characters, at most {LONGEST_DIALOGUE:,} are read: this is no dialogue"]


def _id_problems(row: Row, key: str, prefix: str = "") -> list[str]:
    value = row.get(key, "row")
    if (isinstance(value, str) and value.strip()) or type(value) is int:
        return []
    return [f"{prefix}{key} must be a string that is not empty, found {value!r:.80}"]


def name_kind(value: Any) -> str:
    """What a value of JSON is, in words."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return {**names, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
