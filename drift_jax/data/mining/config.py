"""The rules of mining: frozen dataclasses, read from a YAML file and `a.b=c` overrides.

One key has one meaning; its unit stands in its comment. All of them stand in stats.json and in the data card.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from drift_jax.config import NonNegativeInt, PositiveInt, Share, apply_override
from drift_jax.errors import ConfigError
from drift_jax.key_problems import describe_keys, list_keys
from drift_jax.yaml_files import read_yaml

_FORBID_EXTRA = ConfigDict(extra="forbid")
ConfigT = TypeVar("ConfigT")


def _word(boolean: bool, word: str) -> BeforeValidator:
    """A word that YAML 1.1 reads as a boolean where nobody quotes it."""
    return BeforeValidator(lambda value: word if value is boolean else value)


Format = Literal["wildfeedback", "wildchat", "messages", "sharegpt", "ultrafeedback"]
FieldPath = Annotated[str, Field(min_length=1)]  # a key, or keys joined by dots


@dataclass(frozen=True)
class WildFeedbackRules:
    """How labels of utterances are read."""

    __pydantic_config__ = _FORBID_EXTRA

    both_labels: Literal["dsat", "sat", "neither"] = "dsat"  # what a row is whose two labels are true
    # What a boolean means that is not there.
    missing_label: Annotated[Literal["false", "bad_row"], _word(False, "false")] = "false"
    # yes: only labels whose `Preceeding` is YES judge the reply before.
    preceding: Annotated[Literal["yes", "any"], _word(True, "yes")] = "yes"


@dataclass(frozen=True)
class ModerationRules:
    """What becomes of conversations that their publisher has flagged."""

    __pydantic_config__ = _FORBID_EXTRA

    toxic: Literal["drop", "keep"] = "drop"  # `toxic` of the conversation or of one of its turns
    redacted: Literal["drop", "keep"] = "drop"  # `redacted`, the same: names were replaced in the text
    moderated: Literal["drop", "keep"] = "drop"  # `flagged` of one of the `openai_moderation`


@dataclass(frozen=True)
class UltraFeedbackRules:
    """Which of scored responses is the rejected one, which the satisfying one; fields as they are published."""

    __pydantic_config__ = _FORBID_EXTRA

    prompt: FieldPath = "instruction"
    completions: FieldPath = "completions"  # a list; the three below are fields of one of it
    response: FieldPath = "response"
    score: FieldPath = "overall_score"  # the lowest is the DSAT response, the highest may be the SAT one
    critique: FieldPath = "critique"  # of the lowest: the complaint
    dsat_below: float = 11.0  # the lowest score must be below this; published scores go from 1 to 10
    sat_above: float = 8.0  # the highest score must be above this for a seed pair


@dataclass(frozen=True)
class HygieneRules:
    """Which mined records are left out. Lengths are in characters."""

    __pydantic_config__ = _FORBID_EXTRA

    min_complaint: NonNegativeInt = 1
    max_complaint: PositiveInt = 8_000
    min_reply: NonNegativeInt = 1
    max_reply: PositiveInt = 32_000
    max_prompt: PositiveInt = 64_000  # of all its messages
    # ISO 639-1 codes, such as en; empty: all (extra `language`).
    languages: tuple[Annotated[str, _word(False, "no")], ...] = ()
    exact_duplicates: Literal["drop", "keep"] = "drop"
    max_similarity: Share = 0.9  # of last prompt message, reply and complaint to an earlier record's; 1: off
    mask_pii: bool = False  # e-mail addresses, phone numbers, ... are replaced by their kind


@dataclass(frozen=True)
class SplitRules:
    """Which conversations are held out: all that begin with the same user message go to the same side."""

    __pydantic_config__ = _FORBID_EXTRA

    test_share: Share = 0.05  # of the opening messages
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42


@dataclass(frozen=True)
class MiningConfig:
    """Everything that decides what `drift mine` finds in its input."""

    __pydantic_config__ = _FORBID_EXTRA

    wildfeedback: WildFeedbackRules = field(default_factory=WildFeedbackRules)
    ultrafeedback: UltraFeedbackRules = field(default_factory=UltraFeedbackRules)
    moderation: ModerationRules = field(default_factory=ModerationRules)
    hygiene: HygieneRules = field(default_factory=HygieneRules)
    split: SplitRules = field(default_factory=SplitRules)
    detector: dict[str, Any] = field(default_factory=dict)  # keys of `DetectorConfig`, for logs without labels


def load_mining_config(path: Path | None, overrides: tuple[str, ...] | list[str] = ()) -> MiningConfig:
    """The rules of a YAML file, or the defaults, with `a.b=c` overrides.

    Raises:
      ConfigError: the file is missing or not YAML, or keys are unknown, of the wrong type or impossible; names all.
    """
    raw: dict[str, Any] = {} if path is None else read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    config = validate(MiningConfig, raw, str(path or "rules"))
    hygiene = config.hygiene
    for least, most in (("min_complaint", "max_complaint"), ("min_reply", "max_reply")):
        if getattr(hygiene, least) > getattr(hygiene, most):
            raise ConfigError(
                f"hygiene.{least} ({getattr(hygiene, least)}) is more than hygiene.{most} "
                f"({getattr(hygiene, most)}): no record could stay. Lower the first or raise the second."
            )
    return config


def validate(kind: type[ConfigT], raw: dict[str, Any], source: str) -> ConfigT:
    """Plain values -> a dataclass. Raises `ConfigError` naming every offending key at once."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        lines = describe_keys(error, *list_keys(kind))
        keys = ", ".join(f.name for f in dataclasses.fields(kind))  # pyright: ignore[reportArgumentType]
        raise ConfigError(f"{source}:\n" + "\n".join(lines) + f"\nThe keys are {keys}.") from None
