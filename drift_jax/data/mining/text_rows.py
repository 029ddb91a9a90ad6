"""Rows of JSONL, JSON arrays and CSV, one at a time; what is broken is a `BadRow` in its place.

JSON is read as RFC 8259 has it: no NaN, no half surrogate pairs.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, final

import orjson

from drift_jax.reading import parse_json
from drift_jax.records import LONGEST_ROW, Row

BUFFER = 1 << 20
_LONG = BUFFER // 2  # bytes of a row; orjson sets twelve times as many aside before it looks at them
_CUT_OFF = "the file ends within this row: it was cut off, as by an interrupted download"


class BadRow(NamedTuple):
    """In the place of a row that cannot be read."""

    why: str


Numbered = tuple[int, Row | BadRow]  # the row's number, from 1
HOLDS = "; the row holds "  # in what is said of a row that lacks what its format is known by


def name_keys(row: Row) -> str:
    """The end of a message on a field that is not there: the row may be of another format."""
    return HOLDS + (", ".join(row)[:200] or "nothing")


@final
class Unpacked(io.RawIOBase):
    """What a packed file holds, handed out as soon as it is unpacked: where the file is cut off, all before is kept."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def jsonl_rows(file: io.BufferedReader) -> Iterator[Numbered]:
    """Rows are numbered by line; blank lines are passed over."""
    number = 0
    while line := file.readline(LONGEST_ROW):
        number += 1
        loads: Callable[[bytes], Any] = orjson.loads if len(line) < _LONG else parse_json
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
    if len(line) < LONGEST_ROW:
        return f"not JSON: {error}; {_CUT_OFF}"
    while len(line) == LONGEST_ROW and not line.endswith(b"\n"):
        line = file.readline(LONGEST_ROW)
    return f"longer than {LONGEST_ROW >> 20} MiB"


def array_rows(file: io.BufferedReader) -> Iterator[Numbered]:
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


@final
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
            if self._at < len(self._text) or not self._more(BUFFER):
                return self._text[self._at : self._at + 1]

    def skip(self, sign: str) -> None:
        found = self.peek()
        if found != sign:
            raise ValueError(f"{sign!r} expected, found {found!r}" if found else _CUT_OFF)
        self._at += 1

    def take(self, scanner: json.JSONDecoder) -> Any:
        """The next element; the scanner finds its end, and orjson says whether it is JSON."""
        self.peek()
        step = BUFFER
        while True:
            try:
                _, end = scanner.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more(step):  # digits may go on behind the buffer
                    break
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > LONGEST_ROW:
                    raise ValueError(f"{error.msg}, or an element longer than {LONGEST_ROW >> 20} MiB") from None
                if not self._more(step):
                    raise ValueError(f"{error.msg}; {_CUT_OFF}" if self._at_end(error) else error.msg) from None
            step *= 2
        element, self._at = self._text[self._at : end], end
        loads: Callable[[bytes], Any] = orjson.loads if len(element) < _LONG else parse_json
        return loads(element.encode("utf-8", "surrogatepass"))

    def _at_end(self, error: json.JSONDecodeError) -> bool:
        return error.pos >= len(self._text) - 1 or error.msg.startswith("Unterminated")

    def _more(self, size: int) -> bool:
        data = b"" if self._ended else self._file.read1(size)
        self._text, self._at = self._text[self._at :] + self._decoder.decode(data, final=not data), 0
        self._ended = not data
        return not self._ended


def csv_rows(file: io.BufferedReader) -> Iterator[Numbered]:
    """Rows are numbered without the header. Empty cells are None, all others text: see `unpack_cell`."""
    csv.field_size_limit(LONGEST_ROW)
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
                yield number, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except (csv.Error, UnicodeDecodeError) as error:
        cut = f"; {_CUT_OFF}" if "unexpected end" in str(error) else "; what follows was not read"
        yield number + 1, BadRow(f"not CSV: {error}{cut}")


def unpack_cell(value: Any) -> Any:
    """The list or object that text holds as JSON, as a cell of CSV does; anything else as it is.

    For whoever needs a list or an object: a message may well begin with a bracket.
    """
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return orjson.loads(value)
        except ValueError:
            return value
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
