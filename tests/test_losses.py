"""The preference maths against torch in float64, under packing, accumulation, padding and swapping."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_jax.losses import (
    NLL_REDUCTIONS,
    LossWeights,
    count_weights,
    dpo_losses,
    implicit_rewards,
    normalise_weights,
    preference_loss,
    sum_by_completion,
)

BETA, ALPHA = 0.1, 0.5  # alpha far above the recipe's 0.001, so that an error in the NLL shows in the loss


class Listed(NamedTuple):
    """Completion tokens as the step has them, and the reference's sums."""

    token_logps: jax.Array  # [R, C]
    owners: jax.Array  # [R, C]: 2 * pair + side; -1: no token
    ref_logps: jax.Array  # [B, 2]


def batch(pairs: int, rows: int | None = None, seed: int = 0) -> Listed:
    """Completions of 1 to 9 tokens, their pairs dealt out over rows in any order; sums near the reference's."""
    rng = np.random.default_rng(seed)
    rows = rows or -(-pairs // 2)
    lengths = rng.integers(1, 10, (pairs, 2))
    places = rng.permutation(np.arange(pairs) % rows)  # the row of each pair
    owners = np.full((rows, 18 * -(-pairs // rows) + 3), -1)
    for row in range(rows):
        mine = [np.full(lengths[b, side], 2 * b + side) for b in np.flatnonzero(places == row) for side in (0, 1)]
        owners[row, : sum(map(len, mine))] = np.concatenate(mine)
    token_logps = -rng.gamma(1.0, 2.0, owners.shape).astype(np.float32)
    sums = np.array([[token_logps[owners == 2 * b + side].sum() for side in (0, 1)] for b in range(pairs)])
    ref_logps = sums + rng.normal(0, 3, (pairs, 2))
    return Listed(*map(jnp.asarray, (token_logps, owners.astype(np.int32), ref_logps.astype(np.float32))))


def lengths_of(owners: jax.Array, pairs: int) -> jax.Array:
    """Tokens of both sides of each pair."""
    return jnp.asarray(np.bincount(np.asarray(owners)[np.asarray(owners) >= 0], minlength=2 * pairs)).reshape(pairs, 2)


def shares_of(owners: jax.Array, pair_weights: jax.Array, reduction: str) -> LossWeights:
    tokens = lengths_of(owners, len(pair_weights))[:, 0].astype(jnp.float32)
    return normalise_weights(count_weights(tokens, pair_weights, NLL_REDUCTIONS[reduction](4)), tokens)


@partial(jax.jit, static_argnums=2)
def sum_all(token_logps: jax.Array, owners: jax.Array, pairs: int) -> jax.Array:
    return sum_by_completion(token_logps, owners, owners >= 0, pairs)


@partial(jax.jit, static_argnums=4)
def objective(token_logps, owners, ref_logps, shares, label_smoothing=0.0, nll_tokens=None):
    """From token log-probabilities to the loss; `nll_tokens`: those that the NLL counts."""
    every, pairs = owners >= 0, len(ref_logps)
    logps = sum_by_completion(token_logps, owners, every, pairs)
    nll = -sum_by_completion(token_logps, owners, every if nll_tokens is None else nll_tokens, pairs)[:, 0]
    scales = {"beta": BETA, "label_smoothing": label_smoothing, "rpo_alpha": ALPHA}
    return preference_loss(logps, nll, ref_logps, shares, **scales)


value_and_grad = jax.jit(jax.value_and_grad(objective, has_aux=True), static_argnums=4)


def torch_objective(token_logps, owners, ref_logps, eps, reduction, group=4):
    """The same in torch float64, written pair by pair from the definitions."""
    owners = np.asarray(owners)
    ref = torch.tensor(np.asarray(ref_logps), dtype=torch.float64)
    tokens = [[token_logps[torch.tensor(owners == 2 * b + side)] for side in (0, 1)] for b in range(len(ref))]
    logps = torch.stack([torch.stack([side.sum() for side in pair]) for pair in tokens])
    margins = BETA * ((logps[:, 0] - logps[:, 1]) - (ref[:, 0] - ref[:, 1]))
    logsigmoid = torch.nn.functional.logsigmoid
    dpo = (-logsigmoid(margins) * (1 - eps) - logsigmoid(-margins) * eps).mean()
    chosen = [-pair[0] for pair in tokens]
    groups = {
        "global_token_mean": [chosen],
        "group_token_mean": [chosen[i : i + group] for i in range(0, len(chosen), group)],
        "sequence_mean": [[t] for t in chosen],
    }[reduction]
    nll = torch.stack([torch.cat(g).mean() for g in groups]).mean()
    return dpo + ALPHA * nll, dpo, nll, BETA * (logps - ref), logps


@pytest.mark.parametrize("reduction", NLL_REDUCTIONS)
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_loss_metrics_and_gradients_equal_torch_float64(reduction: str, eps: float) -> None:
    token_logps, owners, ref_logps = batch(10)  # 10: the last group of 4 is short
    shares = shares_of(owners, jnp.ones(10), reduction)
    (loss, metrics), grad = value_and_grad(token_logps, owners, ref_logps, shares, eps)

    wanted_tokens = torch.tensor(np.asarray(token_logps), dtype=torch.float64, requires_grad=True)
    total, _, nll, rewards, logps = torch_objective(wanted_tokens, owners, ref_logps, eps, reduction)
    total.backward()
    rewards, logps = rewards.detach().numpy(), logps.detach().numpy()

    assert float(loss) == pytest.approx(total.item(), rel=1e-6)
    wanted = {
        "loss": total.item(),
        "nll_loss": nll.item(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).mean(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
    }
    # A mean reward can be near 0; its rounding error is that of the summed logps it is the difference of.
    rounding = 1e-6 * BETA * np.abs(logps).max()
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted, rel=1e-6, abs=rounding)
    # Relative to the largest entry: a chosen token's DPO and NLL gradients partly cancel.
    wanted_grad = wanted_tokens.grad.numpy()
    np.testing.assert_allclose(grad, wanted_grad, rtol=1e-5, atol=1e-6 * np.abs(wanted_grad).max())
    assert np.all(np.asarray(grad)[np.asarray(owners) < 0] == 0)


@pytest.mark.parametrize("mistake", ["sides", "pairs"])
def test_a_token_of_the_wrong_owner_is_seen(mistake: str) -> None:
    """The negative twin: one token counted to the other side, or to the next pair."""
    token_logps, owners, ref_logps = batch(10)
    wrong = owners.at[0, 0].set(owners[0, 0] ^ 1 if mistake == "sides" else (owners[0, 0] + 2) % 20)
    shares = shares_of(owners, jnp.ones(10), "global_token_mean")
    loss, changed = (float(objective(token_logps, o, ref_logps, shares)[0]) for o in (owners, wrong))
    assert abs(changed / loss - 1) > 1e-4


def test_pair_losses_and_rewards_equal_torch_float64() -> None:
    """From summed log-probabilities the only rounding is one difference: 1e-6 holds for every pair alone."""
    rng = np.random.default_rng(1)
    logps = rng.normal(-300, 40, (64, 2)).astype(np.float32)
    ref_logps = (logps + rng.normal(0, 8, (64, 2))).astype(np.float32)
    wide, ref = (torch.tensor(x, dtype=torch.float64) for x in (logps, ref_logps))
    rewards = BETA * (wide - ref)
    losses = -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1])
    np.testing.assert_allclose(implicit_rewards(jnp.asarray(logps), jnp.asarray(ref_logps), BETA), rewards, 1e-6)
    np.testing.assert_allclose(dpo_losses(jnp.asarray(logps), jnp.asarray(ref_logps), BETA), losses, 1e-6)


@pytest.mark.parametrize("margin", [-1e4, -200.0, 200.0, 1e4])
def test_losses_stay_finite_at_huge_margins(margin: float) -> None:
    def loss(logps: jax.Array) -> jax.Array:
        return dpo_losses(logps, jnp.zeros((1, 2)), 1.0)[0]

    value, grad = jax.value_and_grad(loss)(jnp.array([[margin, 0.0]]))
    assert float(value) == pytest.approx(max(0.0, -margin), abs=1e-6)
    assert float(grad[0, 0]) == pytest.approx(-1.0 if margin < 0 else 0.0, abs=1e-6)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_loss_is_ln2_where_policy_equals_reference(eps: float) -> None:
    token_logps, owners, _ = batch(5)
    shares = shares_of(owners, jnp.ones(5), "global_token_mean")
    _, metrics = objective(token_logps, owners, sum_all(token_logps, owners, 5), shares, eps)
    dpo = float(metrics["loss"] - ALPHA * metrics["nll_loss"])
    assert dpo == pytest.approx(math.log(2), rel=1e-6)
    assert float(metrics["rewards/margins"]) == 0.0
    assert float(metrics["rewards/accuracies"]) == 0.0, "equal rewards must not count as accurate"


def accumulated(listed: Listed, shares: LossWeights, micro_batches: int, all_shares: bool = False):
    """Sums of the loss, the metrics and the gradient over equal slices of the rows.

    `all_shares` is the mistake of giving every micro-batch the shares of pairs that lie in another one.
    """
    parts = []
    for token_logps, owners in zip(*(np.split(np.asarray(x), micro_batches) for x in listed[:2]), strict=True):
        here = np.isin(np.arange(len(listed.ref_logps)), owners // 2) | all_shares
        own = LossWeights(*(jnp.where(here, share, 0.0) for share in shares))
        parts.append(value_and_grad(token_logps, owners, listed.ref_logps, own))
    metrics = jax.tree.map(lambda *values: sum(values), *(aux for (_, aux), _ in parts))
    return metrics, jnp.concatenate([grad for _, grad in parts])


@pytest.mark.parametrize("reduction", NLL_REDUCTIONS)
@pytest.mark.parametrize("real_pairs", [8, 6])
def test_accumulation_is_exact(reduction: str, real_pairs: int) -> None:
    listed = batch(8, rows=4)
    shares = shares_of(listed.owners, (jnp.arange(8) < real_pairs).astype(jnp.float32), reduction)
    whole, whole_grad = accumulated(listed, shares, 1)
    for micro_batches in (2, 4):
        metrics, grad = accumulated(listed, shares, micro_batches)
        assert jax.tree.map(float, metrics) == pytest.approx(jax.tree.map(float, whole), rel=2e-6, abs=1e-6)
        np.testing.assert_allclose(grad, whole_grad, rtol=1e-6, atol=1e-9)


def test_shares_of_pairs_that_lie_elsewhere_are_seen() -> None:
    """The negative twin: a pair counted in every micro-batch, with log-probabilities of 0 in all but its own."""
    listed = batch(8, rows=4)
    shares = shares_of(listed.owners, jnp.ones(8), "global_token_mean")
    whole, wrong = accumulated(listed, shares, 1)[0], accumulated(listed, shares, 4, all_shares=True)[0]
    assert abs(float(wrong["loss"] / whole["loss"]) - 1) > 1e-2


def test_mean_of_micro_batch_means_is_not_exact() -> None:
    """The negative twin: shares made per micro-batch and averaged, as trainers commonly do."""
    listed = batch(8, rows=8)
    whole, _ = objective(*listed, shares_of(listed.owners, jnp.ones(8), "global_token_mean"))
    means = []
    for token_logps, owners in zip(*(np.split(np.asarray(x), 8) for x in listed[:2]), strict=True):
        here = jnp.asarray(np.isin(np.arange(8), owners // 2), jnp.float32)
        shares = shares_of(owners, here, "global_token_mean")
        means.append(float(objective(token_logps, owners, listed.ref_logps, shares)[0]))
    assert abs(sum(means) / 8 - float(whole)) > 1e-2


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_where_a_pair_is_listed_changes_nothing(seed: int) -> None:
    """Other rows, other columns, holes in the list: a completion's sum is that of its tokens."""
    token_logps, owners, _ = batch(6, rows=3, seed=seed)
    order = np.random.default_rng(seed).permutation(owners.size)
    moved = (x.reshape(-1)[order].reshape(owners.shape) for x in (token_logps, owners))
    sums, again = (np.asarray(sum_all(t, o, 6)) for t, o in ((token_logps, owners), moved))
    np.testing.assert_allclose(again, sums, rtol=1e-6)
    by_hand = [np.asarray(token_logps, np.float64)[np.asarray(owners) == o].sum() for o in range(12)]
    np.testing.assert_allclose(sums.reshape(-1), by_hand, rtol=1e-6)


@pytest.mark.parametrize("reduction", NLL_REDUCTIONS)
@pytest.mark.parametrize("garbage", [0.0, math.nan, -math.inf])
def test_padding_pairs_and_unowned_tokens_change_nothing(reduction: str, garbage: float) -> None:
    listed = batch(6)
    rows, width = listed.owners.shape
    wanted, wanted_grad = accumulated(listed, shares_of(listed.owners, jnp.ones(6), reduction), 1)
    widen = ((0, 1), (0, 5))
    token_logps = jnp.where(listed.owners >= 0, listed.token_logps, garbage)
    # Tokens of the padding pairs are listed: only the weight says that they are padding.
    owners = jnp.pad(listed.owners, widen, constant_values=-1).at[-1, :8].set(jnp.arange(8) // 2 + 12)
    padded = Listed(
        jnp.pad(token_logps, widen, constant_values=garbage),
        owners,
        jnp.pad(listed.ref_logps, ((0, 2), (0, 0)), constant_values=garbage),
    )
    shares = shares_of(owners, jnp.array([1.0] * 6 + [0.0] * 2), reduction)
    metrics, grad = accumulated(padded, shares, 1)
    assert jax.tree.map(float, metrics) == pytest.approx(jax.tree.map(float, wanted), rel=1e-6)
    np.testing.assert_allclose(grad[:rows, :width], wanted_grad, rtol=1e-6, atol=1e-9)
    assert not np.any(np.asarray(grad[rows:])) and not np.any(np.asarray(grad[:, width:]))


def test_garbage_in_a_real_pair_is_seen() -> None:
    """The negative twin: nothing hides a NaN of a pair that counts."""
    listed = batch(6)
    shares = shares_of(listed.owners, jnp.ones(6), "global_token_mean")
    broken = listed._replace(token_logps=listed.token_logps.at[0, 0].set(math.nan))
    assert math.isnan(float(objective(*broken, shares)[0]))


def test_a_batch_of_padding_only_is_zero_not_nan() -> None:
    listed = batch(4)
    for reduction in NLL_REDUCTIONS:
        metrics, grad = accumulated(listed, shares_of(listed.owners, jnp.zeros(4), reduction), 1)
        assert set(map(float, metrics.values())) == {0.0} and not np.any(np.asarray(grad))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), eps=st.sampled_from([0.0, 0.3]))
def test_swapping_the_pair_flips_the_margin(seed: int, eps: float) -> None:
    token_logps, owners, ref_logps = batch(3, rows=2, seed=seed)
    logps = sum_all(token_logps, owners, 3)
    other = sum_all(token_logps, jnp.where(owners >= 0, owners ^ 1, -1), 3)
    np.testing.assert_array_equal(other, logps[:, ::-1])
    rewards = implicit_rewards(logps, ref_logps, BETA)
    swapped = implicit_rewards(other, ref_logps[:, ::-1], BETA)
    np.testing.assert_array_equal(swapped[:, 0] - swapped[:, 1], -(rewards[:, 0] - rewards[:, 1]))
    # -log sigmoid(m) + log sigmoid(-m) = -m, so swapping changes the loss by the margin, less the smoothing.
    margins = rewards[:, 0] - rewards[:, 1]
    change = dpo_losses(other, ref_logps[:, ::-1], BETA, eps) - dpo_losses(logps, ref_logps, BETA, eps)
    np.testing.assert_allclose(change, (1 - 2 * eps) * margins, rtol=1e-5, atol=1e-6)


def test_reductions_by_hand() -> None:
    """Responses of 1, 3 and 2 tokens, the third in a group of its own, then a padding pair."""
    tokens, real = jnp.array([1.0, 3.0, 2.0, 3.0]), jnp.array([1.0, 1.0, 1.0, 0.0])
    wanted = {
        "global_token_mean": [1 / 6, 1 / 6, 1 / 6],
        "sequence_mean": [1 / 3, 1 / 9, 1 / 6],
        "group_token_mean": [1 / 8, 1 / 8, 1 / 4],
    }
    assert set(wanted) == set(NLL_REDUCTIONS)
    for name, per_token in wanted.items():
        shares = normalise_weights(count_weights(tokens, real, NLL_REDUCTIONS[name](2)), tokens)
        np.testing.assert_allclose(shares.nll, [*per_token, 0], 1e-6)
        np.testing.assert_allclose(shares.pairs, np.asarray(real) / 3, 1e-6)


@pytest.mark.parametrize("reduction", NLL_REDUCTIONS)
def test_a_response_without_counted_tokens_has_no_part_in_the_nll(reduction: str) -> None:
    """And the others share what it leaves: the mean is over responses that have tokens."""
    tokens = jnp.array([0.0, 3.0, 2.0])
    make = NLL_REDUCTIONS[reduction](2)
    shares = normalise_weights(count_weights(tokens, jnp.ones(3), make), tokens)
    assert float(shares.nll[0]) == 0.0
    assert float(jnp.sum(shares.nll * tokens)) == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(shares.pairs, np.full(3, 1 / 3), 1e-6)


def test_parts_of_several_batches_add_up() -> None:
    """Two batches give the means over all pairs, though they differ in size, when the shares are those of all."""
    first, second = batch(5, rows=3, seed=2), batch(3, rows=2, seed=3)
    tokens = [lengths_of(x.owners, len(x.ref_logps))[:, 0] for x in (first, second)]
    tokens = jnp.concatenate(tokens).astype(jnp.float32)
    reduction = NLL_REDUCTIONS["sequence_mean"](2)
    shares = normalise_weights(count_weights(tokens, jnp.ones(8), reduction), tokens)
    owners = [first.owners, jnp.where(second.owners >= 0, second.owners + 10, -1)]
    parts = ([first.token_logps, second.token_logps], owners, [first.ref_logps, second.ref_logps])
    together = Listed(*map(jnp.concatenate, parts))
    wanted = objective(*together, shares)[1]
    parts = [
        objective(*listed, LossWeights(*(share[pairs] for share in shares)))[1]
        for listed, pairs in ((first, slice(0, 5)), (second, slice(5, 8)))
    ]
    seen = jax.tree.map(lambda a, b: float(a + b), *parts)
    assert seen == pytest.approx(jax.tree.map(float, wanted), rel=1e-6)


def test_narrower_nll_tokens_are_those_of_the_nll_only() -> None:
    token_logps, owners, ref_logps = batch(4)
    narrow = (owners >= 0) & (jnp.arange(owners.shape[1]) % 3 > 0)
    values, of_chosen = np.asarray(token_logps, np.float64), np.asarray(narrow & (owners % 2 == 0))
    tokens = jnp.asarray([np.sum(of_chosen & (np.asarray(owners) == 2 * b)) for b in range(4)], jnp.float32)
    shares = normalise_weights(count_weights(tokens, jnp.ones(4)), tokens)
    metrics = objective(token_logps, owners, ref_logps, shares, 0.0, narrow)[1]
    assert float(metrics["nll_loss"]) == pytest.approx(-values[of_chosen].mean(), rel=1e-6)
    chosen = values[(np.asarray(owners) >= 0) & (np.asarray(owners) % 2 == 0)].sum() / 4
    assert float(metrics["logps/chosen"]) == pytest.approx(chosen, rel=1e-6)


def test_sums_are_float32_for_bfloat16_log_probabilities() -> None:
    """-1025 is not a bfloat16 number: a sum or a result in that dtype would be off."""
    token_logps = jnp.full((1, 2050), -1.0, jnp.bfloat16)
    owners = (jnp.arange(2050) // 1025)[None]
    summed = sum_all(token_logps, owners, 1)
    assert summed.dtype == jnp.float32
    np.testing.assert_array_equal(summed, -1025.0)
