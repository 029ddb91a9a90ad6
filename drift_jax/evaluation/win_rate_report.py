"""The report of `drift evaluate win-rate`."""

from __future__ import annotations

from typing import Any

from drift_jax.evaluation.report import Report, Section, number, with_interval
from drift_jax.evaluation.win_rate import Preference, win_rate
from drift_jax.evaluation.win_rate_judges import Judgement


def build_win_rate_report(a: str, b: str, found: Judgement, without_output: int) -> Report:
    """Rates, what was left out and why, and every preference.

    Args:
      without_output: prompts that A or B has no output for.
    """
    rates = win_rate(found.preferences)
    excluded = dict(found.excluded) | ({"no output of A or B": without_output} if without_output else {})
    data = {
        "a": a,
        "b": b,
        **rates,
        "excluded": excluded,
        "judge": found.judge,
        "failures": found.failures,
        "preferences": [_row(preference) for preference in found.preferences],
    }
    cells = [
        with_interval(rates["win_rate"], rates["win_rate_interval"]),
        with_interval(rates["length_controlled_win_rate"], rates["length_controlled_interval"]),
        *(str(rates[name]) for name in ("wins", "ties", "losses", "total")),
        f"{number(rates['avg_length_a'], '.0f')} / {number(rates['avg_length_b'], '.0f')}",
    ]
    columns = ["", "win rate of A, %", "at equal lengths, %", "wins", "ties", "losses", "prompts", "length A / B"]
    return Report(f"{a} against {b}", [Section(f"A: {a}, B: {b}", columns, [["A over B", *cells]])], _notes(data), data)


def _row(preference: Preference) -> dict[str, Any]:
    row: dict[str, Any] = {"id": preference.id, "preference": preference.value}
    row |= {"length_a": preference.length_a, "length_b": preference.length_b}
    return row | ({"orders": list(preference.orders)} if preference.orders else {})


def _notes(data: dict[str, Any]) -> list[str]:
    judge = data["judge"]
    notes = ["Intervals are of 95 %."]
    if judge["kind"] == "programmatic":
        notes.append(f"Judge: the function {judge['check']}.")
    else:
        cost = "" if judge["dollars"] is None else f", {judge['dollars']:.4f} dollars"
        notes.append(
            f"Judge: {judge['model']}, prompt {judge['prompt']} ({judge['prompt_hash']}); {judge['answered']} of "
            f"{judge['questions']} questions answered, {judge['malformed_answers']} malformed answers, "
            f"{judge['from_cache']} from the cache, {judge['prompt_tokens']} + {judge['completion_tokens']} "
            f"tokens{cost}."
        )
        if data["same_in_both_orders"] is not None:
            notes.append(
                f"The judge said the same in both orders for {data['same_in_both_orders']:.0f} % of the prompts it was "
                f"asked about, and took the reply that stands first in {data['first_wins']:.0f} %."
            )
    if data["excluded"]:
        notes.append("Left out: " + ", ".join(f"{count} {why}" for why, count in data["excluded"].items()) + ".")
    return notes
