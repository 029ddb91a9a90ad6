"""Rows in the published columns of WildFeedback, written short; and a stub detector for logs without labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from pydantic import ConfigDict

from drift_jax.config import JudgeConfig
from drift_jax.data.mining.dialogue import Complaint, Conversation

NAMES = {"dsat": "Disatisfaction", "sat": "Satisfaction", "preceding": "Preceeding"}


def user(place: int, text: str | None, preceding: str | None = "YES", **labels: Any) -> dict[str, Any]:
    """A user row; without labels both are false."""
    row = {"UtteranceId": place, "TurnId": place // 2 + 1, "Role": "User", "Content": text, "Preceeding": preceding}
    row |= {"Satisfaction": False, "Disatisfaction": False} | {NAMES[key]: value for key, value in labels.items()}
    return row | {"Satisfaction-Justificiation": None, "Dissatisfaction-Justificiation": None, "State": None}


def agent(place: int, text: str | None) -> dict[str, Any]:
    return user(place, text, preceding=None, dsat=None, sat=None) | {"Role": "Agent"}


def without(row: dict[str, Any], *columns: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in columns}


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_file(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- a stub in the place of the detectors -------------------------------------------------------------------


@dataclass(frozen=True)
class StubConfig:
    """The keys that the command line knows of."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["rules", "judge", "both"] = "rules"
    rules: tuple[str, ...] = ("stub",)
    requests_per_minute: float | None = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)


class StubDetector:
    """Complaints are user turns that begin with "No,"."""

    def __init__(self) -> None:
        self.count = 0

    def find(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, list[Complaint]]]:
        for conversation in conversations:
            turns = enumerate(conversation.turns)
            found = [i for i, turn in turns if i > 1 and turn.role == "user" and turn.content.startswith("No,")]
            self.count += len(found)
            yield conversation, [Complaint(i, {"detector": "stub", "rules": ["no@1"]}) for i in found]

    def stats(self) -> dict[str, Any]:
        return {"complaints": self.count}

    def status(self) -> str:
        return f"{self.count} complaints"

    def close(self) -> None:
        pass


@pytest.fixture()
def stub_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    """`drift mine` finds this detector where the real ones are looked for."""
    names = {"DetectorConfig": StubConfig, "build_detector": lambda config, journal: StubDetector()}
    for name in ("detect", "detector_config"):
        module = ModuleType(f"drift_jax.data.mining.{name}")
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, module.__name__, module)
