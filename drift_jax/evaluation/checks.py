"""Programmatic judges of `drift evaluate win-rate --judge programmatic --check MODULE:FUNCTION`, as they come.

A check scores one output; of two outputs the one with the higher score wins, and equal scores are a tie:

    def check(messages, output, row): ...

Args of a check:
  messages: the dialogue, a list of {"role", "content"} that ends with a user turn.
  output: the reply.
  row: the row of the prompts file, with whatever else it holds.

It returns a number or a bool. What it raises counts as a failure of that prompt, which is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, str]]


def is_json(messages: Messages, output: str, row: Mapping[str, Any]) -> bool:
    """Whether the output is a JSON value, code fence around it or not."""
    text = output.strip()
    if text.startswith("```"):
        text = text.strip("`").removeprefix("json")
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def within_words(messages: Messages, output: str, row: Mapping[str, Any]) -> bool:
    """Whether the output has from `min_words` (1) to `max_words` words; the row says both."""
    return row.get("min_words", 1) <= len(output.split()) <= row["max_words"]


def shorter(messages: Messages, output: str, row: Mapping[str, Any]) -> float:
    """Prefers the output with fewer characters; an empty one loses."""
    return -float(len(output)) if output.strip() else float("-inf")
