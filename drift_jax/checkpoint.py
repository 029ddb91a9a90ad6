"""Orbax checkpoints of a training stage: parameters, optimizer state, step, data position and config.

Saving is asynchronous; a checkpoint is restored onto whatever mesh the new run has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, final

import orbax.checkpoint as ocp

from drift_jax.distributed import is_lost_peer
from drift_jax.errors import StageError

_META = "meta"


@final
class Checkpointer:
    """Keeps the newest `keep` checkpoints of one stage under `directory`."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the writer may be broken as well; the first error is the one to see.
        if kind is None:
            self.wait()
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

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
            self._manager.save(step, args=ocp.args.Composite(**args))

    def wait(self) -> None:
        """Returns when everything is on disk. Raises `StageError` when it is not."""
        with self._refusals():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

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
                f"the checkpoint {self.directory}/{step} does not fit this model and optimizer: {error}. "
                "Use the config it was made with, or remove the directory to start the stage again."
            ) from error

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What keeps a checkpoint from being written, as a `StageError`; that another process is gone, as it is."""
        try:
            yield
        except Exception as error:
            if is_lost_peer(error):
                raise
            raise StageError(
                f"cannot write a checkpoint to {self.directory}: {error}. The last whole one is step "
                f"{self._manager.latest_step()}. Free space and run again; the stage goes on from there."
            ) from error
