"""Which of two drawn replies is the better one: a function per name of `recipe.ranker`, or one of the user's own.

logprob          the one with the higher mean log-prob a token, each under the policy and the prompt it was drawn by
judge            the one that a model names, as in `stages/choose.py`
MODULE:FUNCTION  the one with the higher score of `FUNCTION(record, reply) -> float`, a function of a module that Python
                 can import; `record` is a `records.DsatRecord`
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.errors import ConfigError, StageError
from drift_jax.evaluation.entry_points import import_named
from drift_jax.methods import Record
from drift_jax.stages.choose import CHOOSERS, Candidates

TIED = "ranked alike"
NO_VERDICT = "no verdict"

Score = Callable[[Record, str], float]


@dataclass(frozen=True)
class Ranking:
    """The place of the better reply of two, and why, as JSON values."""

    best: int | None  # None: neither is preferred, for the reason `why`
    evidence: dict[str, Any]
    why: str = ""


Ranker = Callable[[Sequence[Candidates], RunConfig, Path, Console], list[Ranking]]


def build_ranker(name: str) -> Ranker:
    """The ranker that `recipe.ranker` names.

    Raises:
      ConfigError: there is no such module or function, or the module cannot be imported.
    """
    return RANKERS[name] if name in RANKERS else partial(_by_function, load_score(name))


def load_score(name: str) -> Any:
    """The function `MODULE:FUNCTION`. Raises `ConfigError` when Python does not find it or cannot import it."""
    module, _, function = name.partition(":")
    try:
        score = getattr(import_named(module, f"recipe.ranker {name}"), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"recipe.ranker: there is no function {name}: {error}. Python must be able to import the module: install "
            "it, or name its directory in PYTHONPATH."
        ) from None
    if not callable(score):
        raise ConfigError(f"recipe.ranker: {name} is no function but {score!r:.80}.")
    return score


def ranker_source(name: str) -> Path | None:
    """The file of the user's function: its content is part of what pairs are made from. None for rankers of ours."""
    if name in RANKERS:
        return None
    load_score(name)
    file = inspect.getsourcefile(importlib.import_module(name.partition(":")[0]))
    return Path(file) if file else None


def _by_scores(scores: Sequence[float], name: str) -> Ranking:
    evidence = {name: list(scores)}
    if scores[0] == scores[1]:
        return Ranking(None, evidence, TIED)
    return Ranking(int(scores[1] > scores[0]), evidence)


def _by_logprob(candidates: Sequence[Candidates], config: RunConfig, out_dir: Path, console: Console) -> list[Ranking]:
    return [_by_scores([row["mean_logp"] for row in one.rows], "mean_logp") for one in candidates]


def _by_judge(candidates: Sequence[Candidates], config: RunConfig, out_dir: Path, console: Console) -> list[Ranking]:
    """Raises `StageError` where the judge fails on all records, or gives no answers any more."""
    choices = CHOOSERS["judge"](candidates, config, out_dir, console)
    return [
        Ranking(None, choice.evidence, NO_VERDICT)
        if "failed" in choice.evidence
        else Ranking(choice.index, choice.evidence)
        for choice in choices
    ]


def _by_function(
    score: Score, candidates: Sequence[Candidates], config: RunConfig, out_dir: Path, console: Console
) -> list[Ranking]:
    """Raises `StageError` where the function raises, or gives no number."""

    def rate(record: Record, reply: str) -> float:
        try:
            value = float(score(record, reply))
        except Exception as error:
            raise StageError(
                f"recipe.ranker {config.recipe.ranker} failed on record {record.id}: {type(error).__name__}: {error}. "
                "Mend it and run again: completions are kept."
            ) from error
        if not math.isfinite(value):
            raise StageError(
                f"recipe.ranker {config.recipe.ranker} gave {value} for record {record.id}: a number is needed."
            )
        return value

    return [_by_scores([rate(one.record, row["text"]) for row in one.rows], "scores") for one in candidates]


RANKERS: Mapping[str, Ranker] = {"logprob": _by_logprob, "judge": _by_judge}
