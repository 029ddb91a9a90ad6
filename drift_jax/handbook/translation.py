"""Reads an alignment-handbook DPO file: every key of it is translated, set aside with a reason, or refused.

The resolved config means what the file meant to the stack it was written for, so a key that the file leaves out
gets that stack's default, not ours. Nothing is guessed: unknown keys, values that are not offered and wrong types
are collected over the whole file and raised as one `ConfigError`.

Which stack (`keys.STACKS`): a list as `loss_type` is TRL >= 0.29; `dataset_mixture` or `dataset_name` is the handbook
from 2025-07 on; everything else is the handbook before, for which the published DRIFT configs were written.

Where the result departs from that stack:
 1. An epoch has ceil(pairs / batch) updates; with gradient accumulation the Hugging Face Trainer of that time leaves
    out the last, incomplete one.
 2. An absent `report_to` means no trackers; transformers 4 took every installed one. An absent `save_total_limit`
    means `checkpoint.keep`; the Trainer keeps all.
 3. TRL 0.14 to 0.28 cut rows above `max_length` at their start (keep_end); here they are cut at their end.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from drift_jax.config import RunConfig, apply_override, build_config, config_keys, merge_configs, read_yaml
from drift_jax.errors import ConfigError
from drift_jax.handbook.keys import ALIASES, CHOICES, DIRECT, IGNORED, NOT_NULL, ONLY, STACKS
from drift_jax.handbook.mixture import DATA_RULES, DatasetMixture, build_mixture
from drift_jax.handbook.rules import RULES
from drift_jax.handbook.values import HandbookFile, Outcome, Refused, fitting, shown, word
from drift_jax.presets import PRESETS

_ALL_RULES = {**RULES, **DATA_RULES}
KNOWN_KEYS = frozenset({*ALIASES, *IGNORED, *ONLY, *DIRECT, *CHOICES, *_ALL_RULES})
_DATA_KEYS = frozenset({*DATA_RULES, *(old for old, new in ALIASES.items() if new in DATA_RULES)})


@dataclass(frozen=True)
class TranslatedKey:
    """One key of the file, or a default that the file leaves to its stack."""

    key: str
    value: Any
    ours: str  # "train.beta = 0.1", or why the key does not apply
    default: bool = False  # the file does not name it


@dataclass(frozen=True)
class Translation:
    """What a handbook file says, in this package's terms."""

    source: str
    config: dict[str, Any]  # nested plain values for `build_config`
    mixture: DatasetMixture
    rows: tuple[TranslatedKey, ...]

    def build(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The resolved config; `a.b=c` overrides come after the translation. Raises `ConfigError`."""
        return build_config(with_overrides(self.config, overrides), source=self.source)

    def over(self, base: Mapping[str, Any], source: str) -> Translation:
        """The same over the plain values of another config, those of the translation winning."""
        return replace(self, config=merge_configs(dict(base), self.config), source=source)

    def without_pairs(self, instead: str) -> Translation:
        """The same, where the pairs come from elsewhere: the rows that name pairs say so."""
        note = f"does not apply: pairs are not read from this file but from {instead}"
        rows = (replace(row, ours=note) if row.key in _DATA_KEYS else row for row in self.rows)
        return replace(self, mixture=DatasetMixture(), rows=tuple(rows))


def with_overrides(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Plain values of a config with `a.b=c` overrides, as a copy. Raises `ConfigError` for other forms."""
    raw = copy.deepcopy(dict(config))
    for override in overrides:
        apply_override(raw, override)
    return raw


def is_handbook_file(path: str | Path) -> bool:
    """Whether a YAML file has flat keys of the handbook and none of our sections.

    Raises:
      ConfigError: the file is missing, is not YAML or holds no mapping.
    """
    raw = read_yaml(path)
    return not KNOWN_KEYS.isdisjoint(raw) and not _own_keys(raw)


def _own_keys(raw: Mapping[str, Any]) -> list[str]:
    """The top-level keys that are those of a CONFIG of ours."""
    ours = {key.partition(".")[0] for key in config_keys()}
    return [key for key in raw if key in ours]


def translate_handbook(path: str | Path, devices: int) -> Translation:
    """Reads an alignment-handbook DPO file.

    Args:
      devices: the batch of the file is per device; ours is that of all devices together.

    Raises:
      ConfigError: the file cannot be read, or keys of it cannot be translated (all of them are named).
    """
    if devices < 1:
        raise ConfigError(f"a batch needs at least one device, found {devices}.")
    raw = read_yaml(path)
    if KNOWN_KEYS.isdisjoint(raw) and (own := _own_keys(raw)):
        raise ConfigError(
            f"{path} is a config of drift_jax already (it has {', '.join(own)}), and no file of alignment-handbook: "
            f"there is nothing to translate. `drift run {path}` takes it as it is."
        )
    file = _open(raw, devices, Path(path))
    settings: dict[str, Any] = {}
    rows, problems = [], _conflicts(raw)
    for key, value in raw.items():
        try:
            outcome = _translate(key, value, file)
        except Refused as refused:
            problems.append(f"{key}: {refused}")
            continue
        settings |= outcome.settings
        rows.append(TranslatedKey(key, value, outcome.text()))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{path} cannot be translated, {count}:\n  " + "\n  ".join(problems))
    for key in file.absent:
        outcome = _translate(key, file.values[key], file)
        if outcome.settings:
            settings |= outcome.settings
            rows.append(TranslatedKey(key, file.values[key], outcome.text(), default=True))
    return Translation(str(path), _nested(settings), build_mixture(file), tuple(rows))


def translation_table(rows: Sequence[TranslatedKey]) -> Table:
    """Key, value and our key of every row, for people to read before a run."""
    table = Table()
    for title in ("key", "value", "here"):
        table.add_column(title, overflow="fold")  # nothing is cropped, however narrow the terminal
    for row in rows:
        value = shown(row.value) + (" (default)" if row.default else "")
        table.add_row(escape(row.key), escape(value), escape(row.ours), style="dim" if row.default else None)
    return table


def _open(raw: Mapping[Any, Any], devices: int, path: Path) -> HandbookFile:
    named = {ALIASES.get(key, key): value for key, value in raw.items()}
    given = {key: value for key, value in named.items() if value is not None}
    stack = STACKS[_stack_of(given)]
    values = {"output_dir": f"runs/{path.stem}", **stack.defaults, **given}
    values = {"eval_steps": values["logging_steps"], **values}
    if values["loss_type"] == ["sigmoid", "sft"]:
        values = {"loss_weights": [1.0, 1.0], **values}
    return HandbookFile(values, tuple(key for key in values if key not in named), stack, devices)


def _stack_of(given: Mapping[Any, Any]) -> str:
    if isinstance(given.get("loss_type"), list):
        return "trl1"
    return "handbook2" if {"dataset_mixture", "dataset_name"} & given.keys() else "handbook"


def _conflicts(raw: Mapping[Any, Any]) -> list[str]:
    """Problems that belong to no single key."""
    problems = []
    if "model_name_or_path" not in raw:
        problems.append("model_name_or_path: this key is required.")
    for old, new in ALIASES.items():
        if old in raw and new in raw:
            problems.append(f"{old}, {new}: two names of one thing; keep one of them.")
    sources = [key for key in ("dataset_mixer", "dataset_mixture", "dataset_name") if raw.get(key) is not None]
    if len(sources) > 1:
        problems.append(f"{', '.join(sources)}: each names the pairs; keep one of them.")
    return problems


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections. What the preset says anyway is left to it, so that `--set preset=` means something."""
    of_preset = PRESETS[settings["preset"]]
    config: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, leaf = key.rpartition(".")
        if key not in of_preset or of_preset[key] != value:
            (config.setdefault(section, {}) if section else config)[leaf] = value
    return config


def _translate(key: Any, value: Any, file: HandbookFile) -> Outcome:
    name = ALIASES.get(key, key)
    if name not in KNOWN_KEYS:
        close = difflib.get_close_matches(str(key), KNOWN_KEYS, n=1)
        raise Refused("unknown key." + (f" Did you mean {close[0]}?" if close else ""))
    reason = file.stack.ignored.get(name) or IGNORED.get(name)
    if reason is not None:
        return Outcome({}, f"does not apply: {reason}")
    if name in ONLY:
        return _only(name, value)
    if value is None:
        reason = file.stack.not_null.get(name) or NOT_NULL.get(name)
        if reason is not None:
            raise Refused(f"must not be null: {reason}.")
        if name not in file.values:
            return Outcome({}, "null: not set")
        value = file.values[name]
    if name in DIRECT:
        return Outcome({ours: fitting(ours, value) for ours in DIRECT[name]})
    if name in CHOICES:
        ours, words = CHOICES[name]
        return Outcome({ours: word(value, words)})
    return _ALL_RULES[name](value, file)


def _only(name: str, value: Any) -> Outcome:
    accepted, reason = ONLY[name]
    if value is not None and not any(_same(value, other) for other in accepted):
        wanted = " or ".join(shown(other) for other in accepted if other not in ("", [], {}))
        raise Refused(f"must be {wanted or 'left out'}, found {shown(value)}: {reason}.")
    return Outcome({}, "as here in any case")


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other
