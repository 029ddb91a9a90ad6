"""Config keys that name files: a home directory is spelled out, and what is no path of this machine is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from drift_jax.files import is_address

PATH_KEYS = (
    "run_dir",
    "model.path",
    "data.dsat",
    "data.sat",
    "data.seed_train",
    "data.seed_test",
    "train.reference_cache",
)


def expand_home(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a config with `~` and `~user` at the beginning of a path as the directory they stand for.

    A shell does it for words of their own alone: neither in a file nor behind `--set run_dir=`.
    """
    expanded = dict(raw)
    for key in PATH_KEYS:
        section, _, leaf = key.rpartition(".")
        holder = expanded.get(section) if section else expanded
        path = holder.get(leaf) if isinstance(holder, dict) else None
        if isinstance(path, str) and path.startswith("~"):
            changed = {leaf: os.path.expanduser(path)}
            expanded |= {section: holder | changed} if section and isinstance(holder, dict) else changed
    return expanded


def path_problems(values: Mapping[str, Any]) -> list[str]:
    """A line for each of these keys that is no path of this machine; `values` are a whole config's, nested."""
    problems = []
    for key in PATH_KEYS:
        section, _, leaf = key.rpartition(".")
        path = (values[section] if section else values)[leaf] or ""
        if is_address(path):
            problems.append(
                f"{key}: {path!r} is an address, and files are read and written by path alone. Mount the bucket on "
                "every host (gcsfuse for gs://, mountpoint-s3 for s3://) and give the mounted path."
            )
        elif path.startswith("~"):
            problems.append(f"{key}: {path!r} begins with the home of a user whom this machine does not know.")
    return problems
