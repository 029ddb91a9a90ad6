"""Reads WildBench's files: score rows, pairwise rows, published tables, tasks and outputs of models.

Rows are taken as upstream writes them (`parsed_result`, `score`, `model_output`; `winner`, `extent`, `model_outputs`)
and slimmed (`score`, `out_len`, `truncated`). What no number can be made of is counted by reason, never guessed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from drift_jax.errors import DataError
from drift_jax.evaluation.json_rows import read_json
from drift_jax.evaluation.wildbench import CUT_MARK, REFERENCES, Outcome, PairRow, ScoreRow, groups_of, is_empty
from drift_jax.row_problems import ROLES

T = TypeVar("T")

# Choices of the judge: (who wins, how clearly).
CHOICES: Mapping[str, tuple[str, int]] = {
    "A++": ("A", 2),
    "A+": ("A", 1),
    "A=B": ("tie", 0),
    "B+": ("B", 1),
    "B++": ("B", 2),
}


@dataclass(frozen=True)
class Found(Generic[T]):
    """Rows that count, and how many do not, by reason."""

    rows: tuple[T, ...]
    excluded: dict[str, int]


@dataclass(frozen=True)
class Task:
    """One task of WildBench: a dialogue that ends with a user turn, and what the judge looks at."""

    session_id: str
    conversation: tuple[Mapping[str, str], ...]  # role, content
    checklist: tuple[str, ...]
    groups: frozenset[str]
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_score(row: Mapping[str, Any]) -> float:
    """The score of a row. Raises `ValueError` where there is none that is a finite number."""
    value = row.get("score")
    if value is None and isinstance(row.get("parsed_result"), dict):
        value = row["parsed_result"].get("score")
    if value is None or isinstance(value, bool):
        raise ValueError("no score")
    try:
        score = float(value)
    except (OverflowError, TypeError, ValueError):
        raise ValueError("score that is no number") from None
    if not math.isfinite(score):
        raise ValueError("score that is no number")
    return score


def score_rows(rows: Sequence[Mapping[str, Any]]) -> Found[ScoreRow]:
    """Rows of an upstream score file or a slimmed one."""
    found, excluded = [], Counter[str]()
    for row in rows:
        try:
            score = read_score(row)
        except ValueError as error:
            excluded[str(error)] += 1
            continue
        length, cut = _length(row)
        found.append(ScoreRow(str(row.get("session_id", "")), score, length, cut))
    return Found(tuple(found), dict(excluded))


def _length(row: Mapping[str, Any]) -> tuple[int | None, bool]:
    """(length of the output in characters, whether it was cut)."""
    output = row.get("model_output")
    if isinstance(output, list):  # as some of upstream's files have it
        output = output[0] if output else ""
    if isinstance(output, str):
        return 0 if is_empty(output) else len(output), output.endswith(CUT_MARK)
    cut, length = bool(row.get("truncated", False)), row.get("out_len")
    if not isinstance(length, int | float) or isinstance(length, bool) or not abs(length) < 2**53:
        return None, cut
    return int(length), cut


def tested_and_reference(rows: Sequence[Mapping[str, Any]], reference: str | None, source: str) -> tuple[str, str]:
    """Which of the two models of a pairwise file is tested, and which is the reference.

    Args:
      reference: its name or a part of it; None: one of the published references.

    Raises:
      DataError: it cannot be told.
    """
    names = list(dict.fromkeys(str(name) for row in rows for name in row.get("model_outputs") or {}))
    wanted = [reference] if reference else list(REFERENCES)
    matching = [name for name in names if any(part in name for part in wanted)]
    if len(names) == 2 and len(matching) == 1:
        return next(name for name in names if name != matching[0]), matching[0]
    raise DataError(
        f"{source} compares {', '.join(names) or 'no models'}, and {len(matching)} of them match the reference "
        f"({' or '.join(wanted)}): two models are needed, one of them the reference. Name it with --reference."
    )


def pair_rows(rows: Sequence[Mapping[str, Any]], tested: str, reference: str) -> Found[PairRow]:
    """Rows of an upstream pairwise file, from the side of `tested`."""
    found, excluded = [], Counter[str]()
    for row in rows:
        outputs = row.get("model_outputs") or {}
        output, other = outputs.get(tested), outputs.get(reference)
        if not isinstance(output, str) or not isinstance(other, str):
            excluded["an output is missing"] += 1
            continue
        outcome = _outcome(row, tested, reference)
        if outcome is None:
            excluded["no verdict"] += 1
            continue
        usable = not any(text.endswith(CUT_MARK) or is_empty(text) for text in (output, other))
        found.append(PairRow(str(row.get("session_id", "")), outcome, len(output), len(other), usable))
    return Found(tuple(found), dict(excluded))


def _outcome(row: Mapping[str, Any], tested: str, reference: str) -> Outcome | None:
    winner, extent = row.get("winner"), row.get("extent")
    if winner is None and isinstance(row.get("parsed_result"), dict):
        side, extent = CHOICES.get(str(row["parsed_result"].get("choice")), (None, None))
        winner = {"A": row.get("model_A"), "B": row.get("model_B"), "tie": "tie"}.get(side or "")
    if winner == "tie":
        return "tie"
    if winner == tested:
        return {2: "win_much", 1: "win"}.get(extent)  # pyright: ignore[reportArgumentType, reportReturnType]
    if winner == reference:
        return {2: "lose_much", 1: "lose"}.get(extent)  # pyright: ignore[reportArgumentType, reportReturnType]
    return None


def open_tasks(path: Path | None) -> list[Task]:
    """Tasks of a file, or of the hub: None, or `hub` where no such file is. Raises `DataError`."""
    return hub_tasks() if path is None or (str(path) == "hub" and not path.exists()) else load_tasks(path)


def load_tasks(path: Path) -> list[Task]:
    """Tasks of a local file in the schema of the hub's `allenai/WildBench`, configuration v2.

    Raises:
      DataError: the file, or rows of it, cannot be used; all of them are named.
    """
    return build_tasks(read_json(path, "a list of WildBench tasks"), str(path))


def hub_tasks() -> list[Task]:
    """Tasks of the hub's dataset. Raises `DataError` where the hub cannot be reached."""
    import datasets

    try:
        rows = datasets.load_dataset("allenai/WildBench", "v2", split="test")
    except Exception as error:  # what the library raises without a network differs from version to version
        raise DataError(
            f"the tasks of WildBench cannot be had from the hub ({type(error).__name__}: {str(error)[:300]}). Give a "
            "file in their schema with --tasks."
        ) from error
    return build_tasks([dict(row) for row in rows], "allenai/WildBench")


def build_tasks(rows: Sequence[Mapping[str, Any]], source: str) -> list[Task]:
    """Raises `DataError` as `load_tasks`."""
    tasks, problems = [], []
    for number, row in enumerate(rows, 1):
        try:
            tasks.append(_task(row))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            problems.append(f"  {source}, task {number}: {type(error).__name__}: {error}")
    doubled = [name for name, count in Counter(task.session_id for task in tasks).items() if count > 1]
    problems += [f"  {source}: session_id {name!r} is there more than once" for name in doubled]
    if problems or not tasks:
        shown = "\n".join(problems[:20]) or "  it has no rows"
        raise DataError(
            f"{len(problems)} of {len(rows)} tasks cannot be used:\n{shown}\nA task has session_id, "
            "conversation_input (role, content), checklist, primary_tag and secondary_tags, as in allenai/WildBench v2."
        )
    return tasks


_KEYS = ("session_id", "conversation_input", "checklist", "primary_tag", "secondary_tags")


def _task(row: Mapping[str, Any]) -> Task:
    conversation = tuple({"role": turn["role"], "content": turn["content"]} for turn in row["conversation_input"])
    if not conversation or conversation[-1]["role"] != "user":
        raise ValueError("conversation_input must end with a user turn")
    if not all(isinstance(turn["content"], str) and turn["role"] in ROLES for turn in conversation):
        raise ValueError(f"the content of a turn must be a string, its role one of {', '.join(ROLES)}")
    tags = row["primary_tag"], row["secondary_tags"]
    if not isinstance(tags[1], list) or not all(isinstance(tag, str) for tag in (tags[0], *tags[1])):
        raise ValueError("primary_tag must be a string, secondary_tags a list of strings")
    return Task(
        session_id=str(row["session_id"]),
        conversation=conversation,
        checklist=tuple(map(str, row["checklist"])),
        groups=groups_of(*tags),
        extra={key: value for key, value in row.items() if key not in _KEYS},
    )
