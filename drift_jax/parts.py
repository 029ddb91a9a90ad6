"""A run as a chain of processes: which stages one of them does, and what it leaves to the next."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from drift_jax.config import RunConfig, config_to_yaml

Kind = Literal["training", "sampling"]

NEXT_PART = 10  # the exit code of a process whose next stage is another one's


class PartEnd(Exception):
    """The next stage belongs to the other kind of process."""


@dataclass(frozen=True)
class Part:
    """What one process of a run does. Sampling holds no accelerator; all other stages are training.

    `folder` is on this machine and lasts as long as the run: the parts leave there what the next one needs.
    """

    kind: Kind
    folder: Path

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    def begin(self) -> None:
        """Notes when the run began."""
        (self.folder / "started").write_text(str(time.monotonic()), encoding="utf-8")

    @property
    def started(self) -> float:
        """By `time.monotonic`, which all processes of a machine share."""
        return float((self.folder / "started").read_text(encoding="utf-8"))

    @property
    def is_first(self) -> bool:
        return not self.config_file.exists()

    def other(self) -> Part:
        return Part("training" if self.kind == "sampling" else "sampling", self.folder)

    def end(self, config: RunConfig) -> PartEnd:
        """The error to raise where the next stage is of the other kind."""
        self.config_file.write_text(config_to_yaml(config), encoding="utf-8")
        return PartEnd()
