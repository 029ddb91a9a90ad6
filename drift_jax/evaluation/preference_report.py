"""The report of `drift evaluate preference`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drift_jax.evaluation.preference import SHOWN
from drift_jax.evaluation.report import Report, Section, number, with_interval


def build_preference_report(
    stages: Mapping[str, Mapping[str, Any]], pairs_file: str, drops: Mapping[str, int]
) -> Report:
    """Args: `stages` has policy, reference and `preference_numbers` by name."""
    rows = [
        [name, *(with_interval(*_parts(stage["metrics"][metric]), spec) for metric, spec in SHOWN.items())]
        for name, stage in stages.items()
    ]
    lengths = [_lengths(name, stage["lengths"]) for name, stage in stages.items()]
    any_stage = next(iter(stages.values()))
    columns = ["policy", "accuracy", "margin", "nats/token chosen", "rejected", "tokens chosen", "rejected"]
    notes = [
        f"{any_stage['pairs']} pairs of {pairs_file}; rewards are {any_stage['beta']:g} * log(policy / reference). "
        "Intervals of 95 %: bootstrap over pairs, Wilson's for the accuracy.",
        *(f"{name}: {stage['policy']} against {stage['reference']}." for name, stage in stages.items()),
    ]
    notes += [f"{name}: {stage['ties']} pairs have equal rewards." for name, stage in stages.items() if stage["ties"]]
    if drops:
        notes.append("Left out: " + ", ".join(f"{count} {why}" for why, count in drops.items()) + ".")
    heads = ["policy", "chosen: p10, median, p90", "rejected: p10, median, p90", "chosen longer", "margin and length"]
    data = {"benchmark": "preference", "pairs_file": pairs_file, "drops": dict(drops), "stages": dict(stages)}
    sections = [Section("Implicit rewards", columns, rows), Section("Tokens", heads, lengths)]
    return Report("Preference", sections, notes, data)


def _parts(metric: Mapping[str, float | None]) -> tuple[float | None, tuple[float, float] | None]:
    low, high = metric["low"], metric["high"]
    return metric["value"], None if low is None or high is None else (low, high)


def _lengths(name: str, lengths: Mapping[str, Any]) -> list[str]:
    spreads = [
        ", ".join(number(lengths[side][q], ".0f") for q in ("p10", "median", "p90")) for side in ("chosen", "rejected")
    ]
    correlation = number(lengths["margin_length_correlation"], "+.2f")
    return [name, *spreads, f"{lengths['chosen_longer']:.0%}", correlation]
