"""Who decides between two outputs: a model behind an endpoint, asked in both orders, or a function."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from drift_jax.config import JudgeConfig
from drift_jax.errors import DataError
from drift_jax.evaluation.prompts import Prompt
from drift_jax.evaluation.win_rate import Preference
from drift_jax.judge import load_prompt
from drift_jax.judging import Question, ask_all

COMPARE_PROMPT = "compare_v1"
_VALUES = {"1": 1.0, "2": 0.0, "tie": 0.5}  # from the side of the reply that is shown first
_SCHEMA = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "better": {"type": "string", "enum": list(_VALUES)}},
    "required": ["reason", "better"],
    "additionalProperties": False,
}

Check = Callable[[Sequence[Mapping[str, str]], str, Mapping[str, Any]], float]


@dataclass(frozen=True)
class Judgement:
    """Preferences, why prompts have none (reason -> how many), and what the result is to say of the judge."""

    preferences: tuple[Preference, ...]
    excluded: dict[str, int]
    judge: dict[str, Any]
    failures: dict[str, str] = field(default_factory=dict)  # prompt id -> what went wrong


def judge_by_endpoint(
    prompts: Sequence[Prompt],
    a: Mapping[str, str],
    b: Mapping[str, str],
    config: JudgeConfig,
    cache: Path,
    console: Console,
) -> Judgement:
    """Asks about each prompt twice. A prompt with one verdict only is left out: alone it has the judge's bias.

    Equal outputs are a tie, and nobody is asked.
    """
    template = load_prompt(COMPARE_PROMPT)
    asked = [prompt for prompt in prompts if a[prompt.id] != b[prompt.id]]
    questions = []
    for prompt in asked:
        dialogue = "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in prompt.messages)
        for order, (first, second) in enumerate(((a, b), (b, a))):
            text = template.fill(dialogue=dialogue, reply_1=first[prompt.id], reply_2=second[prompt.id])
            questions.append(Question(f"{order}:{prompt.id}", text, _SCHEMA, _first_is_better))
    judged = ask_all(questions, config, cache, console, "comparing")
    preferences, excluded = list[Preference](), Counter[str]()
    for prompt in prompts:
        if a[prompt.id] == b[prompt.id]:
            orders = None
            value = 0.5
        else:
            found = [judged.values.get(f"{order}:{prompt.id}") for order in (0, 1)]
            if found[0] is None or found[1] is None:
                excluded["no verdict" if found == [None, None] else "a verdict in one order only"] += 1
                continue
            orders = (found[0], 1 - found[1])
            value = sum(orders) / 2
        preferences.append(Preference(prompt.id, value, len(a[prompt.id]), len(b[prompt.id]), orders))
    said = {
        "kind": "endpoint",
        "model": config.model,
        "prompt": template.name,
        "prompt_hash": template.hash,
        "equal_outputs": len(prompts) - len(asked),
        **judged.tally.row(),
    }
    return Judgement(tuple(preferences), dict(excluded), said, judged.failures)


def _first_is_better(answer: Mapping[str, Any]) -> float:
    return _VALUES[str(answer["better"])]


def judge_by_function(
    prompts: Sequence[Prompt], a: Mapping[str, str], b: Mapping[str, str], check: Check, name: str
) -> Judgement:
    """The output with the higher score wins; equal scores are a tie. See `evaluation/checks.py`.

    Raises:
      DataError: the check failed on every prompt.
    """
    preferences, failures = list[Preference](), dict[str, str]()
    for prompt in prompts:
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        try:
            scores = [float(check(messages, outputs[prompt.id], prompt.row)) for outputs in (a, b)]
        except Exception as error:  # the user's function may raise anything
            failures[prompt.id] = f"{type(error).__name__}: {error}"
            continue
        if any(map(math.isnan, scores)):
            failures[prompt.id] = f"{name} returned a score that is no number"
            continue
        value = 0.5 if scores[0] == scores[1] else float(scores[0] > scores[1])
        preferences.append(Preference(prompt.id, value, len(a[prompt.id]), len(b[prompt.id])))
    if failures and not preferences:
        first, why = next(iter(failures.items()))
        raise DataError(
            f"--check {name} failed on all {len(failures)} prompts, first on {first}: {why}. See whether the rows of "
            "the prompts file hold the keys that it reads."
        )
    excluded = {"the check failed": len(failures)} if failures else {}
    return Judgement(tuple(preferences), excluded, {"kind": "programmatic", "check": name}, failures)
