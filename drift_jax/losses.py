"""Preference maths: from log-probabilities of completions to the DPO loss, its NLL term and TRL's metrics.

Pure functions of arrays; no model, no I/O. Axis `2` is the pair side: 0 chosen, 1 rejected. B are the pairs of one
update. Log-probabilities are natural logarithms (nats), summed in float32 or wider.

How accumulation stays exact, and packing invisible: no function here averages over the pairs it is given.
`count_weights` gives every pair, and every chosen token of it, of the *global* batch a weight, `normalise_weights`
turns the weights into shares that sum to 1, and a micro-batch contributes the plain sum over its pairs' shares. Sums of
micro-batches are then the loss, the gradient and the metrics of the whole batch, however it was cut. A padding pair has
weight 0.

Where this departs from the DRIFT training stack (arXiv 2510.02341; TRL 0.10 to 0.12) and from later TRL:
 1. The NLL is by default the mean over the chosen tokens of the global batch. TRL averages inside one
    device's micro-batch and then over devices and accumulation steps; `group_token_mean` does that.
 2. TRL averages the means of micro-batches, so pairs of a short last one weigh more there. Here every pair
    weighs the same.
 3. The tokens of the NLL are by default chosen by mask. TRL 0.12 to 0.28 also skip tokens whose id is 0 ("!" in
    Qwen), since they call cross entropy with ignore_index 0: `NLL_TOKENS["nonzero"]` narrows the mask likewise.
 4. `label_smoothing` acts on the sigmoid loss as in TRL before 1.0; TRL 1.x ignores it there.
 5. The margin is (chosen - ref) - (rejected - ref); TRL 0.12 computes (chosen - rejected) - (ref - ref).
    The value is the same; near the reference the differences used here are exact in float32.
 6. `nll_loss` is always reported. TRL reports it only with `rpo_alpha` set and dropped it in 0.29.
 7. Metrics are means over all pairs of the global batch. TRL before 0.14 logs one device's means.
 8. `logits/chosen` and `logits/rejected` are not reported: they need all logits in memory at once.
 9. Evaluation (`train.evaluate_scores`) always takes the NLL as the mean over all chosen tokens of all held-out pairs,
    and cuts nothing by neighbours: `eval_loss` and `eval_nll_loss` do not depend on how pairs were batched. TRL's do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LossWeights(NamedTuple):
    """What each pair counts for, and each chosen token of it. As shares, both sum to 1 over the global batch."""

    pairs: Float[Array, " B"]
    nll: Float[Array, " B"]  # of each of the pair's chosen tokens


# (chosen tokens per pair, weight of each pair) -> weight of each chosen token of a pair
NllReduction = Callable[[Float[Array, " B"], Float[Array, " B"]], Float[Array, " B"]]


def global_token_mean(tokens: Float[Array, " B"], pair_weights: Float[Array, " B"]) -> Float[Array, " B"]:
    """Every chosen token of the global batch counts the same."""
    return jnp.where(tokens > 0, pair_weights, 0.0)


def sequence_mean(tokens: Float[Array, " B"], pair_weights: Float[Array, " B"]) -> Float[Array, " B"]:
    """The mean over a chosen response's tokens, then over the responses that have any (as in OpenRLHF)."""
    return _divide(pair_weights, tokens)


def group_token_mean(
    tokens: Float[Array, " B"], pair_weights: Float[Array, " B"], group: int = 4
) -> Float[Array, " B"]:
    """The token mean over `group` consecutive pairs, then the mean over the groups that have any token.

    This is TRL's mean of means: `group` is the number of pairs in one device's micro-batch, 4 in DRIFT.
    """
    groups = jnp.arange(tokens.shape[0]) // group
    same_group = groups[:, None] == groups[None, :]
    # Masked sum: a scatter leaves the sharding open, a matmul rounds counts to bfloat16 on TPU.
    in_group = jnp.sum(jnp.where(same_group, (tokens * pair_weights)[None, :], 0.0), axis=1)
    return _divide(jnp.where(tokens > 0, pair_weights, 0.0), in_group)


# By name; each is made for the pairs of a group, which only `group_token_mean` looks at.
NLL_REDUCTIONS: dict[str, Callable[[int], NllReduction]] = {
    "global_token_mean": lambda group: global_token_mean,
    "group_token_mean": lambda group: partial(group_token_mean, group=group),
    "sequence_mean": lambda group: sequence_mean,
}

# Which chosen tokens, by their ids, the NLL looks at; rule 3 above.
NLL_TOKENS: dict[str, Callable[[Int[Array, "*dims"]], Bool[Array, "*dims"]]] = {
    "all": lambda ids: jnp.ones_like(ids, bool),
    "nonzero": lambda ids: ids != 0,
}


def count_weights(
    tokens: Float[Array, " B"], pair_weights: Float[Array, " B"], nll_reduction: NllReduction = global_token_mean
) -> LossWeights:
    """Weights of the pairs and of their chosen tokens in one global batch, not yet divided by their totals.

    Args:
      tokens: how many chosen tokens of each pair the NLL counts.
      pair_weights: 1 for a pair, 0 for padding.
      nll_reduction: how token losses become one number; sees whole groups only if given the global batch.
    """
    pair_weights, tokens = _at_least_float32(pair_weights), _at_least_float32(tokens)
    return LossWeights(pairs=pair_weights, nll=nll_reduction(tokens, pair_weights))


def normalise_weights(weights: LossWeights, tokens: Float[Array, " B"]) -> LossWeights:
    """Weights -> shares, which sum to 1 over the pairs, and over their chosen tokens. A total of 0 gives 0, not NaN."""
    totals = jnp.sum(weights.pairs), jnp.sum(weights.nll * tokens)
    return LossWeights(*(_divide(weight, total) for weight, total in zip(weights, totals, strict=True)))


def sum_by_completion(
    token_logps: Float[Array, "R C"], owners: Int[Array, "R C"], counted: Bool[Array, "R C"], pairs: int
) -> Float[Array, "B 2"]:
    """Sums of the counted tokens of each completion, in nats: its log-probability when all are counted.

    Args:
      owners: 2 * pair + side of each token; below 0 there is none, whatever its value is, NaN included.
      pairs: B.
    """
    # Masked sums instead of a scatter: they stay local to the devices that hold the rows, then add up.
    mine = (owners[..., None] == jnp.arange(2 * pairs)) & counted[..., None]
    values = jnp.where(owners >= 0, _at_least_float32(token_logps), 0.0)
    return jnp.sum(jnp.where(mine, values[..., None], 0.0), axis=(0, 1)).reshape(pairs, 2)


def implicit_rewards(logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], beta: float) -> Float[Array, "B 2"]:
    """beta * log(policy / reference) of each completion (DPO, arXiv 2305.18290, section 5.1)."""
    return beta * (_at_least_float32(logps) - _at_least_float32(ref_logps))


def dpo_losses(
    logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], beta: float, label_smoothing: float = 0.0
) -> Float[Array, " B"]:
    """Sigmoid DPO loss of each pair (DPO, equation 7), with conservative label smoothing as in TRL.

    -(1 - eps) log sigmoid(margin) - eps log sigmoid(-margin), where the margin is the difference of the
    implicit rewards. It is ln 2 where policy and reference agree, for every eps.
    """
    rewards = implicit_rewards(logps, ref_logps, beta)
    margins = rewards[:, 0] - rewards[:, 1]
    preferred, flipped = -jax.nn.log_sigmoid(margins), -jax.nn.log_sigmoid(-margins)
    return (1 - label_smoothing) * preferred + label_smoothing * flipped


def preference_loss(
    logps: Float[Array, "B 2"],
    nll: Float[Array, " B"],
    ref_logps: Float[Array, "B 2"],
    shares: LossWeights,
    *,
    beta: float,
    label_smoothing: float,
    rpo_alpha: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This batch's part of the loss `DPO + rpo_alpha * NLL`, and of each metric under TRL's name.

    Both add up over micro-batches when `shares` are those of the global batch, 0 for pairs of other micro-batches.

    Args:
      logps: summed over each completion, in nats.
      nll: of each chosen response, summed over the tokens that the NLL counts, in nats.
      shares: from `normalise_weights`. A pair of share 0 is padding: whatever its other values are, NaN
        included, it changes neither the loss nor a gradient.

    Returns:
      The loss, in nats, and the metrics: `loss` (with the NLL term), `rewards/*`, `logps/*`, `nll_loss`.
    """
    # Padding is replaced before anything is computed: 0 * NaN is NaN, in the value and in the gradient.
    real = shares.pairs > 0
    logps, ref_logps = (jnp.where(real[:, None], values, 0.0) for values in (logps, ref_logps))
    dpo = jnp.sum(shares.pairs * dpo_losses(logps, ref_logps, beta, label_smoothing))
    nll_loss = jnp.sum(shares.nll * jnp.where(real, nll, 0.0))
    loss = dpo + rpo_alpha * nll_loss
    metrics = {"loss": loss, "nll_loss": nll_loss} | preference_metrics(logps, ref_logps, shares.pairs, beta)
    return loss, metrics


def preference_metrics(
    logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], pair_shares: Float[Array, " B"], beta: float
) -> dict[str, Float[Array, ""]]:
    """Sums over the pairs, each times its share. Equal rewards do not count as accurate (as in TRL)."""
    rewards = implicit_rewards(logps, ref_logps, beta)
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    per_pair = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(rewards.dtype),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }
    return {name: jnp.sum(pair_shares * value) for name, value in per_pair.items()}


def _at_least_float32(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _divide(weights: Float[Array, "*dims"], total: Float[Array, "*wide"]) -> Float[Array, "*dims"]:
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)
