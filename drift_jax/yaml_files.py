"""YAML as people write it: floats such as 5e-7, and a key that stands once in its mapping."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from drift_jax.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML whose floats follow YAML 1.2 (PyYAML reads `5e-7` as text), and whose mappings name a key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith((":str", ":merge")):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Raises `yaml.YAMLError` for everything that PyYAML cannot read; it has other names for some of it."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (it is a SafeLoader)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        # A date that does not exist, an integer of thousands of digits, `!!timestamp x`, brackets without end.
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, its floats as people write them (`5e-7`).

    Raises:
      ConfigError: the file is missing, is not YAML or holds no mapping.
    """
    path = Path(path)
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}. Examples are in configs/.") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, found {type(raw).__name__}.")
    return raw
