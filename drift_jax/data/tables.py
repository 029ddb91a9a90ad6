"""Datasets that `datasets` keeps on a disk: what their own files of names may name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drift_jax.errors import DataError
from drift_jax.files import leaves


def check_table(folder: Path) -> None:
    """Checks `state.json` of a dataset, or `dataset_dict.json` and those of its splits: `datasets` opens all they name.

    Raises:
      DataError: they name a file that is not in the folder, be it by `..`, by an absolute path or by a link. What is
        wrong with them otherwise is for `datasets` to say.
    """
    splits = _read(folder / "dataset_dict.json").get("splits")
    for split in splits if isinstance(splits, list) else []:
        _check(folder, folder / "dataset_dict.json", split)
        check_table(folder / str(split))
    files = _read(folder / "state.json").get("_data_files")
    for file in files if isinstance(files, list) else []:
        _check(folder, folder / "state.json", file.get("filename") if isinstance(file, dict) else None)


def _check(folder: Path, source: Path, name: Any) -> None:
    if not isinstance(name, str) or Path(name).name != name or leaves(folder / name, folder):
        raise DataError(
            f"{source} names {name!r}, which is not in that folder. Take the dataset from another place, or save it "
            "anew with save_to_disk."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
