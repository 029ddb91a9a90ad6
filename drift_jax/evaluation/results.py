"""What runs and evaluations have left on disk, as one list of numbers: stages of runs, and reports of `drift evaluate`.

A report lies in the run (any folder of it), or is named itself. Which iteration it is of is said by the model that it
names (RUN/iter_2/hf, or RUN-iter_2), else by the stage's folder that it lies in.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import (
    Any,
    NamedTuple,
    NotRequired,  # pydantic needs these on Python 3.11
)

from typing_extensions import TypedDict

from drift_jax.errors import DataError
from drift_jax.evaluation.preference import SHOWN
from drift_jax.reading import check_form, read_json
from drift_jax.telemetry import METRICS_FILE, finite_losses

_STAGE = re.compile(r"(?:^|[-/])(seed|iter_\d+)(?:/hf)?/?$")
_SKIPPED = {"hf", "checkpoints", "tokens", "tensorboard", ".cache"}  # folders that hold no reports, and many files
_MIX = re.compile(r"mixture_of_rewards\.K=-?\d+")  # of all groups; those of one have its name in between
_REPORT = "report.json"
_REMEDY = "Make it again, or remove it."
_WORDS = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "token_logps/chosen": "nats/token chosen",
    "token_logps/rejected": "nats/token rejected",
    "tokens/chosen": "tokens chosen",
    "tokens/rejected": "tokens rejected",
}
assert _WORDS.keys() == SHOWN.keys()


class Number(TypedDict):
    """A number with its interval; null where there is none."""

    value: float | None
    low: float | None
    high: float | None


class _Preference(TypedDict):
    metrics: dict[str, Number | None]
    pairs: NotRequired[int]


Evaluation = TypedDict(
    "Evaluation",
    {
        "preference": NotRequired[_Preference],
        "eval_loss": NotRequired[float | None],
        "eval_rewards/margins": NotRequired[float | None],
        "eval_rewards/accuracies": NotRequired[float | None],
    },
)
Evaluation.__doc__ = "eval.json, as far as it is read."


class Measure(NamedTuple):
    """A number of a method; `stage` is None where it belongs to none."""

    method: str
    stage: str | None
    metric: str
    value: float
    low: float | None
    high: float | None
    source: str

    @property
    def iteration(self) -> int | None:
        return None if self.stage is None else iteration_of(self.stage)

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


def iteration_of(stage: str) -> int:
    """The seed stage is before the first iteration."""
    return 0 if stage == "seed" else int(stage.removeprefix("iter_"))


def read_results(method: str, folder: Path) -> tuple[list[Measure], list[str]]:
    """All numbers of a run or of a folder with reports, and files that were passed over, with the reason.

    Raises:
      DataError: there is nothing.
    """
    if not folder.is_dir():
        raise DataError(f"no directory at {folder}. Give run directories, or folders with a {_REPORT}.")
    found, passed = list[Measure](), list[str]()
    for stage in sorted((p for p in folder.iterdir() if _STAGE.fullmatch(p.name)), key=lambda p: iteration_of(p.name)):
        found += _of_stage(method, stage)
    for path in _reports(folder):
        data, inside = _read(path), path.relative_to(folder).parts
        stage = inside[0] if _STAGE.fullmatch(inside[0]) else None
        numbers = _numbers_of(path, data) if data is not None else None
        if numbers is None:
            passed.append(f"{path}: no report of drift evaluate")
            continue
        for number in numbers:
            of, own = number.method or method, _stage_of(number.stage) or stage
            found.append(number._replace(method=of, stage=own, source=str(path)))
    if not found:
        raise DataError(f"{folder} has no results: no stage with eval.json or {METRICS_FILE}, and no {_REPORT}.")
    return [m for m in found if math.isfinite(m.value)], passed


def _numbers_of(path: Path, data: Mapping[str, Any]) -> list[Measure] | None:
    """None for a report that is not of `drift evaluate`. Raises `DataError` for one of another form."""
    read = next((read for fits, read in _READERS if fits(data)), None)
    try:
        return None if read is None else list(read(data))
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not as drift evaluate writes it ({type(error).__name__}: {error!s:.120}). {_REMEDY}"
        ) from None


def _of_stage(method: str, stage: Path) -> Iterator[Measure]:
    path = stage / "eval.json"
    data = _read(path) if path.is_file() else None
    if data is not None:
        check_form(Evaluation, data, str(path), _REMEDY)
        metrics = (data.get("preference") or {}).get("metrics")
        if metrics is None:  # of a run made before intervals were written
            metrics = {
                name: {"value": data.get(f"eval_{name}"), "low": None, "high": None} for name in list(_WORDS)[:2]
            }
        for name, word in _WORDS.items():
            yield from _number(metrics.get(name), f"held-out {word}", method, stage.name, str(path))
    if (stage / METRICS_FILE).is_file():
        losses = finite_losses(stage)
        if losses:
            mean = sum(losses) / len(losses)
            yield Measure(method, stage.name, "training loss", mean, None, None, str(stage / METRICS_FILE))


def _number(
    number: Mapping[str, Any] | None, metric: str, method: str = "", stage: str | None = None, source: str = ""
) -> Iterator[Measure]:
    if number and number["value"] is not None:
        yield Measure(method, stage, metric, float(number["value"]), number["low"], number["high"], source)


def _reports(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        if _REPORT in files:
            yield Path(where) / _REPORT


def _read(path: Path) -> dict[str, Any] | None:
    data = read_json(path, _REMEDY, most=None)
    return data if isinstance(data, dict) else None


def _stage_of(model: str | None) -> str | None:
    match = _STAGE.search(model or "")
    return match.group(1) if match else None


# --- the reports of drift evaluate: numbers whose `stage` is still the model's name ---------------------------


def _preference(data: Mapping[str, Any]) -> Iterator[Measure]:
    references = {stage["reference"] for stage in data["stages"].values()}
    file = Path(data["pairs_file"]).name
    against = f" against {next(iter(references))}" if len(references) == 1 and len(data["stages"]) > 1 else ""
    for stage in data["stages"].values():
        for name, word in _WORDS.items():
            yield from _number(stage["metrics"].get(name), f"{word} on {file}{against}", stage=stage["policy"])


def _wildbench(data: Mapping[str, Any]) -> Iterator[Measure]:
    score, model = data["score"], data["model"]
    interval = score["score_interval"]
    scaled = None if interval is None else [20 * (end - 5) for end in interval]
    yield from _scaled(score["adjusted_score"], 10, scaled, "WB-Score x10", model)
    yield from _scaled(score["task_macro_score"], 10, None, "WildBench task macro x10", model)
    for reference, found in (data.get("rewards") or {}).items():
        ends = found["reward_interval"]
        ends = None if ends is None else [100 * end for end in ends]
        yield from _scaled(found["reward"], 100, ends, f"WB-Reward x100 against {reference}", model)
    for name, value in (data.get("mixture") or {}).items():
        if _MIX.fullmatch(name):
            yield from _scaled(value, 1, None, "WB-Reward x100, mean", model)


def _alpaca_eval(data: Mapping[str, Any]) -> Iterator[Measure]:
    model = data.get("model")  # reports of before do not say it
    yield from _scaled(data["win_rate"], 1, data.get("win_rate_interval"), "AlpacaEval 2 win rate, %", model)
    controlled = data["length_controlled_winrate"]
    if isinstance(controlled, int | float):  # else a sentence on why there is none
        yield from _scaled(controlled, 1, None, "AlpacaEval 2 length-controlled, %", model)


def _win_rate(data: Mapping[str, Any]) -> Iterator[Measure]:
    other = f"against {data['b']}"
    yield from _scaled(data["win_rate"], 1, data["win_rate_interval"], f"win rate {other}, %", data["a"])
    ends = data["length_controlled_interval"]
    yield from _scaled(data["length_controlled_win_rate"], 1, ends, f"win rate {other} at equal lengths, %", data["a"])


def _coverage(data: Mapping[str, Any]) -> Iterator[Measure]:
    for method, found in data["methods"].items():
        ends = [100 * end for end in found["coverage_interval"]]
        for number in _scaled(found["coverage"], 100, ends, "coverage of the high-reward region, %", None):
            stage = _stage_of(method)
            yield number._replace(method=method.removesuffix(f"-{stage}") if stage else method, stage=stage)


def _scaled(value: Any, factor: float, ends: Any, metric: str, model: str | None) -> Iterator[Measure]:
    """`value` and `ends` are what stands in a file: numbers, or whatever `float` refuses."""
    if value is not None:
        low, high = (None, None) if ends is None else (float(ends[0]), float(ends[1]))
        yield Measure("", model, metric, factor * float(value), low, high, "")


_Fits = Callable[[Mapping[str, Any]], bool]
_READERS: tuple[tuple[_Fits, Callable[[Mapping[str, Any]], Iterator[Measure]]], ...] = (
    (lambda data: data.get("benchmark") == "preference", _preference),
    (lambda data: data.get("benchmark") == "coverage", _coverage),
    (lambda data: {"templates", "score", "rewards"} <= data.keys(), _wildbench),
    (lambda data: {"annotator", "win_rate", "length_controlled_winrate"} <= data.keys(), _alpaca_eval),
    (lambda data: {"a", "b", "win_rate", "length_controlled_win_rate"} <= data.keys(), _win_rate),
)
