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
from scipy.special import expit

from drift_jax.evaluation.intervals import Interval, bootstrap_interval, score_interval

_RIDGE = 0.01  # in the sum of log losses, on both coefficients
_RESAMPLES = 500
_STEPS, _CLOSE, _ROUNDING = 50, 1e-7, 1e-12  # of the fit: the gradient that ends it, what a loss may rise by


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
    controlled = _percent(float(length_controlled(rows[None])[0])) if values else None
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


def length_controlled(rows: np.ndarray) -> np.ndarray:
    """The preference for A at equal lengths, of several sets of rows at once: (sets, rows, 3) -> (sets,).

    Args:
      rows: preference, length of A, length of B.
    """
    preferences, difference = rows[..., 0], rows[..., 1] - rows[..., 2]
    count = rows.shape[1]
    spread = difference.std(axis=1, ddof=1, keepdims=True) if count > 1 else np.zeros((len(rows), 1))
    feature = np.tanh(np.divide(difference, spread, out=np.zeros_like(difference), where=spread > 0))
    return expit(_fit(preferences, feature)[:, 0])


def _fit(preferences: np.ndarray, feature: np.ndarray) -> np.ndarray:
    """Intercept and slope of a logistic regression for each set, by Newton's method with steps that never go uphill.

    All resamples of a bootstrap at once: one at a time, scipy's optimisers took 3 s for 500 of them.
    """
    weights = np.zeros((len(preferences), 2))
    loss = _loss(weights, preferences, feature)
    for _ in range(_STEPS):
        chance = expit(weights[:, :1] + weights[:, 1:] * feature)
        residual, curvature = chance - preferences, chance * (1 - chance)
        gradient = np.stack([residual.sum(1), (residual * feature).sum(1)], axis=1) + _RIDGE * weights
        if np.abs(gradient).max() < _CLOSE:
            break
        mixed = (curvature * feature).sum(1)
        hessian = np.stack([curvature.sum(1), mixed, mixed, (curvature * feature**2).sum(1)], axis=1)
        step = np.linalg.solve(hessian.reshape(-1, 2, 2) + _RIDGE * np.eye(2), gradient[..., None])[..., 0]
        size = np.ones((len(weights), 1))
        for _ in range(_STEPS):
            moved = weights - size * step
            worse = _loss(moved, preferences, feature) > loss * (1 + _ROUNDING)
            if not worse.any():
                break
            size[worse] /= 2
        weights = np.where(worse[:, None], weights, moved)
        loss = _loss(weights, preferences, feature)
    return weights


def _loss(weights: np.ndarray, preferences: np.ndarray, feature: np.ndarray) -> np.ndarray:
    logits = weights[:, :1] + weights[:, 1:] * feature
    return (np.logaddexp(0, logits) - preferences * logits).sum(1) + _RIDGE * (weights**2).sum(1) / 2


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _percents(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval.scaled(100))
