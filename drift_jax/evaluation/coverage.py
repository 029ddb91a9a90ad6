"""How much of the region of high rewards each method's replies reach (the paper's exploration analysis).

The paper embeds responses, maps them by UMAP, puts a reward-weighted kernel density on one grid, and scores a method by
its share of the global high-reward region. The rest is ours:

1. Rewards become weights in [0, 1], by rank or by range, over all methods together.
2. A method's density is the sum of the kernels of its replies, each times its weight, over its number of replies: a
   method with more replies has no more density. One bandwidth and one grid serve all methods.
3. A method's reach is the smallest set of cells that holds `reach_mass` of its density.
4. The region of high rewards is where, of the area that any method reaches, rewards are highest: the `region_area` of
   it with the highest local mean of weights (the methods' density over the same density without weights). It is not
   where density is highest: a method that has collapsed onto a spot would make that spot the region.
5. `coverage` is the share of the region's area that a method reaches. Methods that are alike have all of it.
6. `share` is the method's part of the density within the region: parts add up to 1, and a collapse does not show.
7. Intervals are of prompts drawn with replacement, the same for all methods, with map and region as they are. Fewer
   different replies reach less, so the interval of `coverage` is shifted to where its middle is the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from drift_jax.evaluation.coverage_settings import CoverageConfig
from drift_jax.evaluation.intervals import LEVEL, Interval


@dataclass(frozen=True)
class Coverage:
    """The map and what was found on it; methods in the order of `Replies`."""

    x: Float[np.ndarray, " G"]
    y: Float[np.ndarray, " G"]
    bandwidth: Float[np.ndarray, "2"]
    weights: Float[np.ndarray, " N"]
    densities: Float[np.ndarray, "M G G"]  # of each method, [x, y]
    region: Bool[np.ndarray, "G G"]
    shares: tuple[Share, ...]


class Share(NamedTuple):
    coverage: float
    coverage_interval: Interval
    share: float
    share_interval: Interval


def reward_weights(rewards: Float[np.ndarray, " N"], scale: str) -> Float[np.ndarray, " N"]:
    """Weights in [0, 1]; equal rewards have equal weights."""
    if scale == "rank":
        return (rankdata(rewards) - 0.5) / len(rewards)
    low, high = float(rewards.min()), float(rewards.max())
    return (rewards - low) / (high - low) if high > low else np.ones(len(rewards))


def find_coverage(
    points: Float[np.ndarray, "N 2"],
    rewards: Float[np.ndarray, " N"],
    methods: Int[np.ndarray, " N"],
    prompts: Int[np.ndarray, " N"],
    settings: CoverageConfig,
) -> Coverage:
    """The map's densities, the region of high rewards, and each method's part of it.

    Args:
      methods, prompts: numbers from 0; every method has a point.
    """
    weights = reward_weights(rewards, settings.reward_scale)
    bandwidth = _bandwidth(points, len(points) / (int(methods.max()) + 1), settings.bandwidth)
    x, y = (_axis(points[:, i], float(bandwidth[i]), settings.grid) for i in (0, 1))
    kernels = _kernels(points[:, 0], x, float(bandwidth[0])), _kernels(points[:, 1], y, float(bandwidth[1]))
    members = [methods == method for method in range(int(methods.max()) + 1)]

    def densities(times: Float[np.ndarray, " N"]) -> Float[np.ndarray, "M G G"]:
        return np.stack([_density(kernels, weights, times * member) for member in members])

    every = np.ones(len(points))
    found = densities(every)
    plain = np.stack([_density(kernels, every, every * member) for member in members])
    region = _region(found, plain, settings)
    values = _values(found, region, settings.reach_mass)
    rng, count = np.random.default_rng(settings.seed), int(prompts.max()) + 1
    drawn = []
    for _ in range(settings.resamples):
        times = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
        drawn.append(_values(densities(times[prompts]), region, settings.reach_mass))
    return Coverage(x, y, bandwidth, weights, found, region, _shares(values, np.stack(drawn)))


def _bandwidth(points: Float[np.ndarray, "N 2"], each: float, given: float | None) -> Float[np.ndarray, "2"]:
    """Scott's rule for two dims and the replies that a method has on average."""
    spread = points.std(axis=0)
    spread = np.where(spread > 0, spread, max(float(spread.max()), 1.0))
    return spread * (each ** (-1 / 6) if given is None else given)


def _axis(values: Float[np.ndarray, " N"], bandwidth: float, cells: int) -> Float[np.ndarray, " G"]:
    return np.linspace(values.min() - 3 * bandwidth, values.max() + 3 * bandwidth, cells)


def _kernels(
    values: Float[np.ndarray, " N"], axis: Float[np.ndarray, " G"], bandwidth: float
) -> Float[np.ndarray, "G N"]:
    scaled = (axis[:, None] - values) / bandwidth
    return np.exp(-0.5 * scaled**2) / (bandwidth * np.sqrt(2 * np.pi))


def _density(
    kernels: tuple[Float[np.ndarray, "G N"], Float[np.ndarray, "G N"]],
    weights: Float[np.ndarray, " N"],
    times: Float[np.ndarray, " N"],
) -> Float[np.ndarray, "G G"]:
    """Of one method, on the grid.

    Args:
      times: how often each point counts.
    """
    total = times.sum()
    if not total:  # of a resample that drew none of a method's prompts
        return np.zeros((len(kernels[0]), len(kernels[1])))
    there = times > 0
    return (kernels[0][:, there] * (weights * times)[there] / total) @ kernels[1][:, there].T


def _reach(density: Float[np.ndarray, "G G"], mass: float) -> Bool[np.ndarray, "G G"]:
    """The densest cells, as few as hold `mass` of it; none of a density that is 0 everywhere."""
    order = np.sort(density, axis=None)[::-1]
    last = int(np.searchsorted(np.cumsum(order), mass * order.sum()))
    return (density >= order[min(last, len(order) - 1)]) & (density > 0)


def _region(
    densities: Float[np.ndarray, "M G G"], plain: Float[np.ndarray, "M G G"], settings: CoverageConfig
) -> Bool[np.ndarray, "G G"]:
    """Where rewards are highest. Args: `plain` is the densities without weights."""
    reached = np.any([_reach(density, settings.reach_mass) for density in densities], axis=0)
    mean, mass = densities.sum(axis=0), plain.sum(axis=0)
    rewards = np.divide(mean, mass, out=np.zeros_like(mean), where=mass > 0)
    least = np.quantile(rewards[reached], 1 - settings.region_area) if reached.any() else np.inf
    # Equal rewards are equal up to the last digits.
    return reached & (rewards >= least * (1 - 1e-9))


def _values(
    densities: Float[np.ndarray, "M G G"], region: Bool[np.ndarray, "G G"], mass: float
) -> Float[np.ndarray, "2 M"]:
    """Coverage and share of each method."""
    covered = np.array([_reach(density, mass)[region].mean() if region.any() else 0.0 for density in densities])
    held = densities[:, region].sum(axis=1)
    return np.stack([covered, held / held.sum() if held.sum() else np.zeros(len(held))])


def _shares(values: Float[np.ndarray, "2 M"], drawn: Float[np.ndarray, "B 2 M"]) -> tuple[Share, ...]:
    tail = (1 - LEVEL) / 2
    shifted = drawn.copy()
    shifted[:, 0] += values[0] - np.median(drawn[:, 0], axis=0)
    low, high = np.clip(np.quantile(shifted, [tail, 1 - tail], axis=0), 0.0, 1.0)
    ends = [[Interval(float(a), float(b)) for a, b in zip(low[i], high[i], strict=True)] for i in (0, 1)]
    return tuple(
        Share(float(values[0, m]), ends[0][m], float(values[1, m]), ends[1][m]) for m in range(values.shape[1])
    )
