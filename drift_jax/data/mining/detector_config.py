"""What decides which user turns count as complaints where a log has no labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from drift_jax.config import JudgeConfig, PositiveFloat, PositiveInt
from drift_jax.errors import ConfigError


@dataclass(frozen=True)
class DetectorConfig:
    """Who finds complaints, and how. Keys of `judge` are those of a run's section `judge`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["rules", "judge", "both"] = "rules"  # both: rules pick candidates, the judge decides
    rules: tuple[str, ...] = ("en_v1",)  # rule files: names of ours, paths of others
    prompt: str = "dissatisfaction_v1"  # the rubrics, a file of drift_jax/prompts
    threshold: Annotated[int, Field(ge=1, le=10)] = 5  # least strength, of 10, of what counts as a complaint
    turns_per_question: PositiveInt = 6  # user turns of one conversation that are judged in one answer
    turn_characters: Annotated[int, Field(ge=100)] = 1500  # of each turn shown to the judge: its start and its end
    requests_per_minute: PositiveFloat | None = None  # null: as fast as the server answers judge.concurrency at a time
    # judge.max_tokens has to hold all verdicts of a question: about 70 tokens each.
    judge: JudgeConfig = field(default_factory=JudgeConfig)


def check_detector(config: DetectorConfig) -> None:
    """Raises `ConfigError` where keys do not go together."""
    if config.kind != "judge" and not config.rules:
        raise ConfigError(f"detector {config.kind} needs rules: ours are en_v1, or the path of a YAML file.")
    absent = [key for key in ("base_url", "model") if not getattr(config.judge, key)]
    if config.kind != "rules" and absent:
        raise ConfigError(
            f"detector {config.kind} asks a model: judge.{' and judge.'.join(absent)} must say which, such as "
            "judge.base_url=http://127.0.0.1:8000/v1. Or take detector rules, which asks none."
        )
