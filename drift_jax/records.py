"""Typed records, and the JSONL files that hold them.

A DSAT record (a logged reply that a user was unhappy with) has no `chosen`: nothing can train on it before a
chosen response is sampled. A pair has both. On disk both have the shape of the published DRIFT data and of
TRL's conversational preference data, so files go to and from TRL unchanged:

    DSAT   {"id", "prompt": [{"role", "content"}, ...], "rejected": [{"role": "assistant", "content"}],
            "user_preference": {"role": "user", "content"}, ...}
    pair   {"prompt": [...], "chosen": [{"role": "assistant", "content"}], "rejected": [...],
            "meta": {...}, ...}
    SAT    {"id", "prompt": [...], "chosen": [{"role": "assistant", "content"}],
            "user_preference": {"role": "user", "content"}, ...}    a logged reply that a user was happy with

Rows are validated while they are read, one line at a time; all rows that break the format are collected and
reported together, each with its line. Files are written under a temporary name, then renamed.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from drift_jax.errors import BadRowsError, DataError
from drift_jax.reading import HalfPairError, open_file, parse_json
from drift_jax.row_problems import PAIR_KEYS, LoggedSide, Row, logged_keys, logged_problems, name_kind, pair_problems

OnBadRow = Literal["error", "skip"]
RecordT = TypeVar("RecordT")

LONGEST_ROW = 64 << 20  # bytes; a row that is longer is no row of a dialogue
LFS_HEADER = b"version https://git-lfs.github.com/spec/v1"


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; `role` is one of `row_problems.ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class DsatRecord:
    """A dialogue that ends with a user turn, the logged reply, and what the user then complained about."""

    id: str
    prompt: tuple[Message, ...]
    rejected: str
    user_preference: str
    extra: Row = field(default_factory=dict)  # the row's other top-level keys (source, licence, ...)


@dataclass(frozen=True)
class SatRecord:
    """A dialogue that ends with a user turn, the logged reply, and what the user then was happy about."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    user_preference: str
    extra: Row = field(default_factory=dict)  # the row's other top-level keys


@dataclass(frozen=True)
class Pair:
    """A dialogue that ends with a user turn, and two replies to it."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    meta: Row = field(default_factory=dict)  # where the chosen response comes from: sampler, token ids, ...
    extra: Row = field(default_factory=dict)  # top-level keys that are not ours, written back as they came


@dataclass(frozen=True)
class Rows(Generic[RecordT]):
    """What was read: the records in the order of the file, and the rows left out as (line, reason)."""

    records: tuple[RecordT, ...]
    skipped: tuple[tuple[int, str], ...] = ()

    @property
    def left_out(self) -> int:
        """How many rows were left out; `skipped` has one of them as often as it breaks the format."""
        return len({line for line, _ in self.skipped})


@dataclass(frozen=True)
class Share(Generic[RecordT]):
    """What one process read of a file: (line, record), and (line, reason) of rows that break the format."""

    records: tuple[tuple[int, RecordT], ...]
    bad: tuple[tuple[int, str], ...]
    total: int  # rows of the whole file


def read_dsat(path: str | Path, on_bad_row: OnBadRow = "error") -> Rows[DsatRecord]:
    """Reads DSAT records.

    A row without `id` is identified by a hash of its content, the same in every run.

    Args:
      path: a JSONL file, UTF-8; blank lines are passed over.
      on_bad_row: `skip` leaves bad rows out and returns them with their reasons.

    Raises:
      BadRowsError: rows break the format (all of them, with lines), or `skip` would leave nothing.
      DataError: the file is missing, empty, unreadable, a git-LFS pointer or a JSON array.
    """
    return _read_logged(Path(path), on_bad_row, DsatRecord, "rejected")


def read_sat(path: str | Path, on_bad_row: OnBadRow = "error") -> Rows[SatRecord]:
    """Reads SAT records. Arguments and errors as in `read_dsat`."""
    return _read_logged(Path(path), on_bad_row, SatRecord, "chosen")


LOGGED_READERS: Mapping[str, Callable[..., Rows[Any]]] = {"dsat": read_dsat, "sat": read_sat}  # by `Method.records`


def read_pairs(path: str | Path, on_bad_row: OnBadRow = "error") -> Rows[Pair]:
    """Reads pairs. Their id is `meta.id`, else a top-level `id`, else a hash of the content.

    Arguments and errors as in `read_dsat`.
    """
    return _read(Path(path), on_bad_row, pair_problems, _pair_from_row)


def read_pair_share(path: str | Path, index: int, count: int) -> Share[Pair]:
    """Every `count`-th row of a file of pairs: share `index` of `count`, which `settle_rows` judges together.

    Raises:
      DataError: as `read_dsat`, less what concerns single rows.
    """
    return _read_share(Path(path), index, count, pair_problems, _pair_from_row)


def count_rows(path: str | Path) -> int:
    """Rows of a JSONL file, sound or not. Raises `DataError` as `read_dsat`, less its rows; an empty file has 0."""
    return sum(1 for _ in read_lines(Path(path)))


def dsat_to_row(record: DsatRecord) -> Row:
    """The row that `read_dsat` reads back as the same record."""
    return _logged_to_row(record, "rejected", record.rejected)


def sat_to_row(record: SatRecord) -> Row:
    """The row that `read_sat` reads back as the same record."""
    return _logged_to_row(record, "chosen", record.chosen)


def pair_to_row(pair: Pair) -> Row:
    """The row that `read_pairs` reads back as the same pair; `meta` gets the id if nothing else holds it."""
    row: Row = {
        "prompt": messages_to_rows(pair.prompt),
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }
    meta = dict(pair.meta)
    if pair.id != _pair_id({**row, **pair.extra, "meta": meta}):
        meta = {**meta, "id": pair.id}
    return {**row, **({"meta": meta} if meta else {}), **pair.extra}


def messages_to_rows(messages: Iterable[Message]) -> list[dict[str, str]]:
    """Messages as the plain dictionaries of JSON files and chat templates."""
    return [{"role": message.role, "content": message.content} for message in messages]


# ---------------------------------------------------------------------------------------------- reading


def _read(
    path: Path,
    on_bad_row: OnBadRow,
    find_problems: Callable[[Row], list[str]],
    from_row: Callable[[Row], Any],
) -> Rows[Any]:
    share = _read_share(path, 0, 1, find_problems, from_row)
    kept, bad = settle_rows(path, on_bad_row, [(line, r.id) for line, r in share.records], share.bad, share.total)
    return Rows(tuple(record for line, record in share.records if line in kept), bad)


def _read_logged(
    path: Path, on_bad_row: OnBadRow, kind: type[DsatRecord] | type[SatRecord], side: LoggedSide
) -> Rows[Any]:
    return _read(path, on_bad_row, partial(logged_problems, side), partial(_logged_from_row, kind, side))


def _read_share(
    path: Path,
    index: int,
    count: int,
    find_problems: Callable[[Row], list[str]],
    from_row: Callable[[Row], Any],
) -> Share[Any]:
    records: list[tuple[int, Any]] = []
    bad: list[tuple[int, str]] = []
    total = 0
    for line, raw in read_lines(path):
        total += 1
        if total % count != index:
            continue
        row, problems = _parse(raw)
        if row is not None:
            problems = find_problems(row)
        if problems or row is None:
            bad += [(line, why) for why in problems]
        else:
            records.append((line, from_row(row)))
    return Share(tuple(records), tuple(bad), total)


def settle_rows(
    path: Path, on_bad_row: OnBadRow, ids: Iterable[tuple[int, str]], bad: Iterable[tuple[int, str]], total: int
) -> tuple[set[int], tuple[tuple[int, str], ...]]:
    """Of all shares of a file: the lines whose records stay, and the rows left out as (line, reason).

    Args:
      ids: (line, id) of the rows that can be read.
      bad: (line, reason) of those that cannot.
      total: rows of the file.

    Raises:
      BadRowsError, DataError: as `read_dsat`.
    """
    line_of_id: dict[str, int] = {}
    problems = list(bad)
    for line, name in sorted(ids):
        first = line_of_id.setdefault(name, line)
        if first != line:
            problems.append((line, f"id {name!r} is already the id of line {first}; ids must be unique"))
    problems.sort(key=lambda problem: problem[0])
    if not total:
        raise DataError(f"{path} is empty: at least one row is needed.")
    if problems and (on_bad_row == "error" or not line_of_id):
        raise BadRowsError(str(path), problems, total)
    return set(line_of_id.values()), tuple(problems)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of every line that is not blank. Raises `DataError` as `read_dsat`, less its rows."""
    if path.is_dir():
        raise DataError(f"{path} is a directory: a JSONL file is needed.")
    if not path.exists() and not path.is_symlink():
        raise DataError(f"{path} does not exist: a JSONL file is needed.")
    try:
        with open_file(path) as file:
            number = 0
            while line := file.readline(LONGEST_ROW):
                number += 1
                if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
                    raise DataError(
                        f"{path}:{number} is longer than {LONGEST_ROW >> 20} MiB: this is no JSONL file. "
                        "One JSON object a line is needed."
                    )
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # some editors put a byte order mark first
                    _refuse_other_files(path, line)
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def _refuse_other_files(path: Path, first_line: bytes) -> None:
    if first_line.startswith(LFS_HEADER):
        raise DataError(
            f"{path} is a git-LFS pointer, not the data: run `git lfs pull` in its repository and try again."
        )
    if first_line.lstrip().startswith(b"["):
        raise DataError(
            f"{path} holds a JSON array: one object a line is needed. Convert it with "
            f"`jq -c '.[]' {path} > {path.with_suffix('.jsonl').name}`."
        )


def _parse(raw: bytes) -> tuple[Row | None, list[str]]:
    try:
        row = parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, [f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}"]
    except json.JSONDecodeError as error:
        return None, [f"not JSON: {error.msg} at column {error.colno}"]
    except HalfPairError as error:
        return None, [str(error)]
    except ValueError as error:
        return None, [f"not JSON: {error}"]
    if not isinstance(row, dict):
        return None, [f"a row must be a JSON object, found {name_kind(row)}"]
    return row, []


# ------------------------------------------------------------------------------------------- conversion


def _logged_from_row(kind: type[DsatRecord] | type[SatRecord], side: LoggedSide, row: Row) -> DsatRecord | SatRecord:
    keys = logged_keys(side)
    return kind(
        str(row["id"]) if "id" in row else _content_id(row, keys),
        _messages(row["prompt"]),
        row[side][0]["content"],
        row["user_preference"]["content"],
        {key: value for key, value in row.items() if key not in ("id", *keys)},
    )


def _logged_to_row(record: DsatRecord | SatRecord, side: LoggedSide, reply: str) -> Row:
    row: Row = {
        "prompt": messages_to_rows(record.prompt),
        side: [{"role": "assistant", "content": reply}],
        "user_preference": {"role": "user", "content": record.user_preference},
    }
    identity = {} if record.id == _content_id(row, logged_keys(side)) else {"id": record.id}
    return {**identity, **row, **record.extra}


def _pair_from_row(row: Row) -> Pair:
    return Pair(
        id=_pair_id(row),
        prompt=_messages(row["prompt"]),
        chosen=row["chosen"][0]["content"],
        rejected=row["rejected"][0]["content"],
        meta=dict(row.get("meta", {})),
        extra={key: value for key, value in row.items() if key not in ("meta", *PAIR_KEYS)},
    )


def _pair_id(row: Row) -> str:
    for holder in (row.get("meta", {}), row):
        if "id" in holder:
            return str(holder["id"])
    return _content_id(row, PAIR_KEYS)


def _messages(rows: list[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(row["role"], row["content"]) for row in rows)


def _content_id(row: Row, keys: tuple[str, ...]) -> str:
    content = json.dumps([row[key] for key in keys], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode("ascii")).hexdigest()[:16]
