"""Dissatisfaction in logs that have no labels: which user turns complain about the reply before them.

    rules   patterns for explicit complaints (`complaint_rules.py`): precise, blind to the rest; nothing is sent
    judge   a model behind an OpenAI-compatible server, asked about every user turn after a reply (`judged.py`)
    both    rules pick candidates, the judge decides: costs little, and can find no more than the rules

What `drift mine` has to offer for it, as keys of `DetectorConfig`:

    --detector rules|judge|both      kind
    --rules NAME|FILE (repeatable)   rules: en_v1 is ours, a path ends in .yaml
    --requests-per-minute N          requests_per_minute
    judge.base_url, judge.model, judge.api_key_env, judge.concurrency (requests at a time), judge.price_prompt and
    judge.price_completion (per million tokens), threshold, turns_per_question, turn_characters, prompt: --set a.b=c

and a journal in the output folder, such as DIR/judge.jsonl, which stays there: it is what a second run goes on from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

from drift_jax.data.mining.complaint_rules import RuleSet, load_rules
from drift_jax.data.mining.detector_config import DetectorConfig, check_detector
from drift_jax.data.mining.dialogue import Complaint, Conversation
from drift_jax.data.mining.fired import RuleCounts
from drift_jax.data.mining.judged import JudgeDetector


@runtime_checkable
class Detector(Protocol):
    """Finds complaints; to be closed after use."""

    def find(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, list[Complaint]]]:
        """Every conversation in order, with its complaints in the order of turns; takes a bounded number ahead.

        Raises:
          StageError: the judge cannot be reached any more; what it answered is kept.
        """
        ...

    def stats(self) -> dict[str, Any]:
        """What was found so far and what it took, as JSON; the same for a run that only read its journal again."""
        ...

    def status(self) -> str:
        """A few words on this run for a line of progress; may be empty."""
        ...

    def close(self) -> None: ...


@final
class RulesDetector:
    """Complaints by rules alone."""

    def __init__(self, rules: Sequence[RuleSet]) -> None:
        self._rules = RuleCounts(rules)

    def find(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, list[Complaint]]]:
        for conversation in conversations:
            found = self._rules.match(conversation)
            yield (
                conversation,
                [Complaint(place, {"detector": "rules", "rules": labels}) for place, labels in found.items()],
            )

    def stats(self) -> dict[str, Any]:
        return self._rules.stats()

    def status(self) -> str:
        return ""

    def close(self) -> None:
        pass


def build_detector(config: DetectorConfig, journal: Path) -> Detector:
    """The detector of a config.

    Args:
      journal: where answers of a judge are kept; not touched by `rules`.

    Raises:
      ConfigError: keys do not go together, a rule file is wrong, or the variable with the API key is not set.
      StageError: another process writes the journal.
    """
    check_detector(config)
    rules = [load_rules(name) for name in config.rules] if config.kind != "judge" else []
    return RulesDetector(rules) if config.kind == "rules" else JudgeDetector(config, journal, rules)
