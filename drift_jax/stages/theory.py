"""Measuring what Lemma 1 speaks of while a stage trains (`theory.py`), on the same few pairs all along.

Every measured pair takes a forward and a backward pass of its own, in a row of its own, on all devices of the mesh. So
a measurement of M pairs costs about as much as M micro-batches of one row a device; `theory/seconds` says what it took.
Nothing of it touches the training state.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console
from typing_extensions import TypedDict  # pydantic needs it on Python 3.11

from drift_jax.config import RunConfig
from drift_jax.data.batches import PairLoader, batch_split
from drift_jax.data.pairs import TokenizedPair
from drift_jax.distributed import on_main
from drift_jax.files import write_jsonl
from drift_jax.journal import read_rows
from drift_jax.progress import stage_progress
from drift_jax.stages.reference import RefLogps, share_ref_logps, write_ref_logps
from drift_jax.theory import Lemma, PairGradients, apply_lemma, lemma_metrics, retention_metrics
from drift_jax.train import Trainer

PAIRS_FILE = "theory_pairs.jsonl"
_REFERENCE_FILE = "theory_ref_logps.npz"
_PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")


class _Row(TypedDict):
    """Of theory_pairs.jsonl, as far as it is read."""

    id: str
    margin: float
    beta: float
    ref_logps: list[float]
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def draw_probe(count: int, wanted: int, seed: int) -> Int[np.ndarray, " M"]:
    """Which of `count` pairs are measured, in their order: the same in every call."""
    order = np.random.Generator(np.random.PCG64([seed, 1])).permutation(count)
    return np.sort(order[:wanted])


@final
class Probe:
    """The pairs of a stage that are measured.

    Args:
      pairs: all that the stage trains on.
      earlier: directories of the stages before, whose pairs are measured again when this one ends.
    """

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        pairs: Sequence[TokenizedPair],
        out_dir: Path,
        earlier: Sequence[Path],
        console: Console,
    ) -> None:
        self._config, self._trainer, self._console = config, trainer, console
        self._out_dir, self._earlier = out_dir, tuple(earlier)
        self.rows = draw_probe(len(pairs), config.theory.pairs, config.train.seed)
        self._pairs = [pairs[row] for row in self.rows]
        stored = share_ref_logps(out_dir / _REFERENCE_FILE, self._pairs)
        self._ref_logps = None if stored is None else stored.logps

    @property
    def has_reference(self) -> bool:
        return self._ref_logps is not None

    def refer(self, params: Any) -> None:
        """Takes the reference's log-probs from its parameters, by the program that measures the policy.

        In bfloat16 a log-prob depends on the shape of its batch, by up to a nat: those that training has are of others.
        """
        logps = self._measure(params, self._pairs, "reference of the theory").logps
        ref = RefLogps(logps, np.zeros_like(logps))
        on_main(lambda: write_ref_logps(self._out_dir / _REFERENCE_FILE, self._pairs, ref))
        self._ref_logps = logps

    def refer_to(self, ref_logps: Float[np.ndarray, "N 2"]) -> None:
        """Takes those that training has, of all its pairs: where the reference is not at hand any more."""
        self._ref_logps = ref_logps[self.rows]

    def measure(self, params: Any, last: bool) -> dict[str, float]:
        """`theory/*` of the policy as it is; at the end of the stage also what is left of earlier stages' margins."""
        start, theory, beta = time.monotonic(), self._config.theory, self._config.train.beta
        assert self._ref_logps is not None
        lemma = apply_lemma(self._measure(params, self._pairs, "theory"), self._ref_logps, beta)
        metrics = lemma_metrics(lemma, beta, theory.tau)
        if last:
            on_main(lambda: write_jsonl(self._out_dir / PAIRS_FILE, self._to_rows(lemma)))
            for directory in self._earlier:
                metrics |= self._retention(params, directory)
        return metrics | {"theory/seconds": time.monotonic() - start}

    def _measure(self, params: Any, pairs: Sequence[TokenizedPair], what: str) -> PairGradients:
        layout, data = self._trainer.layout, self._config.data
        loader = PairLoader(
            pairs,
            np.zeros((len(pairs), 2)),
            batch_size=1,
            accumulation_steps=1,
            max_length=data.max_length,
            split=batch_split(layout),
            attention=self._trainer.setup.attention.name,
            compile_tokens=self._trainer.compile_tokens(6),
        )
        with stage_progress(what, len(pairs), "pairs", console=self._console) as bar:
            return self._trainer.measure_pairs(params, loader, bar.advance)

    def _to_rows(self, lemma: Lemma) -> list[dict[str, Any]]:
        assert self._ref_logps is not None
        return [
            {
                "id": pair.id,
                "margin": float(lemma.margins[i]),
                "weight": float(lemma.weights[i]),
                "d_norm": float(lemma.norms[i]),
                "grad_norm": float(lemma.grad_norms[i]),
                "beta": self._config.train.beta,
                "ref_logps": self._ref_logps[i].tolist(),
                **{part: getattr(pair, part).tolist() for part in _PARTS},
            }
            for i, pair in enumerate(self._pairs)
        ]

    def _retention(self, params: Any, directory: Path) -> dict[str, float]:
        """What is left of the margins of an earlier stage, against the reference that it had."""
        path = directory / PAIRS_FILE
        rows = on_main(lambda: read_rows(path, form=_Row) if path.exists() else [])
        if not rows:
            return {}
        pairs = [_from_row(row) for row in rows]
        found = self._measure(params, pairs, f"theory: pairs of {directory.name}")
        refs = np.array([row["ref_logps"] for row in rows])
        now = apply_lemma(found, refs, rows[0]["beta"]).margins
        return retention_metrics(directory.name, np.array([row["margin"] for row in rows]), now)


def _from_row(row: dict[str, Any]) -> TokenizedPair:
    prompt, chosen, rejected = (np.asarray(row[part], np.int32) for part in _PARTS)
    return TokenizedPair(row["id"], prompt, chosen, rejected)
