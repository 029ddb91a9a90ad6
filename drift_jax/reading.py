"""Files that somebody names or that a run has left: opened where they have an end, and JSON that says one thing.

What is broken is an error of the caller's kind that names the file and the remedy; nothing else is ever raised.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import TypeAdapter, ValidationError

from drift_jax.errors import DataError, DriftError

LONG_INTEGER = "a whole number with thousands of digits"
SMALL = 64 << 20  # bytes; more is no config, no index and no report
_SPECIAL = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class HalfPairError(ValueError):
    """A text of a JSON value holds half of a surrogate pair; names the key of the value."""


def split_name(given: str) -> tuple[str | None, Path]:
    """(NAME, PATH) of `[NAME=]PATH`; NAME is None where none is given.

    Folders may be called `lr=1e-5`: what is there as a whole is a path, and so is what has a `/` before its first `=`,
    unless PATH is there (a name may be that of a model of the hub, `org/model`).
    """
    name, separator, path = given.partition("=")
    # os.path says no of a text that cannot be a path; Path.exists would raise.
    if not separator or os.path.exists(given) or ("/" in name and not os.path.exists(path)):
        return None, Path(given)
    return name or None, Path(path)


def open_file(path: str | Path, error: type[DriftError] = DataError) -> BinaryIO:
    """A file opened for reading bytes; files are read more than once, so what is none is refused.

    Raises:
      error: there is no such file, it cannot be read, or it is a directory, a pipe or a device.
    """
    try:
        # Without waiting: a pipe that nobody writes to would keep us for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise error(f"cannot read {path}: there is no such file. Look at the path.") from None
    except (OSError, ValueError) as problem:  # a name with a NUL byte is a ValueError
        why = getattr(problem, "strerror", None) or problem
        raise error(f"cannot read {path}: {why}. Mend the file or its permissions, or name another one.") from None
    kind = _SPECIAL.get(stat.S_IFMT(os.fstat(handle).st_mode))
    if kind is not None:
        os.close(handle)
        raise error(f"cannot read {path}: it is {kind}, a file is needed. Copy what it holds to a file and name that.")
    return os.fdopen(handle, "rb")


def read_bytes(path: str | Path, error: type[DriftError] = DataError, most: int | None = None) -> bytes:
    """All of a file. `most`: bytes; None: any number. Raises `error` as `open_file`, and for a file that is larger."""
    with open_file(path, error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if most is not None and size > most:
                raise error(
                    f"{path} has {size:,} bytes, and at most {most:,} are read: it is not the file that is meant here. "
                    "Look at the path."
                )
            return file.read()
        except OSError as problem:
            raise error(f"cannot read {path}: {problem.strerror or problem}. Copy the file again.") from None


def read_text(
    path: str | Path, error: type[DriftError] = DataError, most: int | None = None, remedy: str = "Save it as UTF-8."
) -> str:
    """All of a file as text. Raises `error` as `read_bytes`, and for what is not UTF-8."""
    data = read_bytes(path, error, most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        at = f"byte {data[problem.start]:#04x} at {problem.start}"
        raise error(f"{path} is not UTF-8: {at}. {remedy}") from None


def read_json(path: str | Path, remedy: str, error: type[DriftError] = DataError, most: int | None = SMALL) -> Any:
    """The JSON value in a file. Raises `error` as `read_text`, and for what `parse_json` refuses."""
    text = read_text(path, error, most, remedy)
    try:
        return parse_json(text)
    except ValueError as problem:
        raise error(f"{path} is not JSON: {why_not_json(problem)}. {remedy}") from None


def parse_json(text: str | bytes, finite: bool = True) -> Any:
    """A JSON value that every reader takes for the same, and every writer can write again.

    Args:
      text: bytes are UTF-8.
      finite: False takes NaN and the infinities as well, which Python writes and JSON does not have.

    Raises:
      ValueError: it is not JSON, a number is none or has no end, an object names a key twice, a text holds half of a
        surrogate pair, or brackets are nested too deeply to be read.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    numbers: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=_once, **numbers)
        if _HALF_PAIR.search(text):
            for name, part in value.items() if isinstance(value, dict) else [("it", value)]:
                _refuse_half_pairs(name, part)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError(LONG_INTEGER) from None
        raise
    return value


def why_not_json(error: ValueError, in_line: bool = False) -> str:
    """What `parse_json` has found and where, in words. `in_line`: the text was one line, whose number is known."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at " + ("" if in_line else f"line {error.lineno}, ") + f"column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8, byte {error.object[error.start]:#04x} at {error.start}"
    return str(error)


def check_form(form: Any, value: Any, where: str, remedy: str, error: type[DriftError] = DataError) -> Any:
    """The value as it is, where it is of the type `form`. Raises `error` naming the first places where it is not."""
    try:
        _adapter(form).validate_python(value, strict=True)
        return value
    except ValidationError as problem:
        errors = problem.errors()
        found = [f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}, found {e['input']!r:.80}" for e in errors[:3]]
        more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
        raise error(f"{where} has another form: {'; '.join(found)}{more}. {remedy}") from None
    except RecursionError:
        raise error(f"{where} has another form: nested too deeply. {remedy}") from None


def read_arrays(path: str | Path, remedy: str, error: type[DriftError] = DataError) -> dict[str, np.ndarray]:
    """The arrays of a file that `np.savez` wrote. Nothing is unpickled, and nothing unpacked: ours are not packed.

    Raises:
      error: as `open_file`, or the file is not whole, or would unpack to more than it holds.
    """
    with open_file(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                if sum(part.file_size for part in archive.infolist()) > size:
                    raise ValueError("it says that it holds more than it has bytes")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except Exception as problem:  # a damaged archive makes zipfile, zlib and numpy raise errors of a dozen kinds
            raise error(f"{path} is damaged: {type(problem).__name__}: {problem!s:.200}. {remedy}") from None


@functools.cache
def _adapter(form: Any) -> Any:
    return TypeAdapter(form)


def _refuse_half_pairs(name: str, value: Any) -> None:
    try:
        (name + json.dumps(value, ensure_ascii=False)).encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise HalfPairError(f"{name!a:.80} holds U+{code:04X}, half of a surrogate pair: no UTF-8 text can") from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is more than a number can be")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.80} is twice in one object")
    return found
