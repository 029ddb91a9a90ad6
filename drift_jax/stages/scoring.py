"""Scores of pairs in passes without gradient: the held-out pairs of a stage, and pairs of `drift evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.data.batches import PairLoader, batch_split
from drift_jax.data.pairs import TokenizedPair
from drift_jax.evaluation.preference import PairLogps
from drift_jax.progress import stage_progress
from drift_jax.step import KnownScores, PairScores
from drift_jax.train import Trainer


def score_pairs(
    config: RunConfig,
    trainer: Trainer,
    params: Any,
    pairs: Sequence[TokenizedPair],
    what: str,
    console: Console,
    known: KnownScores | None = None,
) -> PairScores:
    """Scores under `params`, longest first, each batch as one micro-batch.

    Policy and reference get the same batches: in bfloat16 a log-prob depends on them.

    Args:
      known: as in `Trainer.score_pairs`.
    """
    t = config.train
    loader = PairLoader(
        pairs,
        np.zeros((len(pairs), 2)),
        t.eval_batch_size or t.batch_size // t.accumulation_steps,
        1,
        config.data.max_length,
        split=batch_split(trainer.layout),
        tokens_per_device=t.tokens_per_device,
        attention=trainer.setup.attention.name,
        compile_tokens=trainer.compile_tokens(2),
    )
    with stage_progress(what, len(pairs), "pairs", console=console) as bar:
        return trainer.score_pairs(params, loader, bar.advance, known=known)


def pair_logps(
    pairs: Sequence[TokenizedPair], logps: Float[np.ndarray, "N 2"], ref_logps: Float[np.ndarray, "N 2"]
) -> PairLogps:
    """With the tokens that log-probs are of: after an empty prompt nothing predicts the first one."""
    tokens = [
        [len(side) - int(not len(pair.prompt_ids)) for side in (pair.chosen_ids, pair.rejected_ids)] for pair in pairs
    ]
    return PairLogps([pair.id for pair in pairs], logps, ref_logps, np.asarray(tokens, np.float64).reshape(-1, 2))
