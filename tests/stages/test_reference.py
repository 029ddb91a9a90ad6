"""The journal of a reference pass that is ended in its midst."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from drift_jax.data.pairs import TokenizedPair
from drift_jax.stages import reference
from drift_jax.stages.reference import RefJournal, journal_path
from drift_jax.step import PairScores


def test_a_log_prob_that_is_not_finite_is_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no NaN: a row with one would make the journal unreadable, or end the pass where `skip` lets it go on."""
    monkeypatch.setattr(reference, "_WRITE_S", -1.0)  # every batch is written
    ids = [np.array([k, 1], np.int32) for k in range(3)]
    pairs = [TokenizedPair(str(k), prompt, prompt, prompt) for k, prompt in enumerate(ids)]
    logps = np.array([[-1.0, -2.0], [np.nan, -2.0], [-3.0, -np.inf]])
    scores = PairScores(logps, logps, logps[:, 0], np.ones(3))
    with RefJournal(tmp_path, pairs) as journal:
        journal.part(0, 3).keep(np.arange(3), scores)
    assert len(journal_path(tmp_path / "ref_logps.npz").read_text().splitlines()) == 1
    with RefJournal(tmp_path, pairs) as again:
        assert again.part(0, 3).pairs.tolist() == [True, False, False]
