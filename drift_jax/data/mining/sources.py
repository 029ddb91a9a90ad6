"""Where logs are read from: files, directories of them, datasets on disk and on the hub. One row at a time.

Every reader holds one row (of Parquet: one batch of rows) in memory. What cannot be read is a `BadRow` in its place:
whether that stops the work is for `BadRows` to say. JSON is read as RFC 8259 has it: no NaN, no half surrogate pairs.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import orjson

from drift_jax.errors import BadRowsError, DataError
from drift_jax.records import LFS_HEADER, Row

OnBadRow = Literal["stop", "skip"]
Advance = Callable[[int], None]  # takes bytes, or rows where a source has no bytes

_LONGEST_ROW = 64 << 20  # bytes; a row that is longer is no row of a chat log
_BUFFER = 1 << 20
_ROWS_A_BATCH = 256
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_CUT_OFF = "the file ends within this row: it was cut off, as by an interrupted download"


class BadRow(NamedTuple):
    """In the place of a row that cannot be read."""

    why: str


Numbered = tuple[int, Row | BadRow]  # the row's number, from 1


@dataclass(frozen=True)
class Source:
    """One file or dataset; the shards of one INPUT share `group`, and conversations go on from one to the next."""

    name: str  # in ids, errors and the data card; unlike any other source's
    location: str  # path or hub id
    kind: Literal["file", "disk", "hub"]
    group: int = 0
    bytes: int | None = None
    subset: str | None = None  # of a hub dataset: its config
    split: str = "train"
    revision: str | None = None


@final
@dataclass
class BadRows:
    """Rows that cannot be used, as they come: counted under `skip`, reported together under `stop`."""

    on_bad_row: OnBadRow
    count: int = 0
    shown: list[dict[str, Any]] = field(default_factory=list)  # the first of them, for stats.json
    _of_source: list[tuple[int, str]] = field(default_factory=list)

    SHOWN = 100

    def add(self, source: str, row: int, why: str) -> None:
        """Raises `BadRowsError` under `stop` when there are too many to list: the file is then another one."""
        self.count += 1
        if len(self.shown) < self.SHOWN:
            self.shown.append({"source": source, "row": row, "why": why})
        if self.on_bad_row == "stop":
            self._of_source.append((row, why))
            if len(self._of_source) > BadRowsError.SHOWN:
                self.settle(source, row)

    def settle(self, source: str, rows: int) -> None:
        """At the end of a source. Raises `BadRowsError` under `stop` if it had any."""
        if self._of_source:
            raise BadRowsError(source, self._of_source, rows)


# --- which sources ------------------------------------------------------------------------------------------------


def find_sources(
    inputs: Sequence[str], subset: str | None = None, split: str = "train", revision: str | None = None
) -> list[Source]:
    """The sources of files, directories and hub ids, in the order given; files of a directory by name.

    Args:
      subset, split, revision: of hub datasets.

    Raises:
      DataError: a path is not there, or a directory holds no file that can be read.
    """
    sources: list[Source] = []
    for group, text in enumerate(inputs):
        path = Path(text)
        if path.is_dir():
            sources += _sources_of_directory(path, group, split)
        elif path.exists():
            sources.append(_file_source(path, path.name, group))
        elif _may_be_hub_id(text):
            sources.append(Source(text, text, "hub", group, None, subset, split, revision))
        else:
            raise DataError(
                f"{text} does not exist, and is no id of a dataset on the Hugging Face hub (OWNER/NAME) either."
            )
    names = [source.name for source in sources]
    return [_with_own_name(source, names) for source in sources]


def _may_be_hub_id(text: str) -> bool:
    owner, slash, name = text.partition("/")
    plain = all(part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in (owner, name))
    return bool(slash) and plain and not name.endswith((*_SUFFIXES, ".gz"))


def _sources_of_directory(path: Path, group: int, split: str) -> list[Source]:
    if (path / "state.json").is_file():
        return [Source(path.name, str(path), "disk", group)]
    if (path / "dataset_dict.json").is_file():
        return [Source(f"{path.name}/{split}", str(path / split), "disk", group)]
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(path)) and _readable(p)]
    if not files:
        raise DataError(f"{path} holds no file to read: one of {', '.join(_SUFFIXES)}, or those with .gz, is needed.")
    return [_file_source(file, file.relative_to(path).as_posix(), group) for file in files]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _readable(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(_SUFFIXES)


def _file_source(path: Path, name: str, group: int) -> Source:
    if not _readable(path):
        raise DataError(f"{path}: files of these kinds can be read: {', '.join(_SUFFIXES)}, and those with .gz.")
    return Source(name, str(path), "file", group, path.stat().st_size)


def _with_own_name(source: Source, names: Sequence[str]) -> Source:
    if names.count(source.name) == 1:
        return source
    return Source(**{**source.__dict__, "name": f"{source.group + 1}/{source.name}"})


# --- reading --------------------------------------------------------------------------------------------------


@final
class SourceReader:
    """The rows of one source. After the last one, `rows` and `sha256` are known."""

    def __init__(self, source: Source, columns: Sequence[str], advance: Advance) -> None:
        """`columns`: what is read of formats that store columns apart; others are not even looked at."""
        self.source = source
        self.rows = 0
        self._columns = columns
        self._advance = advance
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str | None:
        """Of the file's bytes; None for datasets."""
        return self._hash.hexdigest() if self.source.kind == "file" else None

    def __iter__(self) -> Iterator[Numbered]:
        for number, row in self._read():
            self.rows = number
            yield number, row

    def _read(self) -> Iterator[Numbered]:
        location = self.source.location
        try:
            if self.source.kind != "file":
                yield from _dataset_rows(self.source, self._advance)
            elif location.endswith(".parquet"):
                yield from self._read_parquet(Path(location))
            else:
                with open(location, "rb", buffering=0) as raw:
                    yield from self._read_text(io.BufferedReader(_Watched(raw, self._watch), _BUFFER))
        except OSError as error:
            raise DataError(f"cannot read {location}: {error.strerror or error}.") from error

    def _watch(self, data: memoryview) -> None:
        self._hash.update(data)
        self._advance(len(data))

    def _read_text(self, file: io.BufferedReader) -> Iterator[Numbered]:
        name = self.source.location
        stream: Any = file
        if name.endswith(".gz"):
            stream = io.BufferedReader(_Unpacked(gzip.GzipFile(fileobj=file)), _BUFFER)
            name = name.removesuffix(".gz")
        last = 0
        try:
            head = stream.peek(4096)[:4096]
            if head.startswith(LFS_HEADER):
                raise DataError(
                    f"{self.source.location} is a git-LFS pointer, not the data: run `git lfs pull` in its repository "
                    "and try again."
                )
            first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            read = _csv_rows if name.endswith(".csv") else _array_rows if first == b"[" else _jsonl_rows
            for last, row in read(stream):
                yield last, row
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield last + 1, BadRow(f"cannot be unpacked: {error}; the file is cut off or broken from here on")

    def _read_parquet(self, path: Path) -> Iterator[Numbered]:
        import pyarrow
        import pyarrow.parquet

        with path.open("rb") as raw:
            while block := raw.read(_BUFFER):
                self._hash.update(block)
        size = path.stat().st_size
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                total = max(1, file.metadata.num_rows)
                columns = [name for name in file.schema_arrow.names if name in self._columns]
                number = 0
                for batch in file.iter_batches(batch_size=_ROWS_A_BATCH, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
                    self._advance(size * batch.num_rows // total)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not a Parquet file that can be read: {error}.") from None


@final
class _Watched(io.RawIOBase):
    """A file whose bytes are shown to `watch` as they are read."""

    def __init__(self, raw: io.RawIOBase, watch: Callable[[memoryview], None]) -> None:
        self._raw, self._watch = raw, watch

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        self._watch(memoryview(buffer)[:count])
        return count


@final
class _Unpacked(io.RawIOBase):
    """What a packed file holds, handed out as soon as it is unpacked: where the file is cut off, all before is kept."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _jsonl_rows(file: io.BufferedReader) -> Iterator[Numbered]:
    """Rows are numbered by line; blank lines are passed over."""
    loads = orjson.loads
    number = 0
    while line := file.readline(_LONGEST_ROW):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            row: Any = loads(line)
        except ValueError as error:
            if not line.strip():
                continue
            yield number, BadRow(_not_json(error, line, file))
            continue
        yield number, row if type(row) is dict else BadRow(f"a row must be a JSON object, found {_kind(row)}")


def _not_json(error: ValueError, line: bytes, file: io.BufferedReader) -> str:
    if line.endswith(b"\n"):
        return f"not JSON: {error}"
    if len(line) < _LONGEST_ROW:
        return f"not JSON: {error}; {_CUT_OFF}"
    while len(line) == _LONGEST_ROW and not line.endswith(b"\n"):
        line = file.readline(_LONGEST_ROW)
    return f"longer than {_LONGEST_ROW >> 20} MiB"


def _array_rows(file: io.BufferedReader) -> Iterator[Numbered]:
    """The elements of one JSON array. Behind one that is not JSON nothing can be read."""
    scanner = json.JSONDecoder()
    pending = _Pending(file)
    number = 0
    try:
        pending.skip("[")
        while True:
            sign = pending.peek()
            if sign == "]" and number == 0:
                pending.skip("]")
                break
            number += 1
            row = pending.take(scanner)
            yield number, row if type(row) is dict else BadRow(f"a row must be a JSON object, found {_kind(row)}")
            if pending.peek() == "]":
                pending.skip("]")
                break
            pending.skip(",")
        if rest := pending.peek():
            yield number + 1, BadRow(f"not JSON: {rest!r} after the end of the array")
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is one
        yield number + 1 if number == 0 else number, BadRow(f"not JSON: {error}; what follows was not read")


class _Pending:
    """The text of an array that was read and not yet taken; grows by the element that is being looked for."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file, self._text, self._at, self._ended = file, "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def peek(self) -> str:
        """The next sign that is no white space; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._more(_BUFFER):
                return self._text[self._at : self._at + 1]

    def skip(self, sign: str) -> None:
        found = self.peek()
        if found != sign:
            raise ValueError(f"{sign!r} expected, found {found!r}" if found else _CUT_OFF)
        self._at += 1

    def take(self, scanner: json.JSONDecoder) -> Any:
        """The next element; the scanner finds its end, and orjson says whether it is JSON."""
        self.peek()
        step = _BUFFER
        while True:
            try:
                _, end = scanner.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more(step):  # digits may go on behind the buffer
                    element, self._at = self._text[self._at : end], end
                    return orjson.loads(element.encode("utf-8"))
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > _LONGEST_ROW:
                    raise ValueError(f"{error.msg}, or an element longer than {_LONGEST_ROW >> 20} MiB") from None
                if not self._more(step):
                    raise ValueError(f"{error.msg}; {_CUT_OFF}" if self._at_end(error) else error.msg) from None
            step *= 2

    def _at_end(self, error: json.JSONDecodeError) -> bool:
        return error.pos >= len(self._text) - 1 or error.msg.startswith("Unterminated")

    def _more(self, size: int) -> bool:
        data = b"" if self._ended else self._file.read1(size)
        self._text, self._at = self._text[self._at :] + self._decoder.decode(data, final=not data), 0
        self._ended = not data
        return not self._ended


def _csv_rows(file: io.BufferedReader) -> Iterator[Numbered]:
    """Rows are numbered without the header. Empty cells are None; cells of lists and objects hold JSON."""
    csv.field_size_limit(_LONGEST_ROW)
    rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)  # pyright: ignore
    number = 0
    try:
        header = next(rows, None)
        if header is None:
            return
        for cells in rows:
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                yield number, BadRow(f"{len(cells)} cells where the header has {len(header)}")
            else:
                yield number, {name: _cell(cell) for name, cell in zip(header, cells, strict=True)}
    except (csv.Error, UnicodeDecodeError) as error:
        cut = f"; {_CUT_OFF}" if "unexpected end" in str(error) else "; what follows was not read"
        yield number + 1, BadRow(f"not CSV: {error}{cut}")


def _cell(cell: str) -> Any:
    if not cell:
        return None
    if cell[0] in "[{":
        try:
            return orjson.loads(cell)
        except ValueError:
            return cell  # text that begins with a bracket
    return cell


def _dataset_rows(source: Source, advance: Advance) -> Iterator[Numbered]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if source.kind == "disk":
            table: Any = datasets.load_from_disk(source.location)
        else:
            table = datasets.load_dataset(
                source.location, source.subset, split=source.split, revision=source.revision, streaming=True
            )
        for number, row in enumerate(table, start=1):
            yield number, row
            advance(1)
    except (DatasetsError, ValueError, OSError) as error:
        raise DataError(
            f"cannot read the dataset {source.location} (config {source.subset or 'default'}, split {source.split}): "
            f"{error}\nCheck name, config, split and network (`hf auth login` for gated data), or download it and name "
            "its directory."
        ) from None


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
