"""Scripts of the repository as modules, for tests of what is in them."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def script_module(path: Path) -> Iterator[Any]:
    """The script as a module; what it adds to Python's path goes again with the block."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
