"""alignment-handbook files for tests: made on the spot from a few keys, or lying in `tests/handbook`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from drift_jax.handbook import Translation, translate_handbook

FIXTURES = Path(__file__).parent / "handbook"


def translate(tmp_path: Path, devices: int = 1, **keys: Any) -> Translation:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "org/model"} | keys), encoding="utf-8")
    return translate_handbook(path, devices)


def ours(translation: Translation) -> dict[str, str]:
    return {row.key: row.ours for row in translation.rows}
