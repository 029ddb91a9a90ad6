"""Every choice of `drift evaluate coverage`, with its default. The paper publishes none of them: these are ours."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from drift_jax.config import PositiveFloat, PositiveInt, Share, apply_override, read_yaml
from drift_jax.errors import ConfigError
from drift_jax.key_problems import describe_keys, list_keys


@dataclass(frozen=True)
class CoverageConfig:
    """How replies become points, rewards become weights, and points become shares of a region."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    reward: str = "column:reward"  # column:NAME of the rows; MODULE:FUNCTION(messages, reply, row); implicit
    reward_scale: Literal["rank", "minmax"] = "rank"  # rewards -> weights in [0, 1], over all methods together
    prompts: Literal["common", "all"] = "common"  # replies to prompts that all methods have replies to, or all replies
    text: Literal["reply", "dialogue"] = "reply"  # what is embedded: the reply, or its dialogue too
    embedder: str = "tfidf"  # of character n-grams, cut to `dimensions`; MODULE:FUNCTION: a list of texts -> [N, D]
    dimensions: PositiveInt = 64  # of TF-IDF's truncated SVD
    projection: Literal["umap", "svd"] = "umap"  # embeddings -> the map's axes; svd: the two largest components
    neighbors: Annotated[int, Field(ge=2)] = 15  # UMAP: of each point; more show coarser structure
    min_dist: Share = 0.1  # UMAP: how close points may come; at most 1, its spread
    metric: Literal["cosine", "euclidean"] = "cosine"  # UMAP: between embeddings
    grid: Annotated[int, Field(ge=10, le=1000)] = 100  # cells along each axis of the map
    bandwidth: PositiveFloat | None = None  # of the kernel, in standard deviations of each axis; null: Scott's rule
    reach_mass: Annotated[float, Field(gt=0, lt=1)] = 0.9  # of a method's density, on the area that it reaches
    region_area: Annotated[float, Field(gt=0, le=1)] = 0.25  # of the area that any method reaches, by highest rewards
    resamples: PositiveInt = 200  # of prompts, for the intervals
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42


def load_settings(file: Path | None, overrides: Sequence[str] = ()) -> CoverageConfig:
    """Raises `ConfigError` for unknown keys and impossible values, all of them at once."""
    raw: dict[str, Any] = read_yaml(file) if file is not None else {}
    for override in overrides:
        apply_override(raw, override)
    try:
        return TypeAdapter(CoverageConfig).validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        known = ", ".join(field.name for field in dataclasses.fields(CoverageConfig))
        lines = describe_keys(error, *list_keys(CoverageConfig))
        raise ConfigError("coverage:\n" + "\n".join(lines) + f"\nThe keys are {known}.") from None
