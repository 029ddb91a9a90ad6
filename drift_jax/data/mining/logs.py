"""Unlabelled logs -> conversations: WildChat, messages of the OpenAI API, ShareGPT.

A conversation is kept up to the first turn that no record could hold: roles that do not alternate, empty content, a
tool call, a picture. Less than user, assistant, user holds no complaint. What is left out or cut is counted by reason.
Of a row only roles and texts are read, and the flags of its publisher.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, final

from drift_jax.data.mining.config import ModerationRules
from drift_jax.data.mining.dialogue import Conversation, Turn
from drift_jax.data.mining.text_rows import BadRow, name_keys, unpack_cell
from drift_jax.data.mining.wildfeedback import Refuse
from drift_jax.records import Row

_SPEAKERS = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
# format -> key of the list, of a turn's speaker and of its text
_KEYS = {
    "wildchat": ("conversation", "role", "content"),
    "messages": ("messages", "role", "content"),
    "sharegpt": ("conversations", "from", "value"),
}
_ID_KEYS = ("conversation_hash", "conversation_id", "id")
_FLAGS = ("toxic", "redacted")
TOO_SHORT = "no user turn after a reply"


def columns(log_format: str) -> tuple[str, ...]:
    """Top-level keys that are read; nothing else of a row is looked at."""
    return (_KEYS[log_format][0], *_ID_KEYS, *_FLAGS, "openai_moderation")


@final
class Conversations:
    """Reads conversations one after the other; holds one."""

    def __init__(self, log_format: str, moderation: ModerationRules) -> None:
        self.count = 0
        self.left_out: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()  # those that were kept up to a turn
        self._list_key, self._role_key, self._text_key = _KEYS[log_format]
        self._moderation = moderation

    def read(self, source: str, rows: Iterable[tuple[int, Row | BadRow]], refuse: Refuse) -> Iterator[Conversation]:
        """Conversations that may hold a complaint; rows that break the format go to `refuse`."""
        for number, row in rows:
            if isinstance(row, BadRow):
                refuse(source, number, row.why)
                continue
            try:
                reason, turns = self._read_row(row)
            except ValueError as error:
                refuse(source, number, str(error))
                continue
            self.count += 1
            if reason:
                self.left_out[reason] += 1
            else:
                yield Conversation(_identify(source, number, row), tuple(turns))

    def _read_row(self, row: Row) -> tuple[str, list[Turn]]:
        """Why nothing can be used of a row, and its turns otherwise."""
        items = unpack_cell(row.get(self._list_key))
        if not isinstance(items, list):
            raise ValueError(f"{self._list_key} must be a list of turns{name_keys(row)}")
        flag = self._flag(row, items)
        turns: list[Turn] = []
        cut = ""
        for i, item in enumerate(items):
            turn, cut = self._read_turn(item, f"{self._list_key}[{i}]", turns)
            if turn is None:
                break
            turns.append(turn)
        if flag:
            return flag, []
        dialogue = turns[turns[:1] != [] and turns[0].role == "system" :]
        if len(dialogue) < 3:
            return f"{cut} (turn {len(turns) + 1})" if cut and len(turns) < 3 else TOO_SHORT, []
        if cut:
            self.cut[cut] += 1
        return "", turns

    def _read_turn(self, item: Any, where: str, before: list[Turn]) -> tuple[Turn | None, str]:
        """A turn, or why the conversation ends before it."""
        if not isinstance(item, dict) or not isinstance(item.get(self._role_key), str):
            raise ValueError(f"{where} must be an object with {self._role_key} and {self._text_key}")
        role = _SPEAKERS.get(item[self._role_key].lower())
        if role is None:
            return None, "another speaker"
        if item.get("tool_calls") or item.get("function_call"):
            return None, "tool call"
        text = item.get(self._text_key)
        if isinstance(text, list):
            text = _join_parts(text, where)
            if text is None:
                return None, "not text alone"
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{where}.{self._text_key} must be text, found {text!r:.80}")
        if role != _next_role(role, before):
            return None, "roles do not alternate"
        if text is None or not text.strip():
            return None, "empty content"
        return Turn(role, text), ""

    def _flag(self, row: Row, items: list[Any]) -> str:
        """The first flag by which the whole conversation is left out."""
        for flag in _FLAGS:
            if getattr(self._moderation, flag) == "drop" and any(_is_set(holder, flag) for holder in (row, *items)):
                return flag
        verdicts = unpack_cell(row.get("openai_moderation")) or []
        if not isinstance(verdicts, list):
            raise ValueError(f"openai_moderation must be a list, found {verdicts!r:.80}")
        if self._moderation.moderated == "drop" and any(_is_set(verdict, "flagged") for verdict in verdicts):
            return "moderated"
        return ""


def _next_role(role: str, before: list[Turn]) -> str:
    if not before:
        return "system" if role == "system" else "user"
    return "assistant" if before[-1].role == "user" else "user"


def _is_set(holder: Any, flag: str) -> bool:
    """Raises `ValueError` for a flag that is neither true nor false: what was meant must not be guessed."""
    value = holder.get(flag) if isinstance(holder, dict) else None
    if value in ("True", "False"):  # CSV
        return value == "True"
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{flag} must be true or false, found {value!r:.80}")
    return bool(value)


def _join_parts(parts: list[Any], where: str) -> str | None:
    """The text of a message in parts; None where one of them is a picture, a sound or a file."""
    texts = []
    for part in parts:
        if not isinstance(part, dict):
            raise ValueError(f"{where}: a part must be an object, found {part!r:.80}")
        if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts)


def _identify(source: str, number: int, row: Row) -> str:
    """The row's own id, beside its place: ids of published logs are not always unlike each other."""
    own = next((row[key] for key in _ID_KEYS if isinstance(row.get(key), str) and row[key]), "")
    return f"{source}:{number}:{own}" if own else f"{source}:{number}"
