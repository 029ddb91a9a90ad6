"""`RUN/manifest.json`: what every stage was made from, so that running again always does the right thing.

A stage is entered with the hashes of its inputs and the config keys that shape its result. Entered before with
the same values it is skipped (finished) or resumed (not finished); entered with others it is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import (
    Any,
    Literal,
    NotRequired,  # pydantic needs these on Python 3.11
    final,
)

from typing_extensions import TypedDict

from drift_jax.config import RunConfig, config_keys
from drift_jax.errors import StageError
from drift_jax.files import write_json
from drift_jax.methods import DEFAULT
from drift_jax.reading import check_form, read_json

MANIFEST_FILE = "manifest.json"
# Files of a model directory that change what the model computes or how text becomes ids.
_MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_PACKAGES = ("drift-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "vllm")

_RESTORE = "Restore it, or give a new run directory with --run-dir."


class _Summary(TypedDict, total=False):
    """Of a stage; other keys may stand beside these."""

    pairs: int
    held_out: int
    steps: int
    drops: dict[str, int]
    warnings: list[str]
    loss: float | None
    tokens_per_second: float | None
    seconds: float | None


class _Entry(TypedDict):
    config: dict[str, Any]
    inputs: dict[str, str]
    started: str
    finished: str | None
    summary: _Summary
    versions: NotRequired[dict[str, str]]


class _Data(TypedDict):
    format: Literal[1]
    stages: dict[str, _Entry]
    hashes: dict[str, list[Any]]  # size, time of change in nanoseconds, sha256


# Keys that came later, with what they were before they were written down.
_LATER = {"recipe.method": DEFAULT, "data.thinking": "template"}
# Keys that entries held once and that may change since (`stages/identity.py`).
_FREED = frozenset({"train.accumulation_steps", "train.tokens_per_device"})


def config_slice(config: RunConfig, prefixes: Iterable[str], excluding: Iterable[str] = ()) -> dict[str, Any]:
    """The dotted keys that begin with one of `prefixes`, with their values as JSON would hold them."""
    prefixes, excluding = tuple(prefixes), set(excluding)
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    chosen = {}
    for key in config_keys():
        if key.startswith(prefixes) and key not in excluding:
            value: Any = plain
            for part in key.split("."):
                value = value[part]
            chosen[key] = value
    return chosen


@final
class Manifest:
    """The manifest of one run directory; every change is on disk when the method returns."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / MANIFEST_FILE
        self._data: dict[str, Any] = {"format": 1, "stages": {}, "hashes": {}}
        if self.path.exists():
            found = read_json(self.path, _RESTORE, StageError, most=None)
            self._data = check_form(_Data, found, str(self.path), _RESTORE, StageError)

    def enter(self, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        """True when the stage is finished already.

        Raises:
          StageError: it was entered before with other config values or other inputs; names each and both values.
        """
        entry = self._data["stages"].get(stage)
        if entry is not None:
            if problems := _changes(entry, config, inputs):
                raise StageError(
                    f"stage {stage} in {self.path.parent} was made with other values:\n"
                    + "\n".join(f"  {problem}" for problem in problems)
                    + "\nSet them back, or give a new directory with --run-dir or --out."
                )
            return entry["finished"] is not None
        entry = {
            "config": dict(config),
            "inputs": dict(inputs),
            "started": _now(),
            "versions": _versions(),
            "finished": None,
            "summary": {},
        }
        self._data["stages"][stage] = entry
        self._write()
        return False

    def renew(self, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Of a stage that nothing depends on: made from other values it is forgotten, so that it is entered anew."""
        entry = self._data["stages"].get(stage)
        if entry is not None and _changes(entry, config, inputs):
            del self._data["stages"][stage]
            self._write()

    def finish(self, stage: str, summary: Mapping[str, Any]) -> None:
        """Marks a stage as done; `summary` holds the JSON values that the closing table shows."""
        self._data["stages"][stage] |= {"finished": _now(), "summary": dict(summary)}
        self._write()

    def reopen(self, stage: str) -> None:
        """Of a stage whose result was lost: it is to be done again, from what is left of it."""
        self._data["stages"][stage] |= {"finished": None, "summary": {}}
        self._write()

    def is_finished(self, stage: str) -> bool:
        """Whether a stage was finished, whatever it was made from."""
        return self._data["stages"].get(stage, {}).get("finished") is not None

    def summary(self, stage: str) -> dict[str, Any]:
        """What `finish` was given; empty for a stage that is not finished."""
        return self._data["stages"].get(stage, {}).get("summary", {})

    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        """By stage, in the order in which they were entered: config, inputs, started, finished, summary, versions."""
        return self._data["stages"]

    def inputs(self, stage: str) -> dict[str, str]:
        """The hashes of what a stage was made from; empty for one that was never entered."""
        return self._data["stages"].get(stage, {}).get("inputs", {})

    def file_hash(self, path: Path) -> str:
        """sha256 of a file's content; computed once as long as its size and time of change stay.

        Raises:
          StageError: there is no such file.
        """
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise StageError(f"no file at {path}. Look at the paths in the config or on the command line.") from None
        key, stamp = str(path.absolute()), [stat.st_size, stat.st_mtime_ns]
        known = self._data["hashes"].get(key)
        if known is None or known[:2] != stamp:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            known = self._data["hashes"][key] = [*stamp, digest]
        return known[2]

    def model_hash(self, model_dir: Path) -> str:
        """One hash over the weights, config, tokenizer and template of a model directory."""
        files = sorted(model_dir.glob("*.safetensors")) + [model_dir / name for name in _MODEL_FILES]
        lines = [f"{path.name} {self.file_hash(path)}" for path in files if path.exists()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._data)


def _changes(entry: Mapping[str, Any], config: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """How values differ from those that a stage was entered with, a line each."""
    before = {key: value for key, value in _LATER.items() if key in config} | entry["config"]
    before = {key: value for key, value in before.items() if key not in _FREED}
    return _differences(before, config) + _differences(entry["inputs"], inputs, "input ")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], kind: str = "") -> list[str]:
    return [
        f"{kind}{key}: was {json.dumps(before.get(key))}, is now {json.dumps(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _versions() -> dict[str, str]:
    """Of Python and of the packages that shape numbers, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
