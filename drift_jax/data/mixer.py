"""The pairs that an alignment-handbook file names -> pairs.train.jsonl and pairs.test.jsonl.

A dataset is a hub id, a directory that `datasets.load_dataset` reads, one that `save_to_disk` wrote, or one with
files of ours: split `train` is then `pairs.train.jsonl` or `train.jsonl`. Shares are taken, parts joined and rows
shuffled by the `datasets` library itself, so the rows stand in the order in which the handbook handed them to TRL;
training shuffles them once more, in each epoch.

A row holds `prompt`, `chosen` and `rejected` as lists of messages, or `chosen` and `rejected` as whole dialogues that
differ in the last message; `prompt` is then absent, or text that is not read. Of other columns only `meta` is kept.

Where this departs from the handbook:
 1. Rows that match HumanEval stay (`decontaminate_humaneval`): finding them needs a dataset from the hub.
 2. Of a dataset with several train splits every one gives its share. There, shares are matched with splits by
    position, which goes wrong, and splits at the end may be left out.
 3. Whole dialogues that differ before the last message are bad rows. There, the rejected reply silently moves to the
    dialogue of the chosen one.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.exceptions import DatasetsError

from drift_jax.data.tables import check_table
from drift_jax.errors import BadRowsError, DataError
from drift_jax.files import atomic_writer, write_json, write_jsonl
from drift_jax.handbook import DatasetMixture, DatasetPart
from drift_jax.reading import HalfPairError, parse_json
from drift_jax.records import OnBadRow, Pair, Row, pair_to_row, read_lines, read_pairs


class _Place(NamedTuple):
    """Where a row of the mixture comes from."""

    part: DatasetPart
    row: int  # from 0


_Table = datasets.Dataset | list[Row]
_Tables = dict[DatasetPart, _Table]


def load_mixture(mixture: DatasetMixture, out_dir: Path, on_bad_row: OnBadRow = "error") -> Path:
    """Mixes the parts and writes pairs.train.jsonl, pairs.test.jsonl and mixture.json (what was read, what left out).

    The same mixture of the same data gives the same bytes. `meta.id` of a pair is dataset, split and row; an id that
    the row had is in `meta.source_id`. Files of an earlier mixture in `out_dir` are replaced; without held-out rows
    there is no pairs.test.jsonl.

    Args:
      on_bad_row: `skip` leaves bad rows out, after the shuffle, and counts them with their reasons.

    Returns:
      `out_dir`.

    Raises:
      DataError: the mixture names no pairs, or a dataset, split or column is not there, or rows cannot be used.
      StageError: the files cannot be written.
    """
    if not mixture.train:
        raise DataError(
            "the file names no pairs. Give it dataset_mixer (or dataset_mixture), or name a directory with pairs."
        )
    tables = {part: _open_table(part) for part in (*mixture.train, *mixture.test)}
    splits = dict(zip(("train", "test"), _mix(mixture, tables), strict=True))
    if not splits["train"]:
        raise DataError("the shares of the mixture leave no row to train on. Raise them, or give larger datasets.")
    # The rows are written once to be read as pairs: where they will lie, which is where there is room for them.
    scratch = next(folder for folder in (out_dir, *out_dir.absolute().parents) if folder.is_dir())
    ready = {split: _read_rows(places, tables, on_bad_row, scratch) for split, places in splits.items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    for split, rows in ready.items():
        path = out_dir / f"pairs.{split}.jsonl"
        if rows.pairs:
            write_jsonl(path, map(pair_to_row, rows.pairs))
        else:
            path.unlink(missing_ok=True)
    summary = {split: {"pairs": len(rows.pairs), "left_out": rows.left_out} for split, rows in ready.items()}
    parts = [dataclasses.asdict(part) | {"rows": len(table)} for part, table in tables.items()]
    write_json(out_dir / "mixture.json", {"parts": parts, **summary})
    return out_dir


# ------------------------------------------------------------------------------------- which rows, in what order


def _mix(mixture: DatasetMixture, tables: _Tables) -> tuple[list[_Place], list[_Place]]:
    """Train and test rows. `datasets` gets positions alone: how it shuffles depends on nothing but their number."""
    parts = list(tables)
    number = {part: i for i, part in enumerate(parts)}

    def join(chosen: Iterable[DatasetPart]) -> datasets.Dataset:
        joined = datasets.concatenate_datasets([_positions(number[p], p, tables[p], mixture) for p in chosen])
        return joined if mixture.seed is None else joined.shuffle(seed=mixture.seed)

    def places(rows: datasets.Dataset) -> list[_Place]:
        return [_Place(parts[part], row) for part, row in zip(rows["part"], rows["row"], strict=True)]

    train = join(mixture.train)
    if mixture.test_size is not None:
        try:
            cut = train.train_test_split(test_size=mixture.test_size, seed=mixture.seed)
        except ValueError as error:
            raise DataError(
                f"cannot hold out test_split_size {mixture.test_size} of {len(train)} rows: {error}"
            ) from None
        return places(cut["train"]), places(cut["test"])
    return places(train), places(join(mixture.test)) if mixture.test else []


def _positions(number: int, part: DatasetPart, table: _Table, mixture: DatasetMixture) -> datasets.Dataset:
    count = len(table)
    rows = datasets.Dataset.from_dict({"part": [number] * count, "row": list(range(count))})
    if part.share is None:
        return rows
    if mixture.shuffle_parts:
        rows = rows.shuffle(seed=mixture.seed)
    return rows.select(range(int(part.share * count)))


# --------------------------------------------------------------------------------------------- rows to pairs


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class _Pairs(NamedTuple):
    pairs: tuple[Pair, ...]
    left_out: dict[str, int]  # reason -> rows


def _read_rows(places: list[_Place], tables: _Tables, on_bad_row: OnBadRow, scratch: Path) -> _Pairs:
    """The rows as pairs, held to the same rules as a file of pairs by being read as one."""
    if not places:
        return _Pairs((), {})
    kept: list[_Place] = []
    problems: list[tuple[_Place, str]] = []
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".mixture.") as directory:
        path = Path(directory) / "rows.jsonl"
        with atomic_writer(path) as file:
            for place, row in _pair_rows(places, tables):
                if isinstance(row, str):
                    problems.append((place, row))
                else:
                    kept.append(place)
                    file.write(json.dumps(row, default=str) + "\n")
        pairs: tuple[Pair, ...] = ()
        if kept:
            try:
                rows = read_pairs(path, "skip")
                pairs, bad = rows.records, rows.skipped
            except BadRowsError as error:  # not one row is left
                bad = error.problems
            problems += [(kept[line - 1], why) for line, why in bad]
    if problems and (on_bad_row == "error" or not pairs):
        raise DataError(_report(problems, len(places)))
    return _Pairs(pairs, dict(Counter(why for _, why in problems)))


def _report(problems: list[tuple[_Place, str]], total: int) -> str:
    problems = sorted(problems, key=lambda problem: (_name(problem[0].part), problem[0].row))
    shown = [f"  {_name(place.part)}, row {place.row}: {why}" for place, why in problems[: BadRowsError.SHOWN]]
    if len(problems) > len(shown):
        shown.append(f"  ... and {len(problems) - len(shown)} more")
    return (
        f"{len({place for place, _ in problems})} of {total} rows cannot be used (rows count from 0):\n"
        + "\n".join(shown)
        + "\nMend these rows, or pass --on-bad-row skip to go on without them (they are counted)."
    )


def _pair_rows(places: list[_Place], tables: _Tables) -> Iterator[tuple[_Place, Row | str]]:
    """Rows in the format of pairs, or why a row has none."""
    seen: Counter[str] = Counter()
    for place in places:
        row = pair_row(tables[place.part][place.row])
        if not isinstance(row, str):
            identity = f"{_name(place.part)}:{place.row}"
            seen[identity] += 1  # a mixture may hold the same rows twice
            row["meta"]["id"] = identity if seen[identity] == 1 else f"{identity}#{seen[identity]}"
        yield place, row


def pair_row(row: Row) -> Row | str:
    """A row of somebody's preference data in the format of pairs, or why it has none; its id is `meta.source_id`."""
    missing = [key for key in ("chosen", "rejected") if row.get(key) is None]
    if missing:
        return f"missing {' and '.join(missing)}; found {', '.join(row) or 'nothing'}"
    if isinstance(row.get("conversations"), list) and isinstance(row["chosen"], dict):
        row = _from_sharegpt(row)
    prompt, chosen, rejected = (_messages(row.get(key)) for key in ("prompt", "chosen", "rejected"))
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return "chosen and rejected must be lists of messages"
    if not isinstance(prompt, list):
        prompt, chosen, other, rejected = chosen[:-1], chosen[-1:], rejected[:-1], rejected[-1:]
        if prompt != other:
            return "chosen and rejected must be one dialogue up to their last message, and differ before it"
    meta = dict(row["meta"]) if isinstance(row.get("meta"), dict) else {}
    source = meta.get("id", row.get("id"))
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "meta": meta | ({} if source is None else {"source_id": source}),
    }


def _from_sharegpt(row: Row) -> Row:
    """Turns of `from` and `value`, as WildFeedback's pairs and LLaMA-Factory have them, as messages."""

    def message(turn: Any, role: str | None = None) -> Any:
        if not isinstance(turn, dict) or "value" not in turn:
            return turn
        name = turn.get("from") or role
        return {"role": _SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name, "content": turn["value"]}

    system = row.get("system")
    opening = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    sides = {side: [message(row[side], "gpt")] for side in ("chosen", "rejected") if isinstance(row[side], dict)}
    return row | {"prompt": [*opening, *map(message, row["conversations"])]} | sides


def _messages(value: Any) -> Any:
    """Without the nulls that `datasets` puts where a message lacks a key that another one has."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item for item in value]


# ------------------------------------------------------------------------------------------------- sources


def _open_table(part: DatasetPart) -> _Table:
    try:
        table = _load(part)
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        reason = str(error.args[0] if isinstance(error, KeyError) else error).rstrip(".")
        raise DataError(f"cannot read {_name(part)}: {reason}. {_remedy(part)}") from None
    columns = (
        table.column_names if isinstance(table, datasets.Dataset) else sorted({key for row in table for key in row})
    )
    missing = [key for key in part.columns or ("chosen", "rejected") if key not in columns]
    if missing and len(table):
        raise DataError(f"{_name(part)} has no column {' and '.join(missing)}; it has {', '.join(columns)}.")
    if part.columns is None:
        return table
    if isinstance(table, datasets.Dataset):
        return table.select_columns(list(part.columns))
    return [{key: row[key] for key in part.columns if key in row} for row in table]


def _load(part: DatasetPart) -> _Table:
    directory = Path(part.name)
    for name in (f"pairs.{part.split}.jsonl", f"{part.split}.jsonl"):
        if (directory / name).is_file():
            return _read_jsonl(directory / name)
    check_table(directory)
    if (directory / "dataset_dict.json").is_file():
        return datasets.DatasetDict.load_from_disk(str(directory))[part.split]
    check_table(directory / part.split)
    if (directory / part.split / "state.json").is_file():
        return datasets.Dataset.load_from_disk(str(directory / part.split))
    return datasets.load_dataset(part.name, part.config, split=part.split)


def _read_jsonl(path: Path) -> list[Row]:
    """The rows as they are; what a pair needs is checked for the rows that are taken."""
    rows, problems = [], []
    for number, line in read_lines(path):
        try:
            row = parse_json(line)
        except HalfPairError:  # for the check of rows, which may be told to skip it
            row = json.loads(line)
        except ValueError as error:
            row = error
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.append(f"  {path}:{number}: not a JSON object: {str(row)[:80]}")
    if problems:
        raise DataError(f"{len(problems)} lines of {path} are no rows:\n" + "\n".join(problems[: BadRowsError.SHOWN]))
    return rows


def _name(part: DatasetPart) -> str:
    return ":".join(filter(None, (part.name, part.config, part.split)))


def _remedy(part: DatasetPart) -> str:
    directory = Path(part.name)
    if directory.is_dir():
        held = ", ".join(sorted(path.name for path in directory.iterdir())[:20]) or "nothing"
        return f"The directory holds {held}; a split needs pairs.{part.split}.jsonl, {part.split}.jsonl or a dataset."
    return (
        f"There is no directory {part.name}, so it was looked for on the Hugging Face hub: check name, split and "
        "network (`hf auth login` for gated data), or download it and name its directory."
    )
