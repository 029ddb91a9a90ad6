"""Pairs to and from folders of TRL and alignment-handbook, and datasets on disk.

    drift      pairs.train.jsonl, pairs.test.jsonl (of `drift mine`: seed.train.jsonl, seed.test.jsonl)
    handbook   train.jsonl, test.jsonl: what `datasets.load_dataset(FOLDER)` and both of them read
    disk       a `datasets` directory, as `save_to_disk` writes it

A row is `prompt`, `chosen`, `rejected` as lists of messages in all three; whole dialogues are read too, and turns
of `from` and `value` (`mixer.py`).
Ours and `handbook` keep `meta` as it is; a table has one type a column, so `disk` keeps it as JSON text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets

from drift_jax.data.mixer import pair_row
from drift_jax.data.tables import check_table
from drift_jax.errors import BadRowsError, DataError, StageError
from drift_jax.files import write_jsonl
from drift_jax.reading import parse_json, why_not_json
from drift_jax.records import OnBadRow, Pair, Row, pair_to_row, read_lines, read_pairs

Form = Literal["drift", "handbook", "disk"]
_SPLITS = ("train", "test")
_NAMES = {"drift": "pairs.{}.jsonl", "handbook": "{}.jsonl"}
_READ = ("pairs.{}.jsonl", "seed.{}.jsonl", "{}.jsonl")  # the first of them that is there


@dataclass(frozen=True)
class Converted:
    """Pairs of one split that were written, and the rows left out as (row from 1, reason)."""

    pairs: int
    skipped: tuple[tuple[int, str], ...]


def convert_pairs(source: Path, out: Path, form: Form, on_bad_row: OnBadRow = "error") -> dict[str, Converted]:
    """Writes the pairs of a folder, a dataset on disk or one JSONL file in another form.

    A single file is split `train`. No file with pairs is replaced or removed, be it of the source or of another call.

    Raises:
      DataError: there are no pairs, rows break the format (lists them), or `out` holds pairs under a name of this form.
      StageError: `out` is there already and is no folder of this form, or cannot be written.
    """
    read = {split: _read_split(source, split, on_bad_row) for split in _SPLITS}
    if not any(pairs for pairs, _ in read.values()):
        names = ", ".join(name.format("train") for name in _READ)
        raise DataError(f"{source} holds no pairs: one of {names}, or a dataset on disk is needed.")
    if out.resolve() == source.resolve() or (
        out.exists() and (not out.is_dir() or (form == "disk" and any(out.iterdir())))
    ):
        raise StageError(f"{out} is there already. Give another directory, or remove it.")
    if form != "disk":
        _refuse_pairs_in(out, form, source)
    out.mkdir(parents=True, exist_ok=True)
    if form == "disk":
        tables = datasets.DatasetDict()
        for split, (pairs, _) in read.items():
            if pairs:
                tables[split] = datasets.Dataset.from_list(list(_table_rows(pairs)))
        tables.save_to_disk(str(out))
        return {split: Converted(len(pairs), skipped) for split, (pairs, skipped) in read.items()}
    for split, (pairs, _) in read.items():
        if pairs:
            write_jsonl(out / _NAMES[form].format(split), map(pair_to_row, pairs))
    return {split: Converted(len(pairs), skipped) for split, (pairs, skipped) in read.items()}


def _refuse_pairs_in(out: Path, form: Form, source: Path) -> None:
    """Of any split: beside one that is written, that of other pairs would pass for its test or its training side."""
    for path in (out / _NAMES[form].format(split) for split in _SPLITS):
        if path.exists() and path.samefile(source):
            raise DataError(f"{path} is the source, and --out is its folder. Give another directory.")
        if path.exists() and (path.is_dir() or path.stat().st_size):
            raise DataError(f"{path} is there already and is not replaced. Give another directory, or remove the file.")


def _read_split(source: Path, split: str, on_bad_row: OnBadRow) -> tuple[tuple[Pair, ...], tuple[tuple[int, str], ...]]:
    """The pairs of one split, held to the rules of a file of pairs; empty where the split is not there."""
    table = _open_split(source, split)
    problems: list[tuple[int, str]] = []
    numbers: list[int] = []  # of the rows below
    rows: list[Row] = []
    total = 0
    for total, row in enumerate(table, start=1):
        ready = _to_pair_row(row)
        if isinstance(ready, str):
            problems.append((total, ready))
        else:
            numbers.append(total)
            rows.append(ready)
    pairs: tuple[Pair, ...] = ()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")
        try:
            if rows:
                read = read_pairs(path, "skip")
                pairs = read.records
                problems += [(numbers[line - 1], why) for line, why in read.skipped]
        except BadRowsError as error:  # not one row is left
            problems += [(numbers[line - 1], why) for line, why in error.problems]
    problems.sort(key=lambda problem: problem[0])
    if problems and (on_bad_row == "error" or not pairs):
        raise BadRowsError(f"{source} ({split})", problems, total)
    return pairs, tuple(problems)


def _open_split(source: Path, split: str) -> Iterable[Any]:
    if not source.is_dir():
        return _jsonl(source) if split == "train" else ()
    for name in _READ:
        if (source / name.format(split)).is_file():
            return _jsonl(source / name.format(split))
    check_table(source)
    try:
        if (source / "dataset_dict.json").is_file():
            tables = datasets.DatasetDict.load_from_disk(str(source))
            return tables.get(split, ())
        if (source / "state.json").is_file():
            return datasets.Dataset.load_from_disk(str(source)) if split == "train" else ()
    except Exception as error:  # for a damaged directory the library raises whatever its parsers do
        raise DataError(
            f"cannot read the dataset {source} ({type(error).__name__}: {error!s:.200}). Save it again with "
            "save_to_disk, or name a folder with pairs."
        ) from None
    return ()


def _jsonl(path: Path) -> Iterator[Any]:
    """Rows, or in their place the reason why one cannot be read."""
    for _, line in read_lines(path):
        try:
            yield parse_json(line)
        except ValueError as error:
            yield f"not JSON: {why_not_json(error, in_line=True)}"


def _to_pair_row(row: Any) -> Row | str:
    """With its own id and its other keys; `meta` of a table is JSON text."""
    if not isinstance(row, dict):
        return row if isinstance(row, str) and row.startswith("not JSON") else "a row must be a JSON object"
    if isinstance(row.get("meta"), str):
        try:
            row = row | {"meta": parse_json(row["meta"])}
        except ValueError:
            return "meta is text that is not JSON"
    ready = pair_row(row)
    if isinstance(ready, str):
        return ready
    rest = {key: value for key, value in row.items() if key not in ready}
    meta = row.get("meta")
    return {key: ready[key] for key in ("prompt", "chosen", "rejected")} | ({"meta": meta} if meta else {}) | rest


def _table_rows(pairs: Iterable[Pair]) -> Iterator[Row]:
    for pair in pairs:
        row = pair_to_row(pair)
        texts = {key: row[key] for key in ("prompt", "chosen", "rejected")}
        yield texts | {"meta": json.dumps({**row.get("meta", {}), "id": pair.id}, ensure_ascii=False)}
