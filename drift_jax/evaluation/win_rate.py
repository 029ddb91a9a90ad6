"""Win rate of A over B on prompts of your own: the statistics of preferences, whoever the judge is.

A preference is from A's side: 1 where A is better, 0 where B is, 0.5 for a tie. A judge is asked twice, with either
reply first, and the preference of a prompt is the mean of both: a judge that always takes the first finds a tie.

The length-controlled win rate is what a logistic regression of preferences on tanh of the standardised difference of
lengths says for equal lengths. It is the idea of AlpacaEval 2 without the difficulty of its instructions, and no number
of its table. The penalty is weak and the same on both sides: swapping A and B turns p into 1 - p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from drift_jax.evaluation.intervals import Interval, bootstrap_interval, score_interval

_RIDGE = 0.01  # in the sum of log losses, on both coefficients
_RESAMPLES = 500


@dataclass(frozen=True)
class Preference:
    """Of one prompt. Lengths in characters; `orders`: what was found with A first and with B first, where asked."""

    id: str
    value: float
    length_a: int
    length_b: int
    orders: tuple[float, float] | None = None

    def swapped(self) -> Preference:
        """The same from B's side."""
        orders = None if self.orders is None else (1 - self.orders[1], 1 - self.orders[0])
        return Preference(self.id, 1 - self.value, self.length_b, self.length_a, orders)


def win_rate(preferences: Sequence[Preference], seed: int = 0) -> dict[str, Any]:
    """Rates in per cent with their intervals of 95 %, counts, and how much the order mattered; None without rows.

    `reward` is the mean of win 1, tie 0 and loss -1.
    """
    values = [preference.value for preference in preferences]
    rows = np.asarray([[p.value, p.length_a, p.length_b] for p in preferences], np.float64).reshape(-1, 3)
    mean = float(np.mean(values)) if values else None
    controlled = _percent(length_controlled(rows)) if values else None
    interval = bootstrap_interval(rows, length_controlled, resamples=_RESAMPLES, seed=seed)
    orders = [preference.orders for preference in preferences if preference.orders is not None]
    return {
        "win_rate": _percent(mean),
        "win_rate_interval": _percents(score_interval(values)),
        "reward": None if mean is None else 2 * mean - 1,
        "wins": sum(value > 0.5 for value in values),
        "ties": sum(value == 0.5 for value in values),
        "losses": sum(value < 0.5 for value in values),
        "total": len(values),
        "length_controlled_win_rate": controlled,
        "length_controlled_interval": _percents(interval),
        "avg_length_a": float(rows[:, 1].mean()) if values else None,
        "avg_length_b": float(rows[:, 2].mean()) if values else None,
        # Of the judge: where both orders say the same, and how often the reply that stands first wins.
        "same_in_both_orders": _percent(float(np.mean([a == b for a, b in orders]))) if orders else None,
        "first_wins": _percent(float(np.mean([(a + 1 - b) / 2 for a, b in orders]))) if orders else None,
    }


def length_controlled(rows: np.ndarray) -> float:
    """The preference for A at equal lengths.

    Args:
      rows: preference, length of A, length of B.
    """
    preferences, difference = rows[:, 0], rows[:, 1] - rows[:, 2]
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    feature = np.tanh(difference / spread) if spread > 0 else np.zeros(len(difference))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = weights[0] + weights[1] * feature
        residual = expit(logits) - preferences
        value = np.sum(np.logaddexp(0, logits) - preferences * logits) + _RIDGE * np.sum(weights**2) / 2
        return float(value), np.array([residual.sum(), (residual * feature).sum()]) + _RIDGE * weights

    found = minimize(loss, np.zeros(2), jac=True, method="BFGS")
    return float(expit(found.x[0]))


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _percents(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval.scaled(100))
