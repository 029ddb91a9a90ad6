"""What a WildBench evaluation compares with, by name: outputs of references, and score rows of other models.

Results and their files go by names, so no two may be alike: one of them would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from drift_jax.distributed import on_each
from drift_jax.errors import ConfigError, StageError
from drift_jax.evaluation.json_rows import read_json
from drift_jax.evaluation.wildbench import REFERENCES, ScoreRow
from drift_jax.evaluation.wildbench_judge import hub_outputs, load_outputs
from drift_jax.evaluation.wildbench_rows import Task, score_rows

T = TypeVar("T")


def open_reference(given: str) -> tuple[str, dict[str, str]]:
    """Outputs by session id, of `NAME=FILE`, `FILE`, or the name of a model that upstream has run.

    Raises:
      DataError: there are none that can be used.
    """
    name, file = _split(given)
    if not file.is_file():
        return hub_outputs(given)
    said, outputs = load_outputs(file)
    return name or said, outputs


def open_scores(given: str) -> tuple[str, tuple[ScoreRow, ...]]:
    """Of `NAME=FILE`, or `FILE`, whose name is the model's. Raises `DataError` for a file of no use."""
    name, file = _split(given)
    return name or file.stem, score_rows(read_json(file, "rows")).rows


def _split(given: str) -> tuple[str, Path]:
    """A path may hold a `=` of its own."""
    name, separator, file = given.partition("=")
    return (name, Path(file)) if separator and Path(file).is_file() else ("", Path(given))


def open_all(given: Sequence[str] | None, opens: Callable[[str], tuple[str, T]], option: str) -> dict[str, T]:
    """What an option that may be repeated names, opened on every process. Raises as `opens` and `by_name` do."""
    return by_name([on_each(lambda one=one: opens(one)) for one in given or ()], option)


def by_name(found: Iterable[tuple[str, T]], option: str) -> dict[str, T]:
    """Raises `ConfigError` where two have a name that is the same in the results, or as the name of a file."""
    named = dict[str, T]()
    for name, value in found:
        like = next((other for other in named if _column(other) == _column(name)), None)
        if like is not None:
            both = (
                f"are both called {name}" if like == name else f"are called {like} and {name}, the same in the results"
            )
            raise ConfigError(f"two of {option} {both}: one would be lost. Name them with {option} NAME=FILE.")
        named[name] = value
    return named


def _column(name: str) -> str:
    """What a model is called in the published tables, and its results' files."""
    last = name.rstrip("/").rpartition("/")[2]
    return REFERENCES.get(last, last)


def refuse_own_name(model: str, against: Mapping[str, Sequence[ScoreRow]]) -> None:
    """Raises `ConfigError` where scores of another model have the name of this one."""
    if model in against:
        raise ConfigError(
            f"scores of --against are called {model}, as the model is whose outputs are judged: its own would be lost. "
            "Name them with --against NAME=FILE, or the model with --name."
        )


def is_itself(
    model: str, outputs: Mapping[str, str], reference: str, others: Mapping[str, str], tasks: Sequence[Task]
) -> bool:
    """Whether a reference is the model: its name is, and the outputs are.

    Raises:
      ConfigError: only the name is.
    """
    if reference != model:
        return False
    answered = [task.session_id for task in tasks if task.session_id in outputs]
    differing = sum(outputs[name] != others.get(name) for name in answered)
    if differing:
        raise ConfigError(
            f"a reference is called {model}, as the model is, and differs from it in {differing} of {len(answered)} "
            "outputs: it is not the model itself. Name it with --reference NAME=FILE, or the model with --name."
        )
    return True


def file_name(text: str) -> str:
    """A model's name as the name of a file, as upstream has it: what stands behind the last slash."""
    name = text.rstrip("/").rpartition("/")[2]
    if name in ("", ".", ".."):
        raise StageError(f"{text!r} is no name for a file: give another one with --name.")
    return name
