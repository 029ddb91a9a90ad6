"""Where logs are read from: files, directories of them, datasets on disk and on the hub. One row at a time.

Every reader holds one row (of Parquet: one batch of rows) in memory. What cannot be read is a `BadRow` in its place:
whether that stops the work is for `BadRows` to say. JSON is read as RFC 8259 has it: no NaN, no half surrogate pairs.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, final

from drift_jax.data.mining import text_rows
from drift_jax.data.mining.text_rows import HOLDS, BadRow, Numbered
from drift_jax.data.tables import check_table
from drift_jax.errors import BadRowsError, DataError, DriftError
from drift_jax.reading import open_file
from drift_jax.records import LFS_HEADER

OnBadRow = Literal["stop", "skip"]
Advance = Callable[[int], None]  # takes bytes, or rows where a source has no bytes

_ROWS_A_BATCH = 256
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


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
    log_format: str = ""
    locations: Mapping[str, str] = field(default_factory=dict)  # of sources by their names, for errors
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
                self._refuse(self.locations.get(source, source), row, whole=False)

    def settle(self, source: str, rows: int) -> None:
        """At the end of a source. Raises `BadRowsError` under `stop` if it had any."""
        if self._of_source:
            self._refuse(source, rows, whole=True)

    def _refuse(self, source: str, rows: int, whole: bool) -> NoReturn:
        foreign = len(self._of_source) == rows and all(HOLDS in why for _, why in self._of_source)
        hint = f"No row has the fields of --format {self.log_format}: is that the right one?" if foreign else ""
        raise BadRowsError(source, self._of_source, rows, whole, hint)


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
        elif path.exists() or path.is_symlink():
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
    with open_file(path) as file:  # a pipe or a device has no end, and no hash
        return Source(name, str(path), "file", group, os.fstat(file.fileno()).st_size)


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
                    yield from self._read_text(io.BufferedReader(_Watched(raw, self._watch), text_rows.BUFFER))
        except OSError as error:
            raise DataError(f"cannot read {location}: {error.strerror or error}.") from error

    def _watch(self, data: memoryview) -> None:
        self._hash.update(data)
        self._advance(len(data))

    def _read_text(self, file: io.BufferedReader) -> Iterator[Numbered]:
        name = self.source.location
        stream: Any = file
        if name.endswith(".gz"):
            stream = io.BufferedReader(text_rows.Unpacked(gzip.GzipFile(fileobj=file)), text_rows.BUFFER)
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
            read = (
                text_rows.csv_rows
                if name.endswith(".csv")
                else text_rows.array_rows
                if first == b"["
                else text_rows.jsonl_rows
            )
            for last, row in read(stream):
                yield last, row
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield last + 1, BadRow(f"cannot be unpacked: {error}; the file is cut off or broken from here on")

    def _read_parquet(self, path: Path) -> Iterator[Numbered]:
        import pyarrow
        import pyarrow.parquet

        with path.open("rb") as raw:
            while block := raw.read(text_rows.BUFFER):
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
        # Of a damaged file also: text that is no UTF-8, and dates that Python has none for.
        except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
            why = " ".join(str(error).split())
            raise DataError(
                f"{path} is not a Parquet file that can be read: {why:.300}. Download it again: it is cut off."
            ) from None


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


def _dataset_rows(source: Source, advance: Advance) -> Iterator[Numbered]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if source.kind == "disk":
            check_table(Path(source.location))
            table: Any = datasets.load_from_disk(source.location)
        else:
            table = datasets.load_dataset(
                source.location, source.subset, split=source.split, revision=source.revision, streaming=True
            )
        for number, row in enumerate(table, start=1):
            yield number, row
            advance(1)
    except DriftError:
        raise
    except Exception as error:  # for a damaged directory the library raises whatever its parsers do
        if not isinstance(error, DatasetsError | ValueError | OSError | KeyError | TypeError | AttributeError):
            raise
        raise DataError(
            f"cannot read the dataset {source.location} (config {source.subset or 'default'}, split {source.split}): "
            f"{error}\nCheck name, config, split and network (`hf auth login` for gated data), or download it and name "
            "its directory."
        ) from None
