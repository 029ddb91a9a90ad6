"""Rules that find explicit complaints in a user's turn: patterns in versioned YAML files, one file a language.

Ours are `rules_LANGUAGE_vN.yaml` beside this file. A file of your own has the same keys, and any name:

    name: de                     # a language, or what else the rules are about
    version: 1                   # raised with every change: evidence names it
    parts:                                   # optional; <REPLY> in a pattern stands for it
      REPLY: das|die Antwort
    rules:
      - name: wrong
        means: the reply is called wrong
        patterns: |                          # RE2, case ignored; of several lines one has to match
          ^<REPLY> ist falsch
        fires: [Das ist falsch!, ...]        # at least two turns that it must find,
        silent: [Was ist falsch?, ...]       # and two that it must not; both are checked whenever the file is loaded

Patterns are RE2, which takes time linear in the text whatever the pattern: chat text is hostile input. Its `\\b` and
`\\w` know ASCII only; `\\pL` is a letter of any language.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import re2  # pyright: ignore[reportMissingTypeStubs]
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from drift_jax.errors import ConfigError
from drift_jax.yaml_files import read_yaml

_OPENING = 300  # characters that are looked at: people complain first, and long turns hold much else
_READ = 8 * _OPENING  # characters of a turn, before code and blanks are taken out
_LONGEST_PATTERN = 50_000  # characters; parts of parts may grow without end
_MATCHED = 120  # characters of a match that evidence keeps
_PART = re.compile(r"<([A-Z_]+)>")
_FENCE = re2.compile(r"(?s)```.*?(?:```|$)")
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "`": "'", "´": "'", "“": '"', "”": '"'})
_FORBID_EXTRA = ConfigDict(extra="forbid")

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
Examples = Annotated[tuple[Text, ...], Field(min_length=2)]


@dataclass(frozen=True)
class Rule:
    """One pattern, as it stands in a file."""

    __pydantic_config__ = _FORBID_EXTRA

    name: Name
    means: Text
    patterns: Text  # a line each
    fires: Examples
    silent: Examples


@dataclass(frozen=True)
class _File:
    __pydantic_config__ = _FORBID_EXTRA

    name: Name
    version: Annotated[int, Field(ge=1)]
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    parts: dict[Annotated[str, Field(pattern=r"^[A-Z_]+$")], Text] | None = None


@dataclass(frozen=True)
class RuleSet:
    """The rules of one file, ready to be matched."""

    name: str
    version: int
    hash: str  # 16 hex digits of the file's sha256
    rules: tuple[Rule, ...]
    _patterns: tuple[Any, ...]

    def label(self, rule: Rule) -> str:
        """How evidence names a rule, such as en-v1/wrong."""
        return f"{self.name}-v{self.version}/{rule.name}"

    def match(self, text: str) -> Iterator[tuple[str, str]]:
        """(label, matched text) of every rule that fires on a user's turn, in the order of the file."""
        seen = opening(text)
        for rule, pattern in zip(self.rules, self._patterns, strict=True):
            found = pattern.search(seen)
            if found:
                yield self.label(rule), found.group().strip()[:_MATCHED]


def opening(text: str) -> str:
    """What rules look at: the first characters of a turn on one line, without fenced code or typographic quotes."""
    # Half a surrogate pair, which JSON can hold, is no text to RE2.
    start = text[:_READ].encode("utf-8", "replace").decode()
    return " ".join(_FENCE.sub(" ", start).translate(_APOSTROPHES).split())[:_OPENING]


def load_rules(name: str | Path) -> RuleSet:
    """Rules of ours (such as en_v1), or of a file.

    Raises:
      ConfigError: there is no such file, it has other keys, a pattern is no RE2, or an example says otherwise than its
        pattern; names file and rule.
    """
    with importlib.resources.as_file(_find(name)) as path:
        raw, digest = read_yaml(path), hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    try:
        file = TypeAdapter(_File).validate_python(raw)
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise ConfigError(f"{name} is no file of rules: {what}. drift_jax/data/mining/ has examples.") from None
    names = [rule.name for rule in file.rules]
    if len(set(names)) < len(names):
        raise ConfigError(f"{name}: rules have the same name: {sorted({n for n in names if names.count(n) > 1})}.")
    rules = RuleSet(file.name, file.version, digest, file.rules, tuple(_compile(name, file, r) for r in file.rules))
    problems = list(_contradictions(rules))
    if problems:
        raise ConfigError(f"{name}: patterns and their examples do not agree:\n  " + "\n  ".join(problems))
    return rules


def _find(name: str | Path) -> Any:
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    folder = importlib.resources.files("drift_jax.data.mining")
    ours = sorted(f.name[6:-5] for f in folder.iterdir() if f.name.startswith("rules_") and f.name.endswith(".yaml"))
    if str(name) not in ours:
        raise ConfigError(f"no rules {str(name)!r}: ours are {', '.join(ours)}; a file of yours ends in .yaml.")
    return folder / f"rules_{name}.yaml"


def _compile(name: str | Path, file: _File, rule: Rule) -> Any:
    pattern = _spell_out(f"{name}, rule {rule.name}", rule.patterns, file.parts or {})
    options = re2.Options()
    options.case_sensitive = False
    options.log_errors = False
    try:
        return re2.compile(pattern, options=options)
    except re2.error as error:
        why = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        raise ConfigError(f"{name}, rule {rule.name}: not a pattern of RE2: {why}.") from None


def _spell_out(
    where: str,
    lines: str,
    parts: Mapping[str, str],
    around: tuple[str, ...] = (),
    spelled: dict[str, str] | None = None,
) -> str:
    """One pattern of several lines, with its parts, and theirs.

    Args:
      around: names of the parts that hold these lines.
      spelled: parts that are written out already: each is once, however often the others hold it.
    """
    known = {} if spelled is None else spelled

    def part(found: re.Match[str]) -> str:
        name = found[1]
        if name not in parts:
            raise ConfigError(f"{where}: the file has no part {name}.")
        if name in around:
            raise ConfigError(f"{where}: part {name} holds itself.")
        if name not in known:
            known[name] = f"(?:{_spell_out(where, parts[name], parts, (*around, name), known)})"
        return known[name]

    pattern = _PART.sub(part, "|".join(line.strip() for line in lines.splitlines() if line.strip()))
    if len(pattern) > _LONGEST_PATTERN:
        raise ConfigError(
            f"{where}: the pattern has more than {_LONGEST_PATTERN:,} characters once its parts are written out. Split "
            "the rule."
        )
    return pattern


def _contradictions(rules: RuleSet) -> Iterator[str]:
    for rule, pattern in zip(rules.rules, rules._patterns, strict=True):
        for example in rule.fires:
            if not pattern.search(opening(example)):
                yield f"{rule.name} does not find {example!r}"
        for example in rule.silent:
            if any(label == rules.label(rule) for label, _ in rules.match(example)):
                yield f"{rule.name} finds {example!r}"
