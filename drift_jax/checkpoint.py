"""Orbax checkpoints of a training stage: parameters, optimizer state, step, data position and config.

Saving is asynchronous; a checkpoint is restored onto whatever mesh the new run has. It gets its name when all of it is
on the disk, `checksums.json` included, so one that was not finished is never read; and one whose bytes have changed
since is found out (`newest_whole`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, final

import orbax.checkpoint as ocp
import xxhash
from typing_extensions import TypedDict

from drift_jax.distributed import is_lost_peer, on_main
from drift_jax.errors import DataError, StageError
from drift_jax.files import sync_directory, write_json
from drift_jax.reading import check_form, read_json

CHECKSUMS_FILE = "checksums.json"
_META = "meta"
_REASON = 160  # characters of an error's beginning, and of its end
_READERS = 4  # files that are hashed at the same time
_PIECE_BYTES = 1 << 22


@final
class Checkpointer:
    """Keeps the newest `keep` checkpoints of one stage under `directory`. Of several processes all make one.

    Args:
      alone: whether no other run can be at work there; then what a run left that was killed while saving is removed.
    """

    def __init__(self, directory: Path, keep: int, alone: bool = False) -> None:
        _quieten_orbax()
        self.directory, self._alone = directory.absolute(), alone
        self._saving = 0  # the step that is being written
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=alone,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the writer may be broken as well; the first error is the one to see.
        if kind is None:
            self.wait()
        if kind is not KeyboardInterrupt:  # that one waits for nothing
            self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def newest_whole(self, tell: Callable[[str], None]) -> int | None:
        """The newest step whose files are as they were written. All processes must call it.

        Args:
          tell: takes a line for each that is damaged. With `alone` it is put aside, as its step will come again.

        Returns:
          None when there is none.
        """
        for step in on_main(lambda: sorted(self._manager.all_steps(), reverse=True)):
            path = self.directory / str(step)
            problem = on_main(lambda path=path: find_damage(path))
            if problem is None:
                return step
            said = f"the checkpoint of update {step} is damaged ({problem})"
            if self._alone:
                said += f": it is put aside as {path.name}.damaged"
                on_main(lambda path=path: _put_aside(path))
                self._manager.reload()
            tell(said)
        return None

    def save(self, step: int, items: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts writing and returns; `wait` tells how it went.

        Args:
          step: updates done.
          items: pytrees of arrays by name, each of which can be restored alone.
          meta: JSON values; the data position and the config that the state was made with.

        Raises:
          StageError: an earlier or this save failed (full disk).
        """
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}  # type: ignore[call-arg]
        args[_META] = ocp.args.JsonSave(meta)  # type: ignore[call-arg]
        with self._refusals():
            self._manager.wait_until_finished()  # `_seal` is of one save
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**args))

    def wait(self) -> None:
        """Returns when everything is on disk. Raises `StageError` when it is not."""
        with self._refusals():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        sync_directory(self.directory)

    def read_meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(**{_META: ocp.args.JsonRestore()}))[_META]  # type: ignore[call-arg]

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Reads the named items onto the shardings of their pytrees of `jax.ShapeDtypeStruct`.

        Raises:
          StageError: the checkpoint does not have this structure or these shapes.
        """
        try:
            args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}  # type: ignore[call-arg]
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            return {name: restored[name] for name in abstract}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StageError(
                f"the checkpoint {self.directory}/{step} does not fit this model and optimizer: {_reason(error)}. "
                "Use the config it was made with, or remove the directory to start the stage again."
            ) from error

    def _seal(self) -> None:
        """Called by Orbax, in the thread that saves, when all processes have written and the name is not given yet."""
        made = [path for path in self.directory.glob(f"{self._saving}.*tmp*") if path.is_dir()]
        seal(made[0] if made else self.directory / str(self._saving))

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What keeps a checkpoint from being written, as a `StageError`; that another process is gone, as it is."""
        try:
            yield
        except Exception as error:
            if is_lost_peer(error):
                raise
            last = self._manager.latest_step()
            kept = "No earlier one is there" if last is None else f"The last whole one is of update {last}"
            raise StageError(
                f"cannot write a checkpoint to {self.directory}: {_reason(error)}. {kept}. Free space and run again; "
                "the stage goes on from what is there."
            ) from error


@final
class SaveClock:
    """Says when a checkpoint is due by the time that has passed since the last one: process 0's, for all of them.

    Args:
      minutes: None: never.
      step: updates done.
    """

    def __init__(self, minutes: float | None, step: int) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self.saved(step)

    def saved(self, step: int) -> None:
        """To be called at each save, whatever it is for."""
        self._step, self._start, self._look = step, time.monotonic(), step + 1

    def is_due(self, step: int) -> bool:
        """To be called after each update. Asking process 0 makes the devices wait, so that is done seldom."""
        if self._seconds is None or step < self._look:
            return False
        passed, updates = on_main(lambda: time.monotonic() - self._start), step - self._step
        if passed >= self._seconds:
            return True
        left = int((self._seconds - passed) * updates / max(passed, 1e-6))
        self._look = step + max(1, min(left, updates))
        return False


def _reason(error: Exception) -> str:
    """What the storage library says, without the settings that it repeats; its reason stands at the end."""
    text = str(error).partition(" [tensorstore_spec=")[0]
    return text if len(text) <= 2 * _REASON else f"{text[:_REASON]} ... {text[-_REASON:]}"


@cache
def _quieten_orbax() -> None:
    """Keeps its threads from printing, with tracebacks, what comes to the caller as one error anyway."""
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    shown = sys.unraisablehook

    def show(lost: sys.UnraisableHookArgs) -> None:
        # A write that ends after another one has failed finds nobody who waits for it.
        if not (lost.exc_type is RuntimeError and str(lost.exc_value) == "Event loop is closed"):
            shown(lost)

    sys.unraisablehook = show


def seal(checkpoint: Path) -> None:
    """Waits until the disk has all files of a checkpoint, and writes their sizes and hashes next to them."""
    files = _files(checkpoint)
    with ThreadPoolExecutor(_READERS) as pool:
        hashes = list(pool.map(lambda path: _hash(path, sync=True), files))
    sums = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "xxh3_128": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    write_json(checkpoint / CHECKSUMS_FILE, {"files": sums})
    for directory in (path for path in checkpoint.rglob("*") if path.is_dir()):
        sync_directory(directory)


class _Sum(TypedDict):
    bytes: int
    xxh3_128: str  # in hex


class _Sums(TypedDict):
    """CHECKSUMS_FILE, by path in the checkpoint."""

    files: dict[str, _Sum]


def find_damage(checkpoint: Path) -> str | None:
    """What is not as it was written, or None. A checkpoint without checksums, of before there were any, is believed."""
    path = checkpoint / CHECKSUMS_FILE
    if not checkpoint.is_dir():
        return f"{checkpoint} is missing"
    if not path.exists():
        return None
    try:
        sums = check_form(_Sums, read_json(path, "", most=None), str(path), "")["files"]
    except DataError:
        return f"{CHECKSUMS_FILE} is not what was written"

    def look(name: str) -> str | None:
        file, wanted = checkpoint / name, sums[name]
        if not os.path.isfile(file):  # Path's own raises for a name that no file can have
            return f"{name:.120} is missing"
        if file.stat().st_size != wanted["bytes"]:
            return f"{name} has {file.stat().st_size} of {wanted['bytes']} bytes"
        return None if _hash(file) == wanted["xxh3_128"] else f"{name} has other bytes than were written"

    with ThreadPoolExecutor(_READERS) as pool:
        found = [problem for problem in pool.map(look, sums) if problem is not None]
    return f"{found[0]}" + (f" and {len(found) - 1} more" if found[1:] else "") if found else None


def _files(checkpoint: Path) -> list[Path]:
    """Of the items. What lies beside them Orbax still writes to when it gives the checkpoint its name."""
    return sorted(path for path in checkpoint.glob("*/**/*") if path.is_file())


def _hash(path: Path, sync: bool = False) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _put_aside(checkpoint: Path) -> None:
    """A damaged one is not removed: a person may want to look at it."""
    aside, number = checkpoint.with_name(f"{checkpoint.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged{number}")
    checkpoint.rename(aside)
