"""Confidence intervals of the evaluations.

score_interval      of a mean of values within [0, 1], such as wins, ties and losses: Wilson's, for as many independent
                    yes-or-no answers as have the variance that the values have. It stays within [0, 1] and has a width
                    where all values are 0 or all are 1.
mean_interval       of any other mean: Student's t
bootstrap_interval  of any statistic of rows: percentiles of the statistic over rows drawn with replacement
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

LEVEL = 0.95
_AT_ONCE = 2_000_000  # rows drawn before the statistic is computed: what memory they take


class Interval(NamedTuple):
    """Both ends belong to it."""

    low: float
    high: float

    def scaled(self, factor: float, shift: float = 0.0) -> Interval:
        """The interval of `factor * x + shift`."""
        ends = sorted((factor * self.low + shift, factor * self.high + shift))
        return Interval(ends[0], ends[1])


def score_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Of the mean of values within [0, 1]; None where there are none.

    Raises:
      ValueError: a value is outside.
    """
    if not len(values):
        return None
    sample = np.asarray(values, np.float64)
    if sample.min() < 0 or sample.max() > 1:
        raise ValueError(f"values must be within [0, 1], found {sample.min()} to {sample.max()}")
    count, mean = len(sample), float(sample.mean())
    most = mean * (1 - mean)  # the variance of yes-or-no answers with this mean
    share = float(sample.var()) / most if most > 0 else 1.0
    # Of values that are all alike, such as ties only, nothing varies: the interval is the mean.
    squared = _quantile(count, level) ** 2 * share / count
    centre = (mean + squared / 2) / (1 + squared)
    half = math.sqrt(squared * most + squared**2 / 4) / (1 + squared)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Of a mean; None for fewer than two values, which say nothing about their spread."""
    if len(values) < 2:
        return None
    sample = np.asarray(values, np.float64)
    half = _quantile(len(sample), level) * float(sample.std(ddof=1)) / math.sqrt(len(sample))
    mean = float(sample.mean())
    return Interval(mean - half, mean + half)


def bootstrap_interval(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval | None:
    """Of a statistic of rows (first axis); None for fewer than two rows, or where the statistic is not finite.

    Args:
      statistic: of several sets of rows at once, (sets, rows, ...) -> (sets,); None: their mean, of rows that are
        numbers. Each set is drawn with replacement and has as many rows as there are.
    """
    count = len(rows)
    if count < 2:
        return None
    rng, found = np.random.default_rng(seed), list[np.ndarray]()
    at_once = max(1, _AT_ONCE // count)
    for start in range(0, resamples, at_once):
        drawn = rows[rng.integers(0, count, (min(at_once, resamples - start), count))]
        found.append(drawn.mean(axis=1) if statistic is None else statistic(drawn))
    values = np.concatenate(found).astype(np.float64)
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _quantile(count: int, level: float) -> float:
    """Of Student's t, two-sided; of the normal distribution for a single value."""
    upper = (1 + level) / 2
    return float(special.stdtrit(count - 1, upper) if count > 1 else special.ndtri(upper))
