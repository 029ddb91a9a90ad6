"""JSONL files that rows are appended to while work goes on, so that what was done survives a crash."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

from drift_jax.errors import DataError, StageError
from drift_jax.files import sync_directory
from drift_jax.reading import check_form, parse_json, read_bytes, why_not_json
from drift_jax.stopping import held


def read_rows(path: Path, torn: bool = False, form: Any = dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a file that this package wrote.

    Args:
      torn: whether the last line may be unfinished (the writer was killed), and is then passed over.
      form: the type of a row, such as a TypedDict of the keys that are going to be read.

    Raises:
      DataError: the file cannot be read, or a line is not JSON or of another form; names it.
    """
    data = read_bytes(path)
    if torn:
        data = data[: data.rfind(b"\n") + 1]  # of the bytes: a kill may leave half of a character
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line:
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{path}:{number} is not JSON ({why_not_json(error, in_line=True)}). Remove the file to make it again."
            ) from None
        rows.append(check_form(form, row, f"{path}:{number}", "Remove the file to make it again."))
    return rows


@final
class Journal:
    """Rows on disk, one line each, by one process at a time.

    A torn last line (the process was killed while writing) is cut off on opening.

    Args:
      form: of a row, as in `read_rows`.

    Raises:
      StageError: another process writes it, or it is no file.
      DataError: a line is not JSON or of another form. The file is left as it is.
    """

    def __init__(self, path: Path, form: Any = dict[str, Any]) -> None:
        self.path = path
        self._file = _open_locked(path)
        try:
            data = path.read_bytes()
            self._size = data.rfind(b"\n") + 1
            self.rows = read_rows(path, torn=True, form=form)
            self._file.truncate(self._size)
        except BaseException:
            self._file.close()
            raise
        sync_directory(path.parent)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rows and waits for the disk to have them, so that a power cut loses none.

        Raises:
          StageError: the disk is full, or a row holds what JSON cannot. What was appended before stays, and nothing of
            these rows does.
        """
        # One write without a buffer: what a kill tears is the end of the file, and closing has nothing left to write.
        try:
            lines = [json.dumps(row, ensure_ascii=False, allow_nan=False).encode() for row in rows]
        except ValueError as error:  # a line that nobody can read again would cost all others
            raise StageError(
                f"cannot write {self.path}: a row holds what JSON cannot ({error}). Mend the model or the server that "
                "gave it and run again; it goes on from here."
            ) from None
        data = b"".join(line + b"\n" for line in lines)
        try:
            with held():  # a request to stop waits for the end of the line
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:]) or 0
                os.fsync(self._file.fileno())
                self._size += len(data)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise StageError(
                f"cannot write {self.path}: {error}. Free space and run again; it goes on from here."
            ) from None

    def close(self) -> None:
        """Lets go of the file; one in which nothing was ever written does not stay."""
        if self._file.closed:
            return
        mine = os.fstat(self._file.fileno())
        if not mine.st_size and self.path.exists() and os.path.samestat(mine, self.path.stat()):
            self.path.unlink()
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_locked(path: Path) -> io.FileIO:
    """The file opened for appending. The system lets go of the lock however the process ends."""
    while True:
        if path.exists() and not path.is_file():
            raise StageError(f"{path} is a directory, a pipe or a device, and rows go into a file. Name another.")
        try:
            file = io.FileIO(path, "a")
        except OSError as error:
            raise StageError(f"cannot write {path}: {error.strerror or error}. Give another path.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise StageError(
                f"{path} is being written by another process. Wait for it, or give another directory."
            ) from None
        except OSError:
            pass  # a file system without locks
        # Its last owner may have removed it between the two calls; that file is nobody's any more.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
