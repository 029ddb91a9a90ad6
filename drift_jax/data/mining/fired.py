"""Where rules fire in a conversation, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, final

from drift_jax.data.mining.complaint_rules import RuleSet
from drift_jax.data.mining.dialogue import Conversation


def follow_ups(conversation: Conversation) -> list[int]:
    """Places of user turns that come right after a reply; both hold text."""
    turns = conversation.turns
    return [
        i
        for i in range(1, len(turns))
        if turns[i].role == "user"
        and turns[i - 1].role == "assistant"
        and turns[i].content.strip()
        and turns[i - 1].content.strip()
    ]


@final
class RuleCounts:
    """Rules of several files, and what they did so far."""

    def __init__(self, rules: Sequence[RuleSet]) -> None:
        self._rules = tuple(rules)
        self._seen = self._found = 0
        self._fired: Counter[str] = Counter()

    def match(self, conversation: Conversation) -> dict[int, dict[str, str]]:
        """Of follow-ups where rules fire: place -> rule -> the text that it matched."""
        found: dict[int, dict[str, str]] = {}
        for place in follow_ups(conversation):
            self._seen += 1
            labels = {k: v for one in self._rules for k, v in one.match(conversation.turns[place].content)}
            if labels:
                found[place] = labels
                self._found += 1
                self._fired.update(labels.keys())
        return found

    def stats(self) -> dict[str, Any]:
        """Turns looked at, turns where a rule fired, and each rule's own number, 0 included."""
        names = [one.label(rule) for one in self._rules for rule in one.rules]
        return {
            "rules": {
                "files": {f"{one.name}-v{one.version}": one.hash for one in self._rules},
                "turns_seen": self._seen,
                "turns_fired": self._found,
                "fired": {name: self._fired[name] for name in names},
            }
        }
