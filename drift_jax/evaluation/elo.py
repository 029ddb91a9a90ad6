"""Elo-style ratings of several models from scores of the same tasks (WildBench's WB-Elo).

Every task is a game of every two models: `margin` points more win it, at most `tie_margin` apart is a tie, and what
lies in between is no game. Games are played in `rounds` random orders, each from the first rating; a rating is the
mean over the orders. Its interval is that of the orders, as upstream has it: it says nothing about other tasks.

Upstream starts models at their ratings of the Chatbot Arena, as `anchors` does here. In its published table these
move as well and are drawn back halfway every 100 games (`dynamic`): here they are held.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drift_jax.evaluation.wildbench import ScoreRow

_FIRST = 1000.0
_SPREAD = 400.0  # points that make odds of 10 to 1


@dataclass(frozen=True)
class EloRules:
    """Upstream's published choice."""

    k: float = 4.0  # points at stake in a game
    margin: int = 3
    tie_margin: int = 2
    rounds: int = 100
    seed: int = 42


@dataclass(frozen=True)
class Game:
    """`result` is 1 where `first` wins, 0 where `second` does, 0.5 for a tie."""

    first: str
    second: str
    result: float


def games_of_scores(scores: Mapping[str, Sequence[ScoreRow]], rules: EloRules = EloRules()) -> list[Game]:
    """Games of models on the tasks that both have a usable row of, in the order of models and tasks."""
    by_task = {name: {row.session_id: row.score for row in rows if row.usable} for name, rows in scores.items()}
    games = []
    for first, second in itertools.combinations(by_task, 2):
        for task, score in by_task[first].items():
            other = by_task[second].get(task)
            if other is None:
                continue
            lead = int(score) - int(other)  # upstream looks at whole points
            if abs(lead) >= rules.margin:
                games.append(Game(first, second, 1.0 if lead > 0 else 0.0))
            elif abs(lead) <= rules.tie_margin:
                games.append(Game(first, second, 0.5))
    return games


def elo_ratings(
    games: Sequence[Game], rules: EloRules = EloRules(), anchors: Mapping[str, float] | None = None
) -> dict[str, dict[str, Any]]:
    """Ratings by model, the best first: avg, std, median, ci (2.5 and 97.5 % of the orders), games.

    Args:
      anchors: ratings that models start from and keep.
    """
    anchors = anchors or {}
    names = list(dict.fromkeys(name for game in games for name in (game.first, game.second)))
    place = {name: i for i, name in enumerate(names)}
    held = [name in anchors for name in names]
    played = [(place[game.first], place[game.second], game.result) for game in games]
    rng = random.Random(rules.seed)
    rounds = np.empty((rules.rounds, len(names)))
    for order in range(rules.rounds):
        ratings = [anchors.get(name, _FIRST) for name in names]
        for first, second, result in rng.sample(played, len(played)):
            expected = 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / _SPREAD))
            step = rules.k * (result - expected)
            if not held[first]:
                ratings[first] += step
            if not held[second]:
                ratings[second] -= step
        rounds[order] = ratings
    stats = {
        name: {
            "avg": float(found.mean()),
            "std": float(found.std()),
            "median": float(np.median(found)),
            "ci": [float(end) for end in np.percentile(found, [2.5, 97.5])],
            "games": sum(place[name] in game[:2] for game in played),
        }
        for name, found in zip(names, rounds.T, strict=True)
    }
    return dict(sorted(stats.items(), key=lambda item: -item[1]["avg"]))
