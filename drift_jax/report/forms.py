"""What the report reads of the files of a run, as types; other keys may stand beside these."""

from __future__ import annotations

from typing import (
    Any,
    NotRequired,  # pydantic needs these on Python 3.11
)

from typing_extensions import TypedDict


class _Model(TypedDict, total=False):
    path: str
    revision: str | None


class _Data(TypedDict, total=False):
    dsat: str | None
    sat: str | None
    seed_train: str | None
    seed_test: str | None


class _Recipe(TypedDict, total=False):
    iterations: int
    method: str
    showcase_prompts: list[str]


class Config(TypedDict):
    """config.yaml"""

    model: NotRequired[_Model]
    data: NotRequired[_Data]
    recipe: NotRequired[_Recipe]
    sampling: NotRequired[dict[str, Any]]
    train: NotRequired[dict[str, Any]]


class Answer(TypedDict):
    """An element of showcase.json."""

    prompt: str
    before: str
    after: str


class Score(TypedDict):
    """A row of scores.*.jsonl and of theory_pairs.jsonl."""

    id: str
    margin: float


class Completion(TypedDict):
    """A row of completions.jsonl."""

    id: str
    sample: int
    text: str


class _DroppedRow(TypedDict):
    id: str
    sample: int
    split: str
    reason: str


class _DroppedRecord(TypedDict):
    id: str
    split: str
    reason: str


class Drops(TypedDict):
    """drops.json"""

    rows: NotRequired[list[_DroppedRow]]
    records: NotRequired[list[_DroppedRecord]]
