"""The preference maths against torch in float64, under accumulation, padding and swapping."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_jax.losses import (
    NLL_REDUCTIONS,
    LossTotals,
    LossWeights,
    chosen_nll_sum,
    count_weights,
    dpo_losses,
    implicit_rewards,
    normalise_weights,
    preference_loss,
    sum_logps,
    sum_weights,
)

BETA, ALPHA = 0.1, 0.5  # alpha far above the recipe's 0.001, so that an error in the NLL shows in the loss


def batch(pairs: int, length: int = 12, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token log-probabilities, ragged masks with a masked prompt, and reference sums near the policy's."""
    rng = np.random.default_rng(seed)
    token_logps = -rng.gamma(1.0, 2.0, (pairs, 2, length)).astype(np.float32)
    start = rng.integers(0, 3, (pairs, 1, 1))
    stop = rng.integers(4, length + 1, (pairs, 2, 1))
    mask = (np.arange(length) >= start) & (np.arange(length) < stop)
    ref_logps = (token_logps * mask).sum(-1) + rng.normal(0, 3, (pairs, 2))
    return jnp.asarray(token_logps), jnp.asarray(mask), jnp.asarray(ref_logps, jnp.float32)


@partial(jax.jit, static_argnums=2)
def shares_of(mask: jax.Array, pair_weights: jax.Array, reduction: str) -> LossWeights:
    return normalise_weights(count_weights(mask[:, 0], pair_weights, NLL_REDUCTIONS[reduction](4)))


@partial(jax.jit, static_argnums=4)
def objective(token_logps, mask, ref_logps, shares, label_smoothing=0.0):
    return preference_loss(
        token_logps, mask, ref_logps, shares, beta=BETA, label_smoothing=label_smoothing, rpo_alpha=ALPHA
    )


value_and_grad = jax.jit(jax.value_and_grad(objective, has_aux=True), static_argnums=4)


def torch_objective(token_logps, mask, ref_logps, eps, reduction, group=4):
    """The same in torch float64, written pair by pair from the definitions."""
    mask = torch.tensor(np.asarray(mask))
    ref = torch.tensor(np.asarray(ref_logps), dtype=torch.float64)
    logps = torch.where(mask, token_logps, 0.0).sum(-1)
    margins = BETA * ((logps[:, 0] - logps[:, 1]) - (ref[:, 0] - ref[:, 1]))
    logsigmoid = torch.nn.functional.logsigmoid
    dpo = (-logsigmoid(margins) * (1 - eps) - logsigmoid(-margins) * eps).mean()
    tokens = [-token_logps[b, 0][mask[b, 0]] for b in range(len(mask))]
    groups = {
        "global_token_mean": [tokens],
        "group_token_mean": [tokens[i : i + group] for i in range(0, len(tokens), group)],
        "sequence_mean": [[t] for t in tokens],
    }[reduction]
    nll = torch.stack([torch.cat(g).mean() for g in groups]).mean()
    return dpo + ALPHA * nll, dpo, nll, BETA * (logps - ref), logps


@pytest.mark.parametrize("reduction", NLL_REDUCTIONS)
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_loss_metrics_and_gradients_equal_torch_float64(reduction: str, eps: float) -> None:
    token_logps, mask, ref_logps = batch(10)  # 10: the last group of 4 is short
    shares = shares_of(mask, jnp.ones(10), reduction)
    (loss, metrics), grad = jax.value_and_grad(objective, has_aux=True)(token_logps, mask, ref_logps, shares, eps)

    wanted_tokens = torch.tensor(np.asarray(token_logps), dtype=torch.float64, requires_grad=True)
    total, _, nll, rewards, logps = torch_objective(wanted_tokens, mask, ref_logps, eps, reduction)
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
    assert np.all(np.asarray(grad)[~np.asarray(mask)] == 0)


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
    token_logps, mask, _ = batch(5)
    shares = shares_of(mask, jnp.ones(5), "global_token_mean")
    _, metrics = objective(token_logps, mask, sum_logps(token_logps, mask), shares, eps)
    dpo = float(metrics["loss"] - ALPHA * metrics["nll_loss"])
    assert dpo == pytest.approx(math.log(2), rel=1e-6)
    assert float(metrics["rewards/margins"]) == 0.0
    assert float(metrics["rewards/accuracies"]) == 0.0, "equal rewards must not count as accurate"


def accumulated(token_logps, mask, ref_logps, shares, micro_batches):
    """Sums of the loss, the metrics and the gradient over equal slices of the batch."""

    def cut(x: jax.Array) -> list[np.ndarray]:
        return np.split(np.asarray(x), micro_batches)

    parts = [
        value_and_grad(t, m, r, LossWeights(p, n))
        for t, m, r, p, n in zip(*map(cut, (token_logps, mask, ref_logps, *shares)), strict=True)
    ]
    metrics = jax.tree.map(lambda *values: sum(values), *(aux for (_, aux), _ in parts))
    return metrics, jnp.concatenate([grad for _, grad in parts])


@pytest.mark.parametrize("reduction", NLL_REDUCTIONS)
@pytest.mark.parametrize("real_pairs", [8, 6])
def test_accumulation_is_exact(reduction: str, real_pairs: int) -> None:
    token_logps, mask, ref_logps = batch(8)
    shares = shares_of(mask, (jnp.arange(8) < real_pairs).astype(jnp.float32), reduction)
    whole, whole_grad = accumulated(token_logps, mask, ref_logps, shares, 1)
    for micro_batches in (2, 8):
        metrics, grad = accumulated(token_logps, mask, ref_logps, shares, micro_batches)
        assert jax.tree.map(float, metrics) == pytest.approx(jax.tree.map(float, whole), rel=2e-6, abs=1e-6)
        np.testing.assert_allclose(grad, whole_grad, rtol=1e-6, atol=1e-9)


def test_mean_of_micro_batch_means_is_not_exact() -> None:
    """The negative twin: shares made per micro-batch and averaged, as trainers commonly do."""
    token_logps, mask, ref_logps = batch(8)
    whole, _ = objective(token_logps, mask, ref_logps, shares_of(mask, jnp.ones(8), "global_token_mean"))
    means = [
        objective(t, m, r, shares_of(m, jnp.ones(1), "global_token_mean"))[0]
        for t, m, r in zip(*(jnp.split(x, 8) for x in (token_logps, mask, ref_logps)), strict=True)
    ]
    assert abs(float(sum(means)) / 8 - float(whole)) > 1e-2


@pytest.mark.parametrize("reduction", NLL_REDUCTIONS)
@pytest.mark.parametrize("garbage", [0.0, math.nan, -math.inf])
def test_padding_pairs_and_masked_tokens_change_nothing(reduction: str, garbage: float) -> None:
    token_logps, mask, ref_logps = batch(6)
    wanted, wanted_grad = accumulated(token_logps, mask, ref_logps, shares_of(mask, jnp.ones(6), reduction), 1)
    widen = ((0, 2), (0, 0), (0, 5))
    padded = jnp.pad(jnp.where(mask, token_logps, garbage), widen, constant_values=garbage)
    # The mask of the padding pairs claims tokens: only the weight says that they are padding.
    wide_mask = jnp.pad(mask, widen).at[6:].set(True)
    wide_ref = jnp.pad(ref_logps, ((0, 2), (0, 0)), constant_values=garbage)
    shares = shares_of(wide_mask, jnp.array([1.0] * 6 + [0.0] * 2), reduction)
    metrics, grad = accumulated(padded, wide_mask, wide_ref, shares, 1)
    assert jax.tree.map(float, metrics) == pytest.approx(jax.tree.map(float, wanted), rel=1e-6)
    np.testing.assert_allclose(grad[:6, :, :12], wanted_grad, rtol=1e-6, atol=1e-9)
    assert not np.any(np.asarray(grad[6:])) and not np.any(np.asarray(grad[:, :, 12:]))


def test_a_batch_of_padding_only_is_zero_not_nan() -> None:
    token_logps, mask, ref_logps = batch(4)
    for reduction in NLL_REDUCTIONS:
        metrics, grad = accumulated(token_logps, mask, ref_logps, shares_of(mask, jnp.zeros(4), reduction), 1)
        assert set(map(float, metrics.values())) == {0.0} and not np.any(np.asarray(grad))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), eps=st.sampled_from([0.0, 0.3]))
def test_swapping_the_pair_flips_the_margin(seed: int, eps: float) -> None:
    token_logps, mask, ref_logps = batch(3, seed=seed)
    logps = sum_logps(token_logps, mask)
    rewards = implicit_rewards(logps, ref_logps, BETA)
    swapped = implicit_rewards(logps[:, ::-1], ref_logps[:, ::-1], BETA)
    np.testing.assert_array_equal(swapped[:, 0] - swapped[:, 1], -(rewards[:, 0] - rewards[:, 1]))
    # -log sigmoid(m) + log sigmoid(-m) = -m, so swapping changes the loss by the margin, less the smoothing.
    margins = rewards[:, 0] - rewards[:, 1]
    change = dpo_losses(logps[:, ::-1], ref_logps[:, ::-1], BETA, eps) - dpo_losses(logps, ref_logps, BETA, eps)
    np.testing.assert_allclose(change, (1 - 2 * eps) * margins, rtol=1e-5, atol=1e-6)


def test_reductions_by_hand() -> None:
    """Responses of 1, 3 and 2 tokens, the third in a group of its own, then a padding pair."""
    mask = jnp.array([[1, 0, 0], [1, 1, 1], [0, 1, 1], [1, 1, 1]], bool)
    real = jnp.array([1.0, 1.0, 1.0, 0.0])
    group = NLL_REDUCTIONS["group_token_mean"](2)
    wanted = {
        NLL_REDUCTIONS["global_token_mean"](2): [1 / 6, 1 / 6, 1 / 6],
        NLL_REDUCTIONS["sequence_mean"](2): [1 / 3, 1 / 9, 1 / 6],
        group: [1 / 8, 1 / 8, 1 / 4],
    }
    for reduction, per_token in wanted.items():
        shares = normalise_weights(count_weights(mask, real, reduction))
        np.testing.assert_allclose(shares.nll, np.asarray(mask) * np.array([[x] for x in [*per_token, 0]]), 1e-6)
        np.testing.assert_allclose(shares.pairs, np.asarray(real) / 3, 1e-6)


def test_totals_of_several_batches_add_up() -> None:
    """An evaluation over two batches gives the means over all pairs, though the batches differ in size."""
    first, second = batch(5, seed=2), batch(3, seed=3)
    together = [jnp.concatenate(parts) for parts in zip(first, second, strict=True)]
    wanted = objective(*together, shares_of(together[1], jnp.ones(8), "sequence_mean"))[1]
    counted = [
        count_weights(mask[:, 0], jnp.ones(len(mask)), NLL_REDUCTIONS["sequence_mean"](2))
        for _, mask, _ in (first, second)
    ]
    totals = LossTotals(*(sum(parts) for parts in zip(*map(sum_weights, counted), strict=True)))
    parts = [
        objective(*data, normalise_weights(weights, totals))[1]
        for data, weights in zip((first, second), counted, strict=True)
    ]
    seen = jax.tree.map(lambda a, b: float(a + b), *parts)
    assert seen == pytest.approx(jax.tree.map(float, wanted), rel=1e-6)


def test_a_narrower_nll_mask_skips_tokens_of_the_nll_only() -> None:
    token_logps, mask, ref_logps = batch(4)
    narrow = mask[:, 0].at[:, 5:].set(False)
    shares = normalise_weights(count_weights(narrow, jnp.ones(4)))
    metrics = objective(token_logps, mask, ref_logps, shares)[1]
    nll, tokens = chosen_nll_sum(token_logps[:, :, :5], mask[:, :, :5])
    assert float(metrics["nll_loss"]) == pytest.approx(float(nll.sum() / tokens.sum()), rel=1e-6)
    assert float(metrics["logps/chosen"]) == pytest.approx(float(sum_logps(token_logps, mask)[:, 0].mean()), rel=1e-6)


def test_chosen_nll_sum_counts_the_chosen_side() -> None:
    token_logps, mask, _ = batch(4)
    nll, tokens = chosen_nll_sum(token_logps, mask.astype(jnp.float32))
    np.testing.assert_allclose(nll, -np.asarray(sum_logps(token_logps, mask))[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(tokens, np.asarray(mask)[:, 0].sum(-1))


def test_sums_are_float32_for_bfloat16_log_probabilities() -> None:
    """-1025 is not a bfloat16 number: a sum or a result in that dtype would be off."""
    token_logps = jnp.full((1, 2, 1025), -1.0, jnp.bfloat16)
    summed = sum_logps(token_logps, jnp.ones((1, 2, 1025), bool))
    assert summed.dtype == jnp.float32
    np.testing.assert_array_equal(summed, -1025.0)
