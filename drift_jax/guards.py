"""What a stage watches while it runs: errors where a number cannot be right, warnings where people would want to look.

Everything here works on numbers that are already on the host. Errors stop the stage (`StageError`); warnings are
strings for the caller to show and to keep.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np

from drift_jax.config import TrainConfig
from drift_jax.errors import StageError

FIRST_LOSS_TOLERANCE = 1e-3  # nats
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8}  # of a log-prob, relative, between two programs

# The least share of the parameters with a gradient that an update at the peak learning rate must change. A float32
# weight of 0.02 takes any update above 1e-9. Of bfloat16 weights stochastic rounding changes about |update| / spacing,
# 1e-4 to 1e-2 at the usual learning rates, and that few are right on average; so only "none at all" is wrong there.
LEAST_CHANGED = {"float32": 0.9, "bfloat16": 1e-6}

WINDOW = 10  # updates whose mean is looked at; a shorter stage takes half of its updates
SHORTEST_WINDOW = 3  # updates; a mean of fewer says nothing, so that a stage of under 6 updates never warns
DISPLACED_NATS = 1.0  # the chosen replies have become e times less likely: below that it is noise near 0
NOISE_ERRORS = 5.0  # and by so many standard errors of the mean: a stage looks at hundreds of windows
COLLAPSE_FACTOR = 2.0  # rejected log-probs this many times the reference's: each token lost its share once more
COLLAPSE_REWARD = -1.0  # and the reward is below this: replies of a few tokens double their log-prob early
IDS_SHOWN = 5
PAIRS_SHOWN = 8  # of an update: the pair that is to blame is one of them
MOST_SKIPPED = 10  # updates in a row whose gradient is not finite


def check_first_loss(metrics: Mapping[str, float], config: TrainConfig, compute_dtype: str = "float32") -> None:
    """Policy and reference are the same model before the first update, so its DPO loss is ln 2.

    In float32 it is so within `FIRST_LOSS_TOLERANCE`. In bfloat16 the reference pass and the step, which are different
    programs, round a log-prob of n nats differently by up to about n / 256 (bfloat16 keeps 8 bits), and the loss may
    miss ln 2 by half of beta times that.

    Raises:
      StageError: it is not: the two passes do not compute the same log-probabilities.
    """
    dpo = metrics["loss"] - config.rpo_alpha * metrics["nll_loss"]
    nats = max(abs(metrics["logps/chosen"]), abs(metrics["logps/rejected"]))
    tolerance = max(FIRST_LOSS_TOLERANCE, 0.5 * config.beta * nats * ROUNDING[compute_dtype])
    if not abs(dpo - math.log(2)) < tolerance:
        raise StageError(
            f"the DPO loss of the first update is {dpo:.6f}, not ln 2 = {math.log(2):.6f} within {tolerance:.1g} "
            f"({compute_dtype}): the reference log-probabilities do not belong to the policy the stage starts from. "
            "Remove ref_logps.npz of this stage if you changed the model by hand; otherwise this is a bug."
        )


def check_params_changed(step: int, metrics: Mapping[str, float], config: TrainConfig) -> list[str]:
    """The first update with a learning rate above 0 must reach the weights; call it after every update.

    That update is the first one, or the second where there is a warm-up. `metrics["params_changed"]` is
    `optim.changed_at_peak`: what counts is whether the weights can take the updates of this run, and the first
    ones of a long warm-up are so small that sound float32 weights lose many of them.

    Returns:
      A line for the user when this is that update.

    Raises:
      StageError: it changes too few of the parameters that have a gradient (`LEAST_CHANGED`).
    """
    warm_up = config.warmup_steps is not None or config.warmup_ratio > 0
    if step != (2 if warm_up else 1):
        return []
    share, least = metrics["params_changed"], LEAST_CHANGED[config.master_dtype]
    if not share >= least:
        raise StageError(
            f"update {step}, scaled from its learning rate of {metrics['learning_rate']:.3g} to the peak of "
            f"{config.learning_rate:.3g}, changes {share:.4%} of the parameters that have a gradient; with "
            f"train.master_dtype={config.master_dtype} it must be at least {least:.4%}. Updates below the spacing of "
            "the weights' dtype are lost: keep float32 weights (bfloat16 ones need the stochastic rounding of "
            "train.master_dtype=bfloat16), or raise train.learning_rate."
        )
    return [
        f"update {step} changes {share:.1%} of the parameters that have a gradient, at the peak learning rate of "
        f"{config.learning_rate:.3g}"
    ]


@final
class FiniteWatch:
    """Finds updates whose gradient is not finite: an error, or with `train.on_nonfinite: skip` a warning and a count.

    Such an update is one whose `grad_norm` is NaN or infinite. Skipped, it has changed neither weights nor moments, and
    its number is used up: the schedule and the order of the pairs go on.

    Args:
      rows: those of metrics.jsonl when a stage is resumed.
    """

    def __init__(self, config: TrainConfig, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._skips = config.on_nonfinite == "skip"
        self._in_a_row = self._last = 0
        self.skipped = 0
        for row in rows:
            self._count(row["step"], row)

    def update(self, step: int, metrics: Mapping[str, float], ids: Sequence[str]) -> list[str]:
        """Takes the metrics of an update and the ids of its pairs, and returns what to warn of.

        Raises:
          StageError: it is not finite and is to stop the stage, or `MOST_SKIPPED` have come one after the other.
        """
        if not self._count(step, metrics):
            return []
        norm, loss = metrics["grad_norm"], metrics["loss"]
        hidden = len(ids) - PAIRS_SHOWN
        pairs = ", ".join(ids[:PAIRS_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
        what = f"the gradient of update {step} is not finite (norm {norm}, loss {loss}); its pairs: {pairs}"
        if not self._skips:
            raise StageError(
                f"{what}. Nothing of it is saved: the newest checkpoint is of an update before. Look at these pairs; "
                "where a half-precision model overflows, take model.compute_dtype=float32 or a lower "
                "train.learning_rate. With train.on_nonfinite=skip the same command leaves such updates out, and "
                "counts them."
            )
        if self._in_a_row >= MOST_SKIPPED:
            raise StageError(
                f"{what}. It is the {self._in_a_row}th in a row, which is no accident of the data: the weights or the "
                "reference log-probabilities may be damaged, or the learning rate is too high."
            )
        return [f"{what}. It is left out"]

    def _count(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether the update is one of those."""
        if math.isfinite(metrics.get("grad_norm", 0.0)):
            return False
        self._in_a_row = self._in_a_row + 1 if step == self._last + 1 else 1
        self._last = step
        self.skipped += 1
        return True


@final
class RewardWatch:
    """Warns when both rewards fall and when rejected log-probs collapse, each at most once in a stage.

    Looks at means over the last `WINDOW` rows and the `WINDOW` rows before. Rows whose numbers are missing or not
    finite are passed over.

    Args:
      total_steps: updates of the stage; below 2 * WINDOW the windows are half of it.
      rows: those of metrics.jsonl when a stage is resumed; what they warn of is in `earlier`. They may lie several
        updates apart; a window then reaches further back.
    """

    def __init__(self, config: TrainConfig, total_steps: int, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._config = config
        self._size = min(WINDOW, total_steps // 2)
        self._rows: deque[_Row] = deque(maxlen=2 * self._size)
        self._warned: set[str] = set()
        self.earlier = [message for row in rows for message in self.update(row["step"], row)]

    def update(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Takes the metrics of an update and returns new warnings. A step that was already seen is ignored."""
        row = _read_row(step, metrics, self._config.beta)
        if row is None or self._size < SHORTEST_WINDOW or (self._rows and step <= self._rows[-1].step):
            return []
        self._rows.append(row)
        if len(self._rows) < 2 * self._size:
            return []
        rows = list(self._rows)
        before, now = _mean(rows[: self._size]), _mean(rows[self._size :])
        found = {kind: rule(before, now, self._config) for kind, rule in _RULES.items() if kind not in self._warned}
        new = {kind: warning for kind, warning in found.items() if warning is not None}
        self._warned |= new.keys()
        return list(new.values())


def emptied_warning(ids: Sequence[str], total: int, what: str) -> str | None:
    """A warning when cutting left nothing of a completion, else None.

    Args:
      ids: of the pairs that lost one.
      total: pairs before any was left out.
      what: which pairs, such as "train".
    """
    if not ids:
        return None
    hidden = len(ids) - IDS_SHOWN
    shown = ", ".join(ids[:IDS_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
    return (
        f"{len(ids)} of {total} {what} pairs ({len(ids) / total:.1%}) lost a completion to cutting, all of its tokens, "
        f"and are left out: {shown}. Raise data.max_length, or let prompts give way: lower data.max_prompt_length and "
        "choose a data.truncation that looks at it (keep_prompt_end)."
    )


class _Row(NamedTuple):
    """One update. Nats; a log-ratio is log(policy / reference), the reward without beta."""

    step: int
    chosen_ratio: float
    rejected_ratio: float
    rejected_logps: float


class _Window(NamedTuple):
    """Means over consecutive rows."""

    updates: str
    chosen_ratio: float
    chosen_variance: float  # of the mean
    rejected_ratio: float
    rejected_logps: float


def _read_row(step: int, metrics: Mapping[str, Any], beta: float) -> _Row | None:
    names = ("rewards/chosen", "rewards/rejected", "logps/rejected")
    chosen, rejected, logps = (float(metrics.get(name, math.nan)) for name in names)
    row = _Row(step, chosen / beta, rejected / beta, logps)
    return row if all(map(math.isfinite, row)) else None


def _mean(rows: Sequence[_Row]) -> _Window:
    table = np.array(rows, dtype=np.float64)
    _, chosen, rejected, logps = (float(value) for value in table.mean(axis=0))
    variance = float(table[:, 1].var(ddof=1)) / len(rows)
    return _Window(f"{rows[0].step} to {rows[-1].step}", chosen, variance, rejected, logps)


def _both_fall(before: _Window, now: _Window, config: TrainConfig) -> str | None:
    """Likelihood displacement (Razin et al. 2024, arXiv 2410.08847)."""
    fall = now.chosen_ratio < before.chosen_ratio and now.rejected_ratio < before.rejected_ratio
    error = math.sqrt((before.chosen_variance + now.chosen_variance) / 2)
    if not fall or now.chosen_ratio > -max(DISPLACED_NATS, NOISE_ERRORS * error):
        return None
    beta = config.beta
    return (
        f"both rewards fall: from updates {before.updates} to updates {now.updates} the mean of rewards/chosen went "
        f"from {beta * before.chosen_ratio:.4f} to {beta * now.chosen_ratio:.4f} ({now.chosen_ratio:.2f} nats against "
        f"the reference), that of rewards/rejected from {beta * before.rejected_ratio:.4f} to "
        f"{beta * now.rejected_ratio:.4f}. The chosen replies become less likely too (likelihood displacement): "
        "probability moves to replies that are in neither set. People raise train.rpo_alpha "
        f"(now {config.rpo_alpha:g}) or lower train.learning_rate (now {config.learning_rate:g})."
    )


def _rejected_collapse(_: _Window, now: _Window, config: TrainConfig) -> str | None:
    reference = now.rejected_logps - now.rejected_ratio
    reward = config.beta * now.rejected_ratio
    if reward > COLLAPSE_REWARD or not now.rejected_logps < COLLAPSE_FACTOR * reference:
        return None
    return (
        f"rejected log-probs collapse: over updates {now.updates} the mean of logps/rejected is "
        f"{now.rejected_logps:.1f} nats, below {COLLAPSE_FACTOR:g} times the reference's {reference:.1f} "
        f"(rewards/rejected {reward:.4f}). The loss falls by making the rejected replies impossible, which harms "
        f"every reply that is worded like them. People lower train.learning_rate (now {config.learning_rate:g}), "
        f"train fewer epochs or raise train.beta (now {config.beta:g})."
    )


_RULES: dict[str, Callable[[_Window, _Window, TrainConfig], str | None]] = {
    "both rewards fall": _both_fall,
    "rejected log-probs collapse": _rejected_collapse,
}
