"""YAML as people write it: floats such as 5e-7, and a key that stands once in its mapping."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, final

import yaml

from drift_jax.errors import ConfigError
from drift_jax.reading import LONG_INTEGER, read_text

MOST_BYTES = 1 << 20  # of a file; PyYAML takes seconds for a MiB
MOST_NODES = 100_000
_FOUND = {type(None): "nothing", list: "a list", str: "text"}
_TOO_MUCH = f"more than {MOST_NODES:,} values once its aliases are written out"


@final
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
    """Raises `yaml.YAMLError` for everything that PyYAML cannot read; it has other names for some of it.

    Aliases are read as copies, which a file may nest: one that would grow beyond `MOST_NODES` is refused, and so is one
    that holds itself.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_aliases(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, AttributeError, TypeError) as error:
        if "integer string conversion" in str(error):
            raise yaml.YAMLError(LONG_INTEGER) from None
        # A date that does not exist, an integer of thousands of digits, `!!timestamp x`, brackets without end.
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def _check_aliases(root: yaml.Node) -> None:
    if not isinstance(root, yaml.MappingNode):
        _count(root, {})
        return
    known: dict[int, int | None] = {id(root): None}
    total = 0
    for key, value in root.value:
        try:
            total += _count(key, known) + _count(value, known)
            if total > MOST_NODES:
                raise yaml.YAMLError(_TOO_MUCH)
        except yaml.YAMLError as error:
            raise yaml.YAMLError(f"{key.value!s:.80}: {error}") from None


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Nodes of a tree once its aliases are copies. `known`: those of nodes by id, None while they are being counted."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise yaml.YAMLError(f"an alias at line {node.start_mark.line + 1} stands for something that holds it")
        return found
    known[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    total = 1 + sum(_count(part, known) for part in parts)
    if total > MOST_NODES:
        raise yaml.YAMLError(_TOO_MUCH)
    known[id(node)] = total
    return total


def on_one_line(error: yaml.YAMLError) -> str:
    """What is wrong, and where."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    return " ".join(str(what).split()) + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark else "")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, its floats as people write them (`5e-7`).

    Raises:
      ConfigError: the file is missing, is not YAML or holds no mapping.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is not a YAML file: it is a directory. Name a file in it.")
    if not path.exists() and not path.is_symlink():
        raise ConfigError(f"no config file at {path}. Examples are in configs/.")
    try:
        raw = parse_yaml(read_text(path, ConfigError, MOST_BYTES))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not a YAML file: {on_one_line(error)}. Mend that line.") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} must hold `key: value` lines, found {_FOUND.get(type(raw), 'one value')}. See configs/."
        )
    return raw
