"""Files that are there whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from drift_jax.errors import StageError

# What a disk answers, rather than a program that asks for the wrong thing.
STORAGE_ERRORS = frozenset(
    {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT}
)


@contextlib.contextmanager
def atomic_writer(path: str | Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """A file that appears under `path` complete or not at all; text mode is UTF-8 with LF line ends.

    The temporary file lies in the same directory and is removed when the block raises.

    Raises:
      StageError: the operating system refuses (full disk, missing directory, ...); names path and reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        _remove(temporary)
        raise StageError(
            f"cannot write {path}: {error.strerror or error}. Nothing was left half-written; "
            "free space or mend the path, then run again."
        ) from error
    except BaseException:
        _remove(temporary)
        raise


def is_address(path: str | Path) -> bool:
    """Whether it is no path of this machine, such as gs://bucket/run; of a `Path` it is left as gs:/bucket/run."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", str(path)) is not None


def check_checkpoint_place(directory: Path) -> None:
    """Raises `StageError` for a directory whose path Orbax would take for a pattern: it finds no file there again.

    So too for an address such as gs://bucket/run, which as a path is a directory `gs:` here.
    """
    if is_address(directory):
        raise StageError(
            f"checkpoints cannot be kept in {directory}: that is an address. Mount the bucket and give the mounted "
            "path with --run-dir or --out."
        )
    if set("*?[]") & set(str(directory.absolute())):
        raise StageError(
            f"checkpoints cannot be kept in {directory}: a path with one of * ? [ ] is a pattern to Orbax. Give "
            "another directory with --run-dir or --out."
        )


def refuse_file_in_path(directory: Path) -> None:
    """Raises `StageError` where a directory cannot be, or be made, as a part of its path is something else."""
    for place in (directory, *directory.parents):
        if place.is_dir():
            return
        if os.path.lexists(place):
            what = "a file" if place.is_file() else "no directory"
            raise StageError(f"there can be no directory {directory}: {place} is {what}. Give another path.")


def leaves(path: Path, directory: Path) -> bool:
    """Whether a path, all links followed, is outside of the directory that is to hold it.

    In a cache of the Hugging Face hub a directory `snapshots/REVISION` is made of links into the `blobs` beside it.
    """
    root, end = directory.resolve(), path.resolve()
    places = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return not any(end.is_relative_to(place) for place in places)


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically. Raises `StageError` as `atomic_writer` does."""
    with atomic_writer(path) as file:
        for row in rows:
            file.write(_to_json(path, row) + "\n")


def write_json(path: str | Path, value: Any) -> None:
    """Writes one JSON value, indented, atomically. Raises `StageError` as `atomic_writer` does."""
    with atomic_writer(path) as file:
        file.write(_to_json(path, value, indent=2) + "\n")


def _to_json(path: str | Path, value: Any, indent: int | None = None) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
        text.encode("utf-8")
    except ValueError as error:  # NaN, infinity, a lone surrogate: other readers would refuse the file
        raise StageError(f"cannot write {path}: JSON cannot hold this value: {error}") from error
    return text


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def remove_leftovers(directory: Path) -> None:
    """Removes temporary files of writers that were killed; for a process that is alone in `directory`."""
    for path in directory.glob(".*.tmp"):
        if path.suffixes[-2:-1] and path.suffixes[-2][1:].isdigit():
            _remove(path)


def sync_directory(path: Path) -> None:
    """Makes names in a directory survive a power cut; some file systems do not offer it, which is no error."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
