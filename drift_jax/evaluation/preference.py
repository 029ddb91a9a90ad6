"""Implicit rewards of pairs: what a policy prefers, against a stated reference, and how sure one can be of it.

reward of a completion  beta * (log p_policy - log p_reference), of all its tokens
accuracy                share of pairs whose chosen completion has the higher reward; equal ones do not count, as in TRL
margin                  mean of the chosen completion's reward less the rejected one's
token log-probs         nats per token: log-probs of all completions of a side over their number of tokens

A reward is a sum over tokens, so that a policy can win margins by length alone: `margin_length_correlation` is that of
a pair's margin with how many tokens longer its chosen completion is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from drift_jax.evaluation.bootstrap import RESAMPLES, ratio_interval
from drift_jax.evaluation.intervals import LEVEL, Interval, score_interval

SIDES = ("chosen", "rejected")
# What tables show, and how many decimals of it.
SHOWN = {
    "rewards/accuracies": ".3f",
    "rewards/margins": ".4f",
    "token_logps/chosen": ".3f",
    "token_logps/rejected": ".3f",
    "tokens/chosen": ".1f",
    "tokens/rejected": ".1f",
}


@dataclass(frozen=True)
class PairLogps:
    """Of N pairs, chosen and rejected: nats summed over the completion, and how many tokens these are of."""

    ids: Sequence[str]
    logps: Float[np.ndarray, "N 2"]
    ref_logps: Float[np.ndarray, "N 2"]
    tokens: Float[np.ndarray, "N 2"]

    def rewards(self, beta: float) -> Float[np.ndarray, "N 2"]:
        return beta * (self.logps - self.ref_logps)

    def rows(self, beta: float) -> list[dict[str, Any]]:
        """A JSON object for each pair."""
        rewards = self.rewards(beta)
        columns = {"reward": rewards, "logps": self.logps, "ref_logps": self.ref_logps, "tokens": self.tokens}
        return [
            {"id": name, "margin": float(rewards[i, 0] - rewards[i, 1])}
            | {f"{column}_{side}": float(of[i, j]) for column, of in columns.items() for j, side in enumerate(SIDES)}
            for i, name in enumerate(self.ids)
        ]


def preference_numbers(pairs: PairLogps, beta: float, seed: int = 0) -> dict[str, Any]:
    """What `eval.json` holds: numbers of at least one pair as {"value", "low", "high"}, lengths, and what was done.

    Intervals are of 95 %, bootstrapped over pairs, those of shares Wilson's; both ends are null for a single pair.
    """
    rewards = pairs.rewards(beta)
    margins = rewards[:, 0] - rewards[:, 1]
    longer = pairs.tokens[:, 0] - pairs.tokens[:, 1]
    right = [float(margin > 0) for margin in margins]
    metrics = {
        "rewards/accuracies": _number(sum(right) / len(right), score_interval(right)),
        "rewards/margins": _mean(margins, seed),
    }
    metrics |= {f"rewards/{side}": _mean(rewards[:, i], seed) for i, side in enumerate(SIDES)}
    for name, logps in (("token_logps", pairs.logps), ("ref_token_logps", pairs.ref_logps)):
        metrics |= {f"{name}/{side}": _ratio(logps[:, i], pairs.tokens[:, i], seed) for i, side in enumerate(SIDES)}
    metrics |= {f"tokens/{side}": _mean(pairs.tokens[:, i], seed) for i, side in enumerate(SIDES)}
    return {
        "pairs": len(margins),
        "ties": int((margins == 0).sum()),
        "beta": beta,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "seed": seed,
        "metrics": metrics,
        "lengths": {side: _spread(pairs.tokens[:, i]) for i, side in enumerate(SIDES)}
        | {
            "chosen_longer": float((longer > 0).mean()),
            "same_length": float((longer == 0).mean()),
            "margin_length_correlation": _correlation(margins, longer),
        },
    }


def _mean(values: Float[np.ndarray, " N"], seed: int) -> dict[str, float | None]:
    return _number(float(values.mean()), ratio_interval(values, seed=seed))


def _ratio(values: Float[np.ndarray, " N"], weights: Float[np.ndarray, " N"], seed: int) -> dict[str, float | None]:
    total = float(weights.sum())
    return _number(float(values.sum()) / total if total else None, ratio_interval(values, weights, seed=seed))


def _number(value: float | None, interval: Interval | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {"value": value, "low": low, "high": high}


def _spread(tokens: Float[np.ndarray, " N"]) -> dict[str, float]:
    low, median, high = (float(q) for q in np.quantile(tokens, [0.1, 0.5, 0.9]))
    return {"min": float(tokens.min()), "p10": low, "median": median, "p90": high, "max": float(tokens.max())}


def _correlation(a: Float[np.ndarray, " N"], b: Float[np.ndarray, " N"]) -> float | None:
    """Pearson's; None where one of both does not vary."""
    if not (a.std() > 0 and b.std() > 0):
        return None
    return float(np.corrcoef(a, b)[0, 1])
