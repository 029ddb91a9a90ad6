"""Functions of the user's own, named as MODULE:FUNCTION."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from drift_jax.errors import ConfigError

_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def load_function(name: str, key: str) -> Callable[..., Any]:
    """Modules of the working directory are found as well.

    Args:
      key: what named it, for errors.

    Raises:
      ConfigError: there is no such function, or its module cannot be imported.
    """
    module, _, function = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = getattr(import_named(module, f"{key} {name}"), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key} {name}: {error}. Modules are looked for in {here} and where Python does.") from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f"{key} {name} is no function.")
    return found


def load_check(name: str) -> Callable[..., Any]:
    """As `load_function`, of `--check`."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(
            f"--check takes MODULE:FUNCTION, such as drift_jax.evaluation.checks:is_json, found {name!r}."
        )
    return load_function(name, "--check")


def import_named(module: str, what: str) -> ModuleType:
    """A module that the user named. A module runs when it is imported, so anything may come of that.

    Args:
      what: named it, for errors.

    Raises:
      ModuleNotFoundError: it is not there.
      ConfigError: it is there and cannot be imported; file, line and reason are said.
    """
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        # What is missing may be the module, or something that it imports.
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise
        said = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(
            f"{what}: the module {module} cannot be imported: {_place(error)}{type(error).__name__}: {said}. Mend that "
            "line, or install what it needs."
        ) from None


def _place(error: BaseException) -> str:
    """The last line of the user's own that ran, libraries left out; empty where it cannot be told."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: "
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, "<", __file__))]
    return f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""


def missing_extra(package: str, what: str, extra: str = "analysis") -> ConfigError:
    return ConfigError(f"{what} needs the package {package}: pip install 'drift-jax[{extra}]'.")
