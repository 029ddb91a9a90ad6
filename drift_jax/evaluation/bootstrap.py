"""Bootstrap intervals of means, and of ratios of sums such as nats per token.

The bootstrap-t: what is resampled is the error in units of its standard error, which follows skewed values, where the
percentiles of resampled means are too narrow (Efron and Tibshirani, An Introduction to the Bootstrap, 12.5).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from scipy import special

from drift_jax.evaluation.intervals import LEVEL, Interval

RESAMPLES = 1000
_FEWEST = 10  # rows; of fewer too many resamples are one row again and again, and Student's t takes over
_ROUNDING = 1e-12  # of the sums that a spread is the difference of
_BLOCK = 1 << 22  # numbers that are drawn at a time


def ratio_interval(
    numerators: Float[np.ndarray, " N"],
    denominators: Float[np.ndarray, " N"] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval | None:
    """Of sum(numerators) / sum(denominators); None for fewer than two rows, or a sum that is not above 0.

    Args:
      denominators: None: ones, so that it is the interval of a mean.
    """
    rows = len(numerators)
    weights = np.ones(rows) if denominators is None else np.asarray(denominators, np.float64)
    if rows < 2 or not weights.sum() > 0:
        return None
    ratio = float(numerators.sum() / weights.sum())
    rest = numerators - ratio * weights  # the ratio of these is 0, so that nothing cancels below
    error = float(rest.std(ddof=1)) / math.sqrt(rows) / float(weights.mean())
    tail = (1 - level) / 2
    ends = special.stdtrit(rows - 1, [tail, 1 - tail])
    if rows >= _FEWEST and error > 0:
        with np.errstate(invalid="ignore"):
            found = np.quantile(_resampled_errors(rest, weights, resamples, seed), [tail, 1 - tail])
        # Where all but a few rows are equal, many resamples have no spread at all.
        ends = found if np.isfinite(found).all() else ends
    return Interval(ratio - float(ends[1]) * error, ratio - float(ends[0]) * error)


def _resampled_errors(
    rest: Float[np.ndarray, " N"], weights: Float[np.ndarray, " N"], resamples: int, seed: int
) -> Float[np.ndarray, " B"]:
    """Of each resample: its ratio in units of its own standard error."""
    rows, rng = len(rest), np.random.default_rng(seed)
    columns = np.stack([rest, weights, rest * rest, rest * weights, weights * weights], axis=1)
    sums, block = [], max(1, _BLOCK // rows)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        places = rng.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        times = np.bincount(places.ravel(), minlength=count * rows).reshape(count, rows)
        sums.append(times @ columns)
    total, weight, squares, products, weight_squares = np.concatenate(sums).T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = total / weight
        spread = squares - 2 * ratio * products + ratio**2 * weight_squares
        # Of equal rows nothing is left but what rounding leaves.
        spread = np.where(spread > _ROUNDING * (squares + ratio**2 * weight_squares), spread, 0.0)
        errors = ratio / (np.sqrt(spread * rows / (rows - 1)) / weight)
    # Without spread the error is boundless, on the side of the ratio.
    return np.where(np.isfinite(errors), errors, np.copysign(np.inf, ratio))
