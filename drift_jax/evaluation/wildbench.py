"""WildBench's numbers (github.com/allenai/WildBench, v2): WB-Score, WB-Reward, their categories and task macros.

Upstream's definitions, to the last detail:

1. `score` is the mean over all rows, `adjusted_score` (mean - 5) * 2.
2. Categories leave out rows that were cut ("... (truncated)") and empty ones, and so does `avg_len`. A row counts once
   in every group of its primary and secondary tags.
3. The macro divides by the weights of all five groups, also where a group has no row.
4. A reward is of the tested model: 1, 0.5, 0, -0.5, -1. With a length penalty K >= 0 a slight win or loss is a tie
   where the winner's output is more than K characters longer.
5. Rows with an output that was cut or is empty leave the counts and stay in the denominator of `reward`; in the
   categories they leave both.
6. The mix is the mean over the references; a model that has no rows against one of them (itself) has 0 there.

What upstream would crash on (a row without a score, a winner that is neither model) is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from drift_jax.evaluation.intervals import mean_interval

T = TypeVar("T")
Outcome = Literal["win_much", "win", "tie", "lose", "lose_much"]
Tags = Mapping[str, frozenset[str]]  # session id -> groups

TASK_GROUPS: Mapping[str, str] = {
    "Information seeking": "Information/Advice seeking",
    "Advice seeking": "Information/Advice seeking",
    "Creative Writing": "Creative Tasks",
    "Editing": "Creative Tasks",
    "Brainstorming": "Creative Tasks",
    "Role playing": "Creative Tasks",
    "Others": "Creative Tasks",
    "Coding & Debugging": "Coding & Debugging",
    "Reasoning": "Planning & Reasoning",
    "Planning": "Planning & Reasoning",
    "Math": "Math & Data Analysis",
    "Data Analysis": "Math & Data Analysis",
}
WEIGHTS: Mapping[str, float] = {
    "Creative Tasks": 0.5,
    "Planning & Reasoning": 1.25,
    "Math & Data Analysis": 1.0,
    "Information/Advice seeking": 0.75,
    "Coding & Debugging": 1.25,
}
OUTCOMES: Mapping[Outcome, float] = {"win_much": 1.0, "win": 0.5, "tie": 0.0, "lose": -0.5, "lose_much": -1.0}
# The references of the published tables, and what their columns are called.
REFERENCES: Mapping[str, str] = {
    "gpt-4-turbo-2024-04-09": "gpt4t",
    "claude-3-haiku-20240307": "haiku",
    "Llama-2-70b-chat-hf": "llama",
}
LENGTH_PENALTY = 500  # characters
CUT_MARK = "... (truncated)"
EMPTY_TEXT = "[This model response is empty.]"  # what upstream writes in place of an empty output of a pair


def is_empty(output: str) -> bool:
    """In either form that files have."""
    return output.strip() in ("", EMPTY_TEXT)


@dataclass(frozen=True)
class ScoreRow:
    """The judge's score of one output. `length` in characters; None where the row does not say it."""

    session_id: str
    score: float
    length: int | None
    cut: bool

    @property
    def usable(self) -> bool:
        """Whether it counts for categories and lengths."""
        return not self.cut and self.length != 0


@dataclass(frozen=True)
class PairRow:
    """A verdict from the tested model's side, before the length penalty. Lengths in characters."""

    session_id: str
    outcome: Outcome
    length: int
    reference_length: int
    usable: bool  # neither output was cut or is empty

    def penalised(self, k: int) -> Outcome:
        """The outcome with length penalty `k`; below 0 there is none."""
        if k >= 0 and self.outcome == "win" and self.length > self.reference_length + k:
            return "tie"
        if k >= 0 and self.outcome == "lose" and self.reference_length > self.length + k:
            return "tie"
        return self.outcome


def groups_of(primary: str, secondary: Sequence[str]) -> frozenset[str]:
    """The groups of a task. Raises `KeyError` for a tag that upstream does not know."""
    return frozenset(TASK_GROUPS[tag] for tag in (primary, *secondary))


def macro(by_group: Mapping[str, float]) -> float:
    """The weighted mean over the groups."""
    return sum(WEIGHTS[group] * value for group, value in by_group.items()) / sum(WEIGHTS.values())


def adjusted(score: float) -> float:
    """A mean score from 1 to 10 as the tables show it, so that 5 is 0."""
    return (score - 5) * 2


def score_table(model: str, rows: Sequence[ScoreRow], tags: Tags | None) -> dict[str, Any]:
    """The row of `score.json` for a model; what needs the tasks' tags is None without them.

    `score_interval` holds 95 % of Student's t around `score`.
    """
    scores = [row.score for row in rows]
    mean = _mean(scores)
    usable = [row for row in rows if row.usable]
    by_group: dict[str, list[float]] = {}
    for row in usable:
        for group in (tags or {}).get(row.session_id, ()):
            by_group.setdefault(group, []).append(row.score)
    categories = {group: adjusted(sum(found) / len(found)) for group, found in _ordered(by_group).items()}
    interval = mean_interval(scores)
    return {
        "model": model,
        "score": mean,
        "adjusted_score": None if mean is None else adjusted(mean),
        "task_macro_score": macro(categories) if categories else None,
        "adjusted_task_macro_score": macro(categories) if categories else None,
        "task_categorized_scores": categories if tags is not None else None,
        "total": len(rows),
        "avg_len": _mean([row.length for row in usable if row.length is not None]),
        "score_interval": None if interval is None else list(interval),
        "truncated": sum(row.cut for row in rows),
        "empty": sum(row.length == 0 for row in rows),
    }


def reward_table(model: str, rows: Sequence[PairRow], tags: Tags | None, k: int = LENGTH_PENALTY) -> dict[str, Any]:
    """The row of `pairwise-REFERENCE-K=k.json` for a model; `reward_interval` as in `score_table`."""
    usable = [row for row in rows if row.usable]
    outcomes: list[Outcome] = [row.penalised(k) for row in usable]
    counts = _count(outcomes)
    by_group: dict[str, list[Outcome]] = {}
    for row, outcome in zip(usable, outcomes, strict=True):
        for group in (tags or {}).get(row.session_id, ()):
            by_group.setdefault(group, []).append(outcome)
    results = {group: _count(found) for group, found in _ordered(by_group).items()}
    values = [OUTCOMES[outcome] for outcome in outcomes] + [0.0] * (len(rows) - len(usable))
    interval = mean_interval(values)
    table = {
        "model": model,
        **counts,
        "total": len(rows),
        "avg_len": _mean([row.length for row in usable]),
        "task_categorized_results": results if tags is not None else None,
    }
    return rewards_of_counts(table) | {"K": k, "reward_interval": None if interval is None else list(interval)}


def rewards_of_counts(table: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a published table with its rewards computed anew from its counts."""
    by_group = table.get("task_categorized_results")
    rewards = {g: _reward(c, sum(c[name] for name in OUTCOMES)) for g, c in (by_group or {}).items()}
    known = {group: value for group, value in rewards.items() if value is not None}
    return dict(table) | {
        "task_categorized_rewards": known if by_group is not None else None,
        "reward": _reward(table, table["total"]),
        "task_macro_reward": macro(known) if known else None,
    }


def mix_rewards(tables: Mapping[str, Mapping[str, Mapping[str, Any]]], k: int) -> dict[str, dict[str, float]]:
    """The rewards against several references, x100, as `all_stat_wildbench.K.json` names them.

    Args:
      tables: reference -> model -> row of `reward_table`.
    """
    models = dict.fromkeys(model for table in tables.values() for model in table)
    mixed: dict[str, dict[str, float]] = {}
    for model in models:
        found = {name: table.get(model, {}) for name, table in tables.items()}
        rewards = {name: 100 * (row.get("reward") or 0.0) for name, row in found.items()}
        macros = {name: 100 * (row.get("task_macro_reward") or 0.0) for name, row in found.items()}
        mixed[model] = {
            **{f"{name}_reward.K={k}": value for name, value in rewards.items()},
            **{f"{name}_reward.task_macro.K={k}": value for name, value in macros.items()},
            f"mixture_of_rewards.K={k}": sum(rewards.values()) / len(rewards),
            f"task_macro_reward.K={k}": sum(macros.values()) / len(macros),
        }
        for group in WEIGHTS:
            values = [100 * (row.get("task_categorized_rewards") or {}).get(group, 0.0) for row in found.values()]
            mixed[model][f"mixture_of_rewards.{group}.K={k}"] = sum(values) / len(values)
    return mixed


def _reward(counts: Mapping[Any, Any], total: int) -> float | None:
    return sum(value * counts[name] for name, value in OUTCOMES.items()) / total if total else None


def _count(outcomes: Sequence[Outcome]) -> dict[Outcome, int]:
    return {name: sum(outcome == name for outcome in outcomes) for name in OUTCOMES}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _ordered(by_group: Mapping[str, list[T]]) -> dict[str, list[T]]:
    """In the order of `WEIGHTS`, so that files do not depend on the order of a set."""
    return {group: by_group[group] for group in WEIGHTS if group in by_group}
