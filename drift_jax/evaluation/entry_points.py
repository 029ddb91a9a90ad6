"""Functions of the user's own, named as MODULE:FUNCTION."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from drift_jax.errors import ConfigError


def load_function(name: str, key: str) -> Callable[..., Any]:
    """Modules of the working directory are found as well.

    Args:
      key: what named it, for errors.

    Raises:
      ConfigError: there is no such function.
    """
    module, _, function = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key} {name}: {error}. Modules are looked for in {here} and where Python does.") from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f"{key} {name} is no function.")
    return found


def missing_extra(package: str, what: str, extra: str = "analysis") -> ConfigError:
    return ConfigError(f"{what} needs the package {package}: pip install 'drift-jax[{extra}]'.")
