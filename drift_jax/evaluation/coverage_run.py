"""`drift evaluate coverage`: replies and a scorer in, shares of the high-reward region out."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from drift_jax.errors import ConfigError, DataError
from drift_jax.evaluation.coverage import Coverage, find_coverage
from drift_jax.evaluation.coverage_settings import CoverageConfig
from drift_jax.evaluation.embed import embed, project
from drift_jax.evaluation.entry_points import load_function
from drift_jax.evaluation.replies import Reply
from drift_jax.evaluation.report import Report, Section, with_interval
from drift_jax.files import atomic_writer
from drift_jax.progress import stage_progress

_FEWEST = 10  # replies
_LIBRARIES = ("numpy", "scipy", "scikit-learn", "umap-learn", "numba")
_SHOWN = 10

Implicit = Callable[[Sequence[Reply]], list[float]]


@dataclasses.dataclass(frozen=True)
class Map:
    """Replies in the order of their points."""

    methods: tuple[str, ...]
    replies: tuple[Reply, ...]
    rewards: Float[np.ndarray, " N"]
    points: Float[np.ndarray, "N 2"]
    found: Coverage


def draw_map(
    methods: Sequence[str],
    replies: Sequence[Reply],
    settings: CoverageConfig,
    implicit: Implicit | None,
    console: Console,
) -> Map:
    """Embeds, projects, scores. The order in which methods and rows come changes no number.

    Raises:
      ConfigError: an extra, an embedder or a scorer is missing.
      DataError: there are too few replies, or some have no reward.
    """
    if len(replies) < _FEWEST:
        raise DataError(f"{len(replies)} replies are too few for a map: give {_FEWEST} or more.")
    ordered = sorted(replies, key=lambda reply: reply.key)
    rewards = np.asarray(find_rewards(ordered, settings.reward, implicit), np.float64)
    with stage_progress("mapping", 3, "steps", console=console) as bar:
        embeddings = embed([_text(reply, settings.text) for reply in ordered], settings)
        bar.advance(1, "embedded")
        points = project(embeddings, settings)
        bar.advance(1, "projected")
        names, prompts = sorted(methods), sorted({reply.prompt for reply in ordered})
        of_method, of_prompt = ({name: i for i, name in enumerate(among)} for among in (names, prompts))
        found = find_coverage(
            points,
            rewards,
            np.asarray([of_method[reply.method] for reply in ordered]),
            np.asarray([of_prompt[reply.prompt] for reply in ordered]),
            settings,
        )
        bar.advance(1, "measured")
    return Map(tuple(names), tuple(ordered), rewards, points, found)


def find_rewards(replies: Sequence[Reply], reward: str, implicit: Implicit | None) -> list[float]:
    """Raises `DataError` naming replies without a finite reward, `ConfigError` for a scorer that is not there."""
    if reward == "implicit":
        if implicit is None:
            raise ConfigError("reward implicit is that of a policy against a reference: give --policy and --reference.")
        return implicit(replies)
    column = reward.removeprefix("column:")
    score = _of_column(column) if column != reward else load_function(reward, "reward")
    found, problems = list[float](), list[str]()
    for reply in replies:
        try:
            value = float(score(list(reply.messages), reply.text, reply.row))
            if not math.isfinite(value):
                raise ValueError(f"{value} is no finite number")
            found.append(value)
        except Exception as error:  # the user's function may raise anything
            problems.append(f"  {reply.method}, {reply.prompt!r}: {type(error).__name__}: {error}")
    if problems:
        raise DataError(
            f"{len(problems)} of {len(replies)} replies have no reward by {reward}:\n"
            + "\n".join(problems[:_SHOWN])
            + "\nSay where rewards come from with --set reward=column:NAME, MODULE:FUNCTION or implicit."
        )
    return found


def _of_column(name: str) -> Callable[[Any, str, Mapping[str, Any]], float]:
    def read(_: Any, __: str, row: Mapping[str, Any]) -> float:
        meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
        value = row.get(name, (meta or {}).get(name))
        if isinstance(value, bool | int | float):
            return float(value)
        raise ValueError(f"{name} of the row must be a number, found {value!r}")

    return read


def _text(reply: Reply, what: str) -> str:
    if what == "reply":
        return reply.text
    return "\n\n".join([*(m["content"] for m in reply.messages), reply.text])


# --- what is written ----------------------------------------------------------------------------------------


def build_coverage_report(
    found: Map, settings: CoverageConfig, files: Mapping[str, Path], drops: Mapping[str, Mapping[str, int]]
) -> Report:
    """The numbers of each method, in the order in which they were given.

    Args:
      drops: method -> reason -> replies left out.
    """
    measured = {name: _numbers(found, i) for i, name in enumerate(found.methods)}
    rows = [
        [
            name,
            with_interval(100 * m["coverage"], [100 * end for end in m["coverage_interval"]], ".1f"),
            with_interval(100 * m["share"], [100 * end for end in m["share_interval"]], ".1f"),
            f"{m['reward']:.4g}",
            str(m["replies"]),
        ]
        for name in files
        for m in [measured[name]]
    ]
    columns = ["method", "covers of the region, %", "part of its density, %", "mean reward", "replies"]
    area = float(found.found.region.mean())
    used = [name for name in _LIBRARIES if settings.projection == "umap" or name not in ("umap-learn", "numba")]
    data = {
        "benchmark": "coverage",
        "settings": dataclasses.asdict(settings),
        "libraries": {name: _version(name) for name in used},
        "files": {name: str(path) for name, path in files.items()},
        "prompts": len({reply.prompt for reply in found.replies}),
        "region": {"area": area, "bandwidth": found.found.bandwidth.tolist()},
        "methods": {name: measured[name] for name in files},
        "drops": {name: {why: n for why, n in reasons.items() if n} for name, reasons in drops.items()},
    }
    notes = [
        f"The region is the {settings.region_area:.0%} with the highest rewards of the area that any method reaches, "
        f"{area:.1%} of the map; a method covers what it reaches with {settings.reach_mass:.0%} of its density.",
        f"Rewards: {settings.reward}, by {settings.reward_scale}. Embedder {settings.embedder}, projection "
        f"{settings.projection} (its axes have no unit), seed {settings.seed}.",
        f"Intervals of 95 %: {settings.resamples} draws of the {data['prompts']} prompts, map and region as they are.",
        *(
            f"{name}: left out " + ", ".join(f"{count} {why}" for why, count in reasons.items()) + "."
            for name, reasons in data["drops"].items()
            if reasons
        ),
    ]
    return Report("Coverage of the high-reward region", [Section("Coverage", columns, rows)], notes, data)


def _numbers(found: Map, index: int) -> dict[str, Any]:
    of = [i for i, reply in enumerate(found.replies) if reply.method == found.methods[index]]
    share = found.found.shares[index]
    return {
        "coverage": share.coverage,
        "coverage_interval": list(share.coverage_interval),
        "share": share.share,
        "share_interval": list(share.share_interval),
        "reward": float(found.rewards[of].mean()),
        "replies": len(of),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_points(found: Map, path: Path) -> None:
    """CSV: where each reply lies, its reward and weight, and whether that is in the region."""
    x, y, region = found.found.x, found.found.y, found.found.region
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("method", "prompt", "sample", "x", "y", "reward", "weight", "in_region"))
    for i, reply in enumerate(found.replies):
        cell = tuple(int(np.abs(axis - found.points[i, j]).argmin()) for j, axis in enumerate((x, y)))
        point = (repr(float(v)) for v in (*found.points[i], found.rewards[i], found.found.weights[i]))
        writer.writerow((reply.method, reply.prompt, reply.sample, *point, int(region[cell])))
    with atomic_writer(path) as file:
        file.write(text.getvalue())
