"""What crosses the walls of mining: a conversation as it was logged, and where in it a user complains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turn:
    role: str  # "user" or "assistant" (or "system" in front)
    content: str


@dataclass(frozen=True)
class Conversation:
    id: str  # stable: from the source, or file:row
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Complaint:
    turn: int  # index in turns of the user turn that complains; turns[turn - 1] is the rejected reply
    evidence: dict[str, Any]  # JSON: detector, rule names with version / judge verdict, model, prompt hash
