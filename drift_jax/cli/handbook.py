"""Runs by a DPO file of alignment-handbook."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from drift_jax.cli.options import build_console, change, refuse_handbook
from drift_jax.config import RunConfig
from drift_jax.distributed import on_main

if TYPE_CHECKING:
    from drift_jax.handbook import Translation


def handbook_run(path: Path, config: Path | None, changes: list[str]) -> RunConfig:
    """A run by the hyper-parameters of a handbook file; records and pairs come from CONFIG, or pairs from the file."""
    from drift_jax.data.mixer import load_mixture
    from drift_jax.handbook import translate_handbook

    base = _base_of_handbook(config) if config is not None else {}
    translation = translate_handbook(path, devices_with_pairs(base, changes))
    if config is not None:
        translation = translation.without_pairs(str(config))
        print_translation(translation, build_console())
        return translation.over(base, source=f"{config} with {path}").build(changes)
    resolved = translation.build(changes)
    if resolved.data.seed_train is not None:
        translation = translation.without_pairs(resolved.data.seed_train)
    print_translation(translation, build_console())
    # With records alone there is no seed stage; with neither, loading says that there are no pairs.
    if resolved.data.seed_train is None and (translation.mixture.train or not resolved.data.dsat):
        mixture, data = translation.mixture, Path(resolved.run_dir) / "data"
        pairs = Path(on_main(lambda: str(load_mixture(mixture, data, resolved.data.on_bad_row))))
        changes = [change("data.seed_train", pairs / "pairs.train.jsonl"), *changes]
        if on_main((pairs / "pairs.test.jsonl").exists):
            changes = [change("data.seed_test", pairs / "pairs.test.jsonl"), *changes]
    if not resolved.data.dsat:
        changes = ["recipe.iterations=0", *changes]
    return translation.build(changes)


def _base_of_handbook(config: Path) -> dict[str, Any]:
    """The plain values of CONFIG, less what presets decide: there the preset of the handbook file holds."""
    from drift_jax.config import read_yaml
    from drift_jax.presets import CHOICES

    refuse_handbook(config)
    base = read_yaml(config)
    for key in CHOICES:
        section, leaf = key.split(".")
        if isinstance(base.get(section), dict):
            base[section] = {name: value for name, value in base[section].items() if name != leaf}
    return base


def devices_with_pairs(base: dict[str, Any], changes: list[str]) -> int:
    """Devices that hold pairs of their own; a handbook file's batch is that of one of them, and it sets no mesh."""
    from drift_jax.config import build_config
    from drift_jax.handbook import with_overrides
    from drift_jax.sharding import build_layout

    # The mesh alone: whether the rest fits together cannot be said before the batch is known.
    values = {"run_dir": "none", "model": {"path": "none"}, "mesh": with_overrides(base, changes).get("mesh", {})}
    return build_layout(build_config(values).mesh).ways("batch")


def print_translation(translation: Translation, console: Console) -> None:
    from drift_jax.handbook import translation_table

    console.print(translation_table(translation.rows))
