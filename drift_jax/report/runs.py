"""What a run directory holds by now, finished or not: stages, their numbers, what they were made from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_jax.data.token_cache import Lengths, read_lengths
from drift_jax.errors import ConfigError, DataError
from drift_jax.evaluation.results import Evaluation, iteration_of
from drift_jax.journal import read_rows
from drift_jax.manifest import MANIFEST_FILE, Manifest
from drift_jax.reading import check_form, read_json, read_text, split_name
from drift_jax.report import forms
from drift_jax.telemetry import METRICS_FILE, read_metrics
from drift_jax.yaml_files import read_yaml

_PARTS = ("sample", "pair", "train", "export")
_STAGE = re.compile(r"seed|iter_\d{1,6}")
_THEORY_PAIRS = "theory_pairs.jsonl"


@dataclass(frozen=True)
class Stage:
    """`seed` or `iter_K`; `parts` has the manifest's entries of what was entered of it."""

    name: str
    folder: Path
    parts: Mapping[str, Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]  # eval.json; empty before the end of training
    margins: Mapping[str, float]  # reward margin by pair id, of the pairs that were scored
    lengths: Mapping[str, Lengths]  # tokens by pair id, as trained on

    @property
    def summary(self) -> Mapping[str, Any]:
        return self.parts.get("train", {}).get("summary", {})

    @property
    def epochs(self) -> float:
        """How many the stage takes in all."""
        return float(self.parts.get("train", {}).get("config", {}).get("epochs") or 1)

    @property
    def is_finished(self) -> bool:
        return self.parts.get("export", {}).get("finished") is not None

    @property
    def drops(self) -> Mapping[str, int]:
        """Reason -> how many; of sampling, pairing and training."""
        found: dict[str, int] = {}
        # What sampling could not encode is counted by pairing as well, which has the last word.
        parts = ("pair", "train") if self.parts.get("pair", {}).get("summary") else ("sample", "train")
        for part in parts:
            for reason, count in self.parts.get(part, {}).get("summary", {}).get("drops", {}).items():
                found[reason] = found.get(reason, 0) + count
        return found


@dataclass(frozen=True)
class Run:
    """A run directory."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    config_text: str
    stages: Sequence[Stage]
    manifest: Manifest
    showcase: Sequence[Mapping[str, str]]

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do for `drift run`."""
        recipe = self.config.get("recipe", {})
        last = f"iter_{recipe['iterations']}" if recipe.get("iterations") else "seed"
        wanted = [f"{last}/export", *(["showcase"] if recipe.get("showcase_prompts") else [])]
        return all(self.manifest.is_finished(stage) for stage in wanted)


def load_runs(given: Sequence[str]) -> list[Run]:
    """Of `[NAME=]RUN`; a run's name is its folder's.

    Raises:
      ConfigError: two have the same name.
      DataError: one is no run, or a file of it cannot be read.
    """
    runs: dict[str, Run] = {}
    for source in given:
        name, folder = split_name(source)
        name = name or folder.absolute().name
        if name in runs:
            raise ConfigError(
                f"{folder} and {runs[name].folder} are both called {name}: name them, as in NAME={folder}."
            )
        runs[name] = load_run(folder, name)
    return list(runs.values())


def load_run(folder: Path, name: str | None = None) -> Run:
    """Raises `DataError`: as `load_runs`."""
    if not (folder / MANIFEST_FILE).is_file() or not (folder / "config.yaml").is_file():
        raise DataError(
            f"{folder} is no run: it has no config.yaml and {MANIFEST_FILE}. Name a directory of drift run."
        )
    manifest = Manifest(folder)
    path = folder / "config.yaml"
    try:
        text = read_text(path)
        config = read_yaml(path)
    except ConfigError as error:
        raise DataError(f"{error} It is the config that the run was made with: restore it.") from None
    check_form(forms.Config, config, str(path), "Restore the config that the run was made with.")
    entered = {entry.partition("/")[0] for entry in manifest.stages() if "/" in entry}
    if strange := sorted(name for name in entered if not _STAGE.fullmatch(name)):
        raise DataError(f"{manifest.path} names the stage {strange[0]!r:.80}, which no run has. Restore the file.")
    stages = [_load_stage(folder, stage, manifest) for stage in sorted(entered, key=iteration_of)]
    showcase = read_json_file(folder / "showcase.json", [], list[forms.Answer])
    return Run(name or folder.absolute().name, folder, config, text, stages, manifest, showcase)


def _load_stage(run: Path, name: str, manifest: Manifest) -> Stage:
    folder, entries = run / name, manifest.stages()
    return Stage(
        name=name,
        folder=folder,
        parts={part: entries[f"{name}/{part}"] for part in _PARTS if f"{name}/{part}" in entries},
        metrics=read_metrics(folder) if (folder / METRICS_FILE).is_file() else [],
        evaluation=read_json_file(folder / "eval.json", {}, Evaluation),
        margins=_margins(run, folder),
        lengths={key: found for path in sorted(folder.glob("tokens/*.npz")) for key, found in read_lengths(path)},
    )


def _margins(run: Path, folder: Path) -> dict[str, float]:
    """Those of the held-out pairs, of the probe of the theory, and of what `drift evaluate preference` has left."""
    files = [folder / _THEORY_PAIRS, *sorted(run.glob(f"*/scores.{folder.name}.jsonl")), folder / "scores.test.jsonl"]
    return {row["id"]: row["margin"] for path in files if path.is_file() for row in read_rows(path, form=forms.Score)}


def read_json_file(path: Path, default: Any, form: Any) -> Any:
    """`default` where there is no such file. Raises `DataError` where it is no JSON or not of the type `form`."""
    if not path.exists() and not path.is_symlink():
        return default
    remedy = "Make it again, or remove it."
    return check_form(form, read_json(path, remedy, most=None), str(path), remedy)


def newest_change(folder: Path) -> int:
    """When a file that the report shows changed last, in nanoseconds; 0 where there is none."""
    patterns = ("*.json", "*.yaml", "*/*.json", "*/*.jsonl", "*/*/report.json")
    return max((path.stat().st_mtime_ns for pattern in patterns for path in folder.glob(pattern)), default=0)
