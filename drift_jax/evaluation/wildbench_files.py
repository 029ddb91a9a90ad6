"""WildBench's numbers from files of rows or from published tables: what `drift evaluate wildbench --rows` prints.

score rows       the row of score.json; of several files {model: row}, with Elo-style ratings
pairwise rows    the row of pairwise-REFERENCE-K.json; of files against several references also their mix
tables           {model: row} with macros and rewards computed anew; of tables against several references their mix
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_jax.errors import DataError
from drift_jax.evaluation.elo import elo_ratings, games_of_scores
from drift_jax.evaluation.json_rows import read_value
from drift_jax.evaluation.wildbench import (
    OUTCOMES,
    REFERENCES,
    Tags,
    macro,
    mix_rewards,
    reward_table,
    rewards_of_counts,
    score_table,
)
from drift_jax.evaluation.wildbench_rows import Found, pair_rows, score_rows, tested_and_reference

_KINDS = (
    "a JSON array of score rows (session_id, score) or pairwise rows (winner, model_outputs), or a published table "
    "{model: {...}}"
)


def recompute(paths: Sequence[Path], tags: Tags | None, reference: str | None, k: int) -> dict[str, Any]:
    """One JSON object for files of one kind.

    Args:
      tags: of the tasks; None: categories and macros of rows are not computed.
      reference: which model of a pairwise file is the reference; None: one of the published ones.

    Raises:
      DataError: a file is none of the kinds, the files are of several, or no row of one can be used.
    """
    values = {path: read_value(path) for path in paths}
    kinds = {path: _kind(path, value) for path, value in values.items()}
    if len(set(kinds.values())) > 1:
        named = ", ".join(f"{path} ({kind})" for path, kind in kinds.items())
        raise DataError(f"the files are of several kinds: {named}. Give files of one kind.")
    return _READERS[next(iter(kinds.values()))](values, tags, reference, k)


def _kind(path: Path, value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return "pairwise rows" if any("model_outputs" in row for row in value) else "score rows"
    if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
        return "table"
    raise DataError(f"{path} is empty or of another form: {_KINDS} is needed.")


def _scores(values: Mapping[Path, Any], tags: Tags | None, reference: str | None, k: int) -> dict[str, Any]:
    found = {path.stem: _some(score_rows(rows), path) for path, rows in values.items()}
    tables = {
        name: score_table(name, rows.rows, tags) | {"excluded": rows.excluded, **_untagged(rows, tags)}
        for name, rows in found.items()
    }
    if len(tables) < len(values):
        raise DataError("two files have the same name: a model is named by the name of its file.")
    if len(tables) == 1:
        return next(iter(tables.values()))
    ratings = elo_ratings(games_of_scores({name: rows.rows for name, rows in found.items()}))
    return {name: table | {"WB_Elo": ratings.get(name)} for name, table in tables.items()}


def _pairs(values: Mapping[Path, Any], tags: Tags | None, reference: str | None, k: int) -> dict[str, Any]:
    tables: dict[str, dict[str, Any]] = {}  # reference -> model -> row
    last: dict[str, Any] = {}
    for path, rows in values.items():
        tested, other = tested_and_reference(rows, reference, str(path))
        found = _some(pair_rows(rows, tested, other), path)
        last = reward_table(tested, found.rows, tags, k) | {"reference": other, "excluded": found.excluded}
        short = next((column for name, column in REFERENCES.items() if name in other), other)
        tables.setdefault(short, {})[tested] = last
    if len(values) == 1:
        return last
    return _mixed(tables, k)


def _tables(values: Mapping[Path, Any], tags: Tags | None, reference: str | None, k: int) -> dict[str, Any]:
    tables = {path.stem: {name: _table_row(row, path) for name, row in rows.items()} for path, rows in values.items()}
    if len(tables) == 1:
        return next(iter(tables.values()))
    if any(name not in row for table in tables.values() for row in table.values() for name in OUTCOMES):
        raise DataError("only tables of pairwise counts are mixed: give tables of scores one at a time.")
    penalties = {row.get("K", k) for table in tables.values() for row in table.values()}
    if len(penalties) > 1:
        raise DataError(f"the tables have several length penalties: K = {', '.join(map(str, sorted(penalties)))}.")
    # pairwise-haiku-K=500.json is upstream's name of the table against that reference.
    short = {stem: stem.removeprefix("pairwise-").partition("-K=")[0] for stem in tables}
    return _mixed({short[stem]: table for stem, table in tables.items()}, penalties.pop())


def _mixed(tables: Mapping[str, Mapping[str, Any]], k: int) -> dict[str, Any]:
    mixed: dict[str, dict[str, Any]] = {model: dict(row) for model, row in mix_rewards(tables, k).items()}
    for name, table in tables.items():
        for model, row in table.items():
            mixed[model][name] = row
    return mixed


def _table_row(row: Mapping[str, Any], path: Path) -> dict[str, Any]:
    try:
        if all(name in row for name in (*OUTCOMES, "total")):
            return rewards_of_counts(row)
        categories = row.get("task_categorized_scores")
        if isinstance(categories, dict):
            found = macro(categories)
            return dict(row) | {"task_macro_score": found, "adjusted_task_macro_score": found}
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is a table whose numbers cannot be used ({type(error).__name__}: {error!s:.80}). Take it from "
            "upstream again."
        ) from None
    raise DataError(f"{path} is a table that holds neither counts (win_much, ...) nor task_categorized_scores.")


def _some(found: Found[Any], path: Path) -> Found[Any]:
    if not found.rows:
        raise DataError(f"no row of {path} can be used: {found.excluded}.")
    return found


def _untagged(found: Found[Any], tags: Tags | None) -> dict[str, int]:
    """How many rows belong to none of the tasks whose tags are known."""
    return {} if tags is None else {"without_task": sum(row.session_id not in tags for row in found.rows)}


_READERS = {"score rows": _scores, "pairwise rows": _pairs, "table": _tables}
