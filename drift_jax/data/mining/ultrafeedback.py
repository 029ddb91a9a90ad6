"""UltraFeedback's scored responses as dissatisfaction: the lowest is rejected, its critique is the complaint.

The highest above a threshold is the seed's SAT response. Which fields and thresholds: config section `ultrafeedback`.
Of equal scores the response that stands first counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, final

from drift_jax.data.mining.config import UltraFeedbackRules
from drift_jax.data.mining.mined import Mined
from drift_jax.data.mining.text_rows import BadRow, name_keys, unpack_cell
from drift_jax.data.mining.wildfeedback import Refuse
from drift_jax.records import Message, Row


class _Scored(NamedTuple):
    score: float
    response: str
    critique: str
    model: Any


def columns(rules: UltraFeedbackRules) -> tuple[str, ...]:
    """Top-level keys that are read."""
    return tuple(path.partition(".")[0] for path in (rules.prompt, rules.completions))


@final
class ScoredPrompts:
    """Reads prompts with their scored responses, one after the other."""

    def __init__(self, rules: UltraFeedbackRules) -> None:
        self.count = 0
        self.left_out: Counter[str] = Counter()  # kind: reason -> prompts that gave no record of it
        self._rules = rules

    def mine(self, source: str, rows: Iterable[tuple[int, Row | BadRow]], refuse: Refuse) -> Iterator[Mined]:
        """Records of a source; rows that break the format go to `refuse`."""
        for number, row in rows:
            if isinstance(row, BadRow):
                refuse(source, number, row.why)
                continue
            try:
                prompt, scored = self._read_row(row)
            except ValueError as error:
                refuse(source, number, str(error))
                continue
            self.count += 1
            yield from self._judge(f"{source}:{number}", prompt, scored)

    def _read_row(self, row: Row) -> tuple[str, list[_Scored]]:
        rules = self._rules
        prompt, completions = _get(row, rules.prompt), unpack_cell(_get(row, rules.completions))
        if not isinstance(prompt, str):
            raise ValueError(f"{rules.prompt} must be text{_found(prompt, row)}")
        if not isinstance(completions, list):
            raise ValueError(f"{rules.completions} must be a list{_found(completions, row)}")
        scored = []
        for i, completion in enumerate(completions):
            response, score = _get(completion, rules.response), _get(completion, rules.score)
            if not isinstance(response, str):
                raise ValueError(f"{rules.completions}[{i}].{rules.response} must be text, found {response!r:.80}")
            score = _number(score, f"{rules.completions}[{i}].{rules.score}")
            critique = _get(completion, rules.critique)
            if score is None or not response.strip():
                self.left_out["completion: no score" if score is None else "completion: empty response"] += 1
                continue
            text = critique if isinstance(critique, str) else ""
            scored.append(_Scored(score, response, text, _get(completion, "model")))
        return prompt, scored

    def _judge(self, name: str, prompt: str, scored: list[_Scored]) -> Iterator[Mined]:
        rules = self._rules
        lowest = min(scored, key=lambda one: one.score, default=None)
        highest = max(scored, key=lambda one: one.score, default=None)
        reason = ""
        if not prompt.strip():
            reason = "empty prompt"
        elif lowest is None or highest is None or lowest.score == highest.score:
            reason = "no response has a lower score than another"
        if reason or lowest is None or highest is None:
            self.left_out.update([f"dsat: {reason}", f"seed: {reason}"])
            return
        messages = (Message("user", prompt),)
        rejected = {"by": "score", "rejected": _describe(lowest)}
        both = {**rejected, "chosen": _describe(highest)}
        why = "score is not below dsat_below" if lowest.score >= rules.dsat_below else ""
        why = why or ("" if lowest.critique.strip() else "no critique")
        if why:
            self.left_out.update([f"dsat: {why}", f"seed: {why}"])
            return
        yield Mined("dsat", name, name, messages, lowest.response, lowest.critique, evidence=rejected)
        if highest.score <= rules.sat_above:
            self.left_out["seed: highest score is not above sat_above"] += 1
            return
        if highest.critique.strip():
            happy = {"by": "score", "chosen": _describe(highest)}
            yield Mined("sat", name, name, messages, highest.response, highest.critique, evidence=happy)
        else:
            self.left_out["sat: no critique"] += 1
        yield Mined("seed", name, name, messages, lowest.response, lowest.critique, highest.response, both)


def _describe(one: _Scored) -> dict[str, Any]:
    return {"score": one.score} | ({"model": one.model} if isinstance(one.model, str) else {})


def _get(holder: Any, path: str) -> Any:
    """The value under keys joined by dots; None where one of them is missing."""
    for key in path.split("."):
        holder = unpack_cell(holder)
        holder = holder.get(key) if isinstance(holder, dict) else None
    return holder


def _found(value: Any, row: Row) -> str:
    return name_keys(row) if value is None else f", found {value!r:.80}"


def _number(value: Any, where: str) -> float | None:
    """None where there is no score: `N/A` is published too. Raises `ValueError` for what is no number."""
    if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A")):
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be a number, found {value!r:.80}") from None
    return number if math.isfinite(number) else None
