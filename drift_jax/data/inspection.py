"""What a file of ours holds: every row is validated, and its numbers are given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_jax.config import load_config
from drift_jax.errors import BadRowsError, DataError
from drift_jax.reading import parse_json, read_json, why_not_json
from drift_jax.records import OnBadRow, Row, read_dsat, read_lines, read_pairs, read_sat

_PART_KEYS = ("prompt", "rejected", "chosen", "user_preference")
_COMPLETION_KEYS = {"id": str, "sample": int, "text": str, "token_ids": list, "finish_reason": str}
_MOST_VALUES = 6  # of a key of `meta` that are listed


@dataclass(frozen=True)
class Inspection:
    """What was found in a file. Lengths are in characters: smallest, median, largest."""

    kind: str
    rows: int
    skipped: tuple[tuple[int, str], ...] = ()
    lengths: dict[str, tuple[int, int, int]] | None = None
    turns: dict[int, int] | None = None  # user turns of a prompt -> rows
    keys: dict[str, int] | None = None  # further keys -> rows that have them
    values: dict[str, dict[str, int]] | None = None  # of `meta` and licences -> rows


def inspect_file(path: Path, on_bad_row: OnBadRow = "error") -> Inspection:
    """Validates a JSONL file of DSAT records, SAT records, pairs, completions or other rows, a JSON file, or a CONFIG.

    Raises:
      DataError: the file cannot be read, or rows break their format; all of them are listed.
      ConfigError: a CONFIG has wrong keys.
    """
    if path.suffix in (".yaml", ".yml"):
        load_config(path)
        return Inspection("config of a run", 1)
    if path.suffix == ".json":
        return _inspect_json(path)
    first = _first_row(path)
    for kind, (keys, inspect) in _KINDS.items():
        if keys <= set(first):
            return inspect(kind, path, on_bad_row)
    if set(_PART_KEYS) & set(first):
        raise DataError(
            f"{path}: the first row has the keys {', '.join(first)}. DSAT records need prompt, rejected and "
            "user_preference, SAT records prompt, chosen and user_preference, pairs prompt, chosen and rejected."
        )
    return _inspect_rows("rows", path, on_bad_row)


def _inspect_json(path: Path) -> Inspection:
    value = read_json(path, "Mend it.", most=None)
    keys = {key: 1 for key in value} if isinstance(value, dict) else {}
    return Inspection("JSON", 1, keys=keys)


def _first_row(path: Path) -> Row:
    """Empty where it is no object: whoever reads the whole file says so."""
    try:
        row = parse_json(next((line for _, line in read_lines(path)), b"{}"))
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _inspect_dsat(kind: str, path: Path, on_bad_row: OnBadRow) -> Inspection:
    rows = read_dsat(path, on_bad_row)
    texts = [(r.prompt, {"rejected": r.rejected, "user_preference": r.user_preference}, r.extra) for r in rows.records]
    return _describe(kind, texts, rows.skipped)


def _inspect_sat(kind: str, path: Path, on_bad_row: OnBadRow) -> Inspection:
    rows = read_sat(path, on_bad_row)
    texts = [(r.prompt, {"chosen": r.chosen, "user_preference": r.user_preference}, r.extra) for r in rows.records]
    return _describe(kind, texts, rows.skipped)


def _inspect_pairs(kind: str, path: Path, on_bad_row: OnBadRow) -> Inspection:
    rows = read_pairs(path, on_bad_row)
    texts = [
        (r.prompt, {"chosen": r.chosen, "rejected": r.rejected}, {"meta": r.meta, **r.extra}) for r in rows.records
    ]
    return _describe(kind, texts, rows.skipped)


def _inspect_completions(kind: str, path: Path, on_bad_row: OnBadRow) -> Inspection:
    return _inspect_rows(kind, path, on_bad_row, _completion_problems)


def _completion_problems(row: Row) -> str:
    wrong = [key for key, form in _COMPLETION_KEYS.items() if not isinstance(row.get(key), form)]
    return f"missing or of another type: {', '.join(wrong)}" if wrong else ""


def _inspect_rows(
    kind: str, path: Path, on_bad_row: OnBadRow, problem_of: Callable[[Row], str] = lambda _: ""
) -> Inspection:
    keys: Counter[str] = Counter()
    problems: list[tuple[int, str]] = []
    total = 0
    for number, line in read_lines(path):
        total += 1
        try:
            row = parse_json(line)
        except ValueError as error:
            problems.append((number, f"not JSON: {why_not_json(error, in_line=True)}"))
            continue
        why = problem_of(row) if isinstance(row, dict) else "a row must be a JSON object"
        if why:
            problems.append((number, why))
        else:
            keys.update(list(row))
    if not total:
        raise DataError(f"{path} is empty: at least one row is needed.")
    if problems and (on_bad_row == "error" or len(problems) == total):
        raise BadRowsError(str(path), problems, total)
    return Inspection(kind, total - len(problems), tuple(problems), keys=dict(keys))


# kind -> the keys that only its rows have all of, and how it is read
_KINDS: dict[str, tuple[set[str], Callable[[str, Path, OnBadRow], Inspection]]] = {
    "DSAT records": ({"prompt", "rejected", "user_preference"}, _inspect_dsat),
    "SAT records": ({"prompt", "chosen", "user_preference"}, _inspect_sat),
    "pairs": ({"prompt", "chosen", "rejected"}, _inspect_pairs),
    "completions": ({"id", "sample", "token_ids"}, _inspect_completions),
}


def _describe(
    kind: str, records: Iterable[tuple[tuple[Any, ...], dict[str, str], Row]], skipped: tuple[tuple[int, str], ...]
) -> Inspection:
    lengths: dict[str, list[int]] = {}
    turns: Counter[int] = Counter()
    keys: Counter[str] = Counter()
    values: dict[str, Counter[str]] = {}
    count = 0
    for prompt, parts, extra in records:
        count += 1
        turns[sum(message.role == "user" for message in prompt)] += 1
        keys.update(list(extra))
        for name, size in ("prompt", sum(len(m.content) for m in prompt)), *((n, len(t)) for n, t in parts.items()):
            lengths.setdefault(name, []).append(size)
        for name, value in (extra | (meta if isinstance(meta := extra.get("meta"), dict) else {})).items():
            if name in ("split", "license", "sampler"):
                values.setdefault(name, Counter())[str(value)] += 1
    spans = {name: (min(sizes), sorted(sizes)[len(sizes) // 2], max(sizes)) for name, sizes in lengths.items()}
    listed = {name: dict(counts.most_common(_MOST_VALUES)) for name, counts in values.items()}
    return Inspection(kind, count, skipped, spans, dict(sorted(turns.items())), dict(keys), listed)
