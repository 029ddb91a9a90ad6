"""Lemma 1 of DRIFT (arXiv 2510.02341) in numbers: how hard pairs still push, and the least gradient that follows.

Of a pair let s = beta (log pi(y+)/pi_ref(y+) - log pi(y-)/pi_ref(y-)), its margin, and d = grad log pi(y+) - grad log
pi(y-). Its loss -log sigma(s) has the gradient -beta sigma(-s) d. If P(sigma(-s) >= tau) >= p0 and E[||d|| | that] =
Delta > 0, then E||grad|| >= beta tau p0 Delta. sigma(-s) is called the pair's weight here.

What is measured, and how it differs from the lemma:
 1. P and E are means over the pairs that are measured, p0 and Delta what they have; so the bound is as sharp as it
    can be for that tau.
 2. E||grad|| is the mean of the norms of single pairs. `grad_norm` of an update is the norm of their mean, in which
    they may cancel: it can be below the bound.
 3. The loss is the sigmoid one alone: without label smoothing and without the NLL of `train.rpo_alpha`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from drift_jax.losses import dpo_losses

QUANTILES = (5, 25, 50, 75, 95)  # per cent


class PairGradients(NamedTuple):
    """Of each measured pair, under the policy."""

    logps: Float[np.ndarray, "M 2"]  # nats, summed over the completion
    norms: Float[np.ndarray, " M"]  # ||d||


class Lemma(NamedTuple):
    """Of each measured pair."""

    margins: Float[np.ndarray, " M"]  # s
    weights: Float[np.ndarray, " M"]  # sigma(-s)
    norms: Float[np.ndarray, " M"]  # ||d||
    grad_norms: Float[np.ndarray, " M"]  # of the gradient of its loss


def apply_lemma(found: PairGradients, ref_logps: Float[np.ndarray, "M 2"], beta: float) -> Lemma:
    """What the lemma speaks of. The derivative of the loss by s is JAX's, and not what the lemma says that it is."""
    gains = np.asarray(found.logps, np.float64) - ref_logps
    margins = beta * (gains[:, 0] - gains[:, 1])
    # The gradient of the loss is a multiple of d: the loss depends on log pi(y+) - log pi(y-) alone.
    logps, refs = (jnp.asarray(x, jnp.float32) for x in (found.logps, ref_logps))
    slopes = jax.grad(lambda x: dpo_losses(x, refs, beta).sum())(logps)[:, 0]
    norms = np.asarray(found.norms, np.float64)
    return Lemma(margins, _sigmoid(-margins), norms, np.abs(np.asarray(slopes, np.float64)) * norms)


def lemma_metrics(lemma: Lemma, beta: float, tau: float) -> dict[str, float]:
    """Means, quantiles and the bound, by the names of metrics.jsonl (`theory/...`)."""
    event = lemma.weights >= tau
    p0, delta = float(event.mean()), float(lemma.norms[event].mean()) if event.any() else 0.0
    numbers = {
        "pairs": len(event),
        "tau": tau,
        "p0": p0,
        "delta": delta,
        "bound": beta * tau * p0 * delta,
        "grad_norm": float(lemma.grad_norms.mean()),
        "d_norm": float(lemma.norms.mean()),
        "margin": float(lemma.margins.mean()),
        "weight/mean": float(lemma.weights.mean()),
    }
    quantiles = np.percentile(lemma.weights, QUANTILES)
    numbers |= {f"weight/p{q:02d}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
    return {f"theory/{name}": value for name, value in numbers.items()}


def retention_metrics(name: str, then: Float[np.ndarray, " M"], now: Float[np.ndarray, " M"]) -> dict[str, float]:
    """Of the pairs of an earlier stage: their mean margin at its end and now, against its own reference.

    The share that is left has no meaning where nothing was gained, and is left out there.
    """
    before, after = float(then.mean()), float(now.mean())
    share = {"retention": after / before} if before > 0 else {}
    return {f"theory/{name}/{key}": value for key, value in {"margin_then": before, "margin": after, **share}.items()}


def _sigmoid(x: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    return np.exp(-np.logaddexp(0.0, -x))
