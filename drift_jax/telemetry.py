"""What a run measures while it works: metrics on disk and in the trackers, seconds, tokens, memory.

Metrics carry TRL's names (`loss`, `rewards/margins`, ...). `metrics.jsonl` is the one source of truth; the
trackers (TensorBoard, W&B) get a copy of every line. JSON has no numbers for NaN and the infinities, so these
are written as the strings "NaN", "Infinity" and "-Infinity" (as protobuf does); `read_metrics` turns them
back.
"""

from __future__ import annotations

import abc
import importlib
import json
import math
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, final

import jax
import numpy as np

from drift_jax.errors import ConfigError, DataError, StageError
from drift_jax.files import atomic_writer
from drift_jax.reading import parse_json, read_bytes, why_not_json

METRICS_FILE = "metrics.jsonl"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TRACKER_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_trackers(trackers: Sequence[str]) -> None:
    """Raises `ConfigError` for a tracker that is unknown or whose package is not installed."""
    for name in trackers:
        _import_tracker(name)


@final
class MetricsWriter:
    """Appends one JSON object per call to `directory/metrics.jsonl`, and copies it to the trackers.

    Only process 0 of a multi-host run writes; the others may call every method.

    Args:
      directory: the stage's directory; made when missing.
      trackers: any of "tensorboard" (event files in `directory/tensorboard`) and "wandb".
      project: W&B project.
      resume_step: None starts the file anew. A step keeps the lines up to and including it and removes the
        later ones, which the resumed run is about to write again, so that no step stands there twice.

    Raises:
      ConfigError: a tracker is unknown or its package is not installed. Nothing was written then.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        trackers: Sequence[str] = (),
        project: str = "drift_jax",
        resume_step: int | None = None,
    ) -> None:
        self.path = Path(directory) / METRICS_FILE
        modules = {name: _import_tracker(name) for name in trackers}
        self._file = None
        self._sinks: list[_TrackerSink] = []
        if jax.process_index() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _keep_lines_up_to(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        for name, module in modules.items():
            self._sinks.append(_SINKS[name](module, self.path.parent.resolve(), project, resume_step))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line. `metrics` holds numbers or 0-d arrays; every device array is waited for here.

        Raises:
          StageError: the disk is full, or the file cannot be written for another reason.
        """
        if self._file is None:
            return
        numbers = {name: _to_number(name, value) for name, value in metrics.items()}
        row = {"step": int(step), **{name: _to_json(number) for name, number in numbers.items()}}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise StageError(f"cannot write metrics to {self.path}: {error}. Make room and run again.") from None
        for sink in self._sinks:
            sink.write(int(step), numbers)

    def sync(self) -> None:
        """Returns when the disk has all lines. Raises `StageError` when it cannot take them."""
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StageError(f"cannot write metrics to {self.path}: {error}. Make room and run again.") from None

    def close(self) -> None:
        """Closes the file and the trackers; a second call does nothing."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a metrics file (or of the stage directory that holds one), in the order written.

    A last line without its newline is one that is being written at this moment (or that a killed process
    left behind) and is passed over.

    Raises:
      DataError: the file is missing, or a complete line is not a JSON object with an integer "step".
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"no metrics at {path}. Pass a stage directory of a run, such as RUN/iter_1.")
    lines, _ = _complete_lines(path)
    return [{name: _NON_FINITE.get(v, v) for name, v in _parse_line(path, n, line).items()} for n, line in lines]


def finite_losses(path: str | Path) -> list[float]:
    """Of the updates in a metrics file; one that was left out (`train.on_nonfinite`) may have none."""
    return [row["loss"] for row in read_metrics(path) if math.isfinite(row.get("loss", math.nan))]


def _complete_lines(path: Path) -> tuple[list[tuple[int, str]], bool]:
    """(line number, text) of every line that ends in a newline, and whether an unfinished one follows."""
    *complete, rest = read_bytes(path).decode("utf-8", errors="replace").split("\n")
    return [(n, line) for n, line in enumerate(complete, start=1) if line.strip()], bool(rest.strip())


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(
            f"{path}:{number} is not JSON ({why_not_json(error, in_line=True)}). Remove that line, or restore the file."
        ) from None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise DataError(f'{path}:{number} must be a JSON object with an integer "step". Remove that line.')
    for name, value in row.items():
        if not (isinstance(value, int | float) or (isinstance(value, str) and value in _NON_FINITE)):
            raise DataError(f"{path}:{number}: {name:.80} must be a number, found {value!r:.80}. Remove that line.")
    return row


def _keep_lines_up_to(path: Path, step: int | None) -> None:
    """Removes the lines after `step` (None: all of them)."""
    if not path.exists():
        return
    kept = ""
    if step is not None:
        lines, _ = _complete_lines(path)
        kept = "".join(line + "\n" for n, line in lines if _parse_line(path, n, line)["step"] <= step)
    with atomic_writer(path) as file:
        file.write(kept)


def _to_number(name: str, value: Any) -> int | float:
    number = np.asarray(value).item() if np.ndim(value) == 0 else value
    if not isinstance(number, int | float):
        raise TypeError(f"metric {name} must be a single number, found {type(value).__name__}.")
    return number


def _to_json(number: int | float) -> int | float | str:
    if math.isfinite(number):
        return number
    return next(text for text, value in _NON_FINITE.items() if str(value) == str(number))


def _import_tracker(name: str) -> Any:
    module = _TRACKER_MODULES.get(name)
    if module is None:
        known = ", ".join(_TRACKER_MODULES)
        raise ConfigError(f"tracking.trackers: {name!r} is not a tracker. Known ones: {known}.")
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"tracking.trackers names {name}, but the package {module} is not installed. Install it with\n"
            f'  pip install "drift-jax[trackers]"\nor take {name} out of tracking.trackers.'
        ) from None


class _TrackerSink(abc.ABC):
    """A copy of the metrics goes here."""

    @abc.abstractmethod
    def write(self, step: int, numbers: Mapping[str, int | float]) -> None: ...

    @abc.abstractmethod
    def close(self) -> None: ...


@final
class _TensorBoardSink(_TrackerSink):
    def __init__(self, module: Any, directory: Path, project: str, resume_step: int | None) -> None:
        purge = 0 if resume_step is None else resume_step + 1
        self._writer = module.SummaryWriter(logdir=str(directory / "tensorboard"), purge_step=purge)

    def write(self, step: int, numbers: Mapping[str, int | float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


@final
class _WandbSink(_TrackerSink):
    """One W&B run per attempt at a stage; a resumed stage continues it, and W&B ignores repeated steps."""

    def __init__(self, module: Any, directory: Path, project: str, resume_step: int | None) -> None:
        id_file = directory / "wandb_run_id"
        if resume_step is None or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        self._run = module.init(
            project=project,
            id=id_file.read_text(encoding="utf-8"),
            name="/".join(directory.parts[-2:]),
            dir=str(directory),
            resume="allow",
        )

    def write(self, step: int, numbers: Mapping[str, int | float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[str, Callable[[Any, Path, str, int | None], _TrackerSink]] = {
    "tensorboard": _TensorBoardSink,
    "wandb": _WandbSink,
}


@final
class StageTimer:
    """Seconds of a `with` block, and tokens per second of what was counted in it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens = 0
        self._clock = clock
        self._start: float | None = None
        self._stop: float | None = None

    def __enter__(self) -> StageTimer:
        self._start, self._stop = self._clock(), None
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = self._clock()

    def count_tokens(self, tokens: int) -> None:
        """Adds tokens that were computed (padding does not count)."""
        self.tokens += int(tokens)

    @property
    def seconds(self) -> float:
        """Since the block was entered, up to now or to its end; 0.0 before."""
        if self._start is None:
            return 0.0
        return (self._clock() if self._stop is None else self._stop) - self._start

    @property
    def tokens_per_second(self) -> float:
        """0.0 before any time has passed."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def peak_rss_gib() -> float:
    """The most memory this process ever had resident, in GiB.

    Linux carries `ru_maxrss` over from the parent process, so a small program started by a big one reads the
    big one's peak there; VmHWM is the process's own.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)
