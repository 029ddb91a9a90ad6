"""Drawing tokens: exact kept sets, the right distribution, keys that know only their row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from drift_jax.sampling.draw import draw_tokens, row_keys, row_words


@pytest.mark.parametrize("top_k,top_p", [(0, 0.9), (5, 1.0), (20, 0.5), (3, 0.99), (0, 0.01), (1, 1.0), (0, 1.0)])
def test_kept_tokens_are_those_of_transformers(top_k: int, top_p: float) -> None:
    """Of 20,000 draws a row none is what transformers leaves out, and nothing frequent is missing."""
    draws = 20_000
    logits = np.random.default_rng(top_k).normal(size=(3, 300)).astype(np.float32) * 3
    scores = torch.from_numpy(logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)  # type: ignore[arg-type]
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)  # type: ignore[arg-type]
    expected = torch.softmax(scores, -1).numpy()
    keys = row_keys(1, jnp.asarray(row_words((str(i), 0) for i in range(draws))))
    draw = jax.jit(lambda row: draw_tokens(jnp.broadcast_to(row, (draws, 300)), keys, 1.0, top_k, top_p).ids)
    for row, kept in zip(logits, expected, strict=True):
        counts = np.bincount(np.asarray(draw(jnp.asarray(row))), minlength=300)
        assert counts[kept == 0].sum() == 0
        assert (counts[kept > 1e-3] > 0).all()


@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (0, 0.9), (5, 0.9), (5, 0.1)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_end_the_draw(bad: float, top_k: int, top_p: float) -> None:
    """One row is broken, and says so; the other is drawn as if alone."""
    logits = np.random.default_rng(3).normal(size=(2, 300)).astype(np.float32)
    keys = row_keys(1, jnp.asarray(row_words((str(i), 0) for i in range(2))))
    whole = draw_tokens(jnp.asarray(logits), keys, 1.0, top_k, top_p)
    logits[0, 7] = bad
    drawn = draw_tokens(jnp.asarray(logits), keys, 1.0, top_k, top_p)
    assert not np.isfinite(drawn.logps[0])
    assert drawn.ids[1] == whole.ids[1] and drawn.logps[1] == whole.logps[1]


def test_log_probs_are_those_of_the_logits_as_they_are() -> None:
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(5, 300)).astype(np.float32) * 3)
    keys = row_keys(1, jnp.asarray(row_words((str(i), 0) for i in range(5))))
    expected = np.asarray(jax.nn.log_softmax(logits))
    for temperature in (0.0, 0.7):
        drawn = draw_tokens(logits, keys, temperature, 0, 0.9)
        np.testing.assert_allclose(drawn.logps, expected[np.arange(5), np.asarray(drawn.ids)], rtol=1e-5)
    assert (np.asarray(draw_tokens(logits, keys, 0.0, 0, 1.0).ids) == expected.argmax(axis=1)).all()


def test_draws_follow_the_kept_softmax() -> None:
    """Chi-square over 20,000 draws at temperature 0.7, top_k 12, top_p 0.9."""
    draws, vocab = 20_000, 40
    logits = np.random.default_rng(1).normal(size=vocab) * 2
    warped = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(12)(None, torch.from_numpy(logits[None]) / 0.7))  # type: ignore
    expected = torch.softmax(warped, -1)[0].numpy()
    keys = row_keys(3, jnp.asarray(row_words((str(i), 0) for i in range(draws))))
    tokens = draw_tokens(jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, vocab)), keys, 0.7, 12, 0.9).ids
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept] / expected[kept].sum() * draws).pvalue > 1e-3
    # The negative twin: the same draws are not from the distribution without temperature.
    wrong = np.where(kept, np.exp(logits), 0)
    assert stats.chisquare(counts[kept], wrong[kept] / wrong.sum() * draws).pvalue < 1e-6


def test_a_row_key_depends_on_seed_row_and_sample_only() -> None:
    rows = [("a", 0), ("b", 0), ("a", 1)]
    data = jax.random.key_data(row_keys(1, jnp.asarray(row_words(rows))))
    assert len({tuple(row.tolist()) for row in np.asarray(data)}) == 3
    backwards = jax.random.key_data(row_keys(1, jnp.asarray(row_words(rows[::-1]))))
    np.testing.assert_array_equal(backwards[::-1], data)
    assert (np.asarray(jax.random.key_data(row_keys(2, jnp.asarray(row_words(rows))))) != np.asarray(data)).any()
