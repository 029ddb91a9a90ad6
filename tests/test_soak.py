"""Four iterations leave nothing behind but what they must, and the verdict sees each way of not being flat."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drift_jax.config import load_config
from tests.cli_runs import base, model_dir  # noqa: F401
from tests.script_modules import script_module

SCRIPT = Path(__file__).parents[1] / "scripts" / "soak.py"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def soak() -> Iterator[Any]:
    with script_module(SCRIPT) as module:
        yield module


@pytest.mark.slow
def test_a_run_is_flat(soak: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = base / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    changes = ["recipe.iterations=4", "train.max_steps=1", "train.warmup_ratio=0", "sampling.max_new_tokens=2"]
    figures = soak.soak(load_config(base / "config.yaml", changes), temporary)
    assert [row["iteration"] for row in figures] == [1, 2, 3, 4]
    # Bytes and files of an iteration and the trend of memory: what this process holds besides is no small part of it.
    assert soak.judge(figures, slack=0.05) == []
    assert all(
        row["peak_mib"] >= 100 and row["iteration_bytes"] > 10_000 and row["checkpoints"] == 1 for row in figures
    )


def test_a_model_that_is_not_there_is_one_error(
    soak: Any, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(base)  # the script goes to the repository
    monkeypatch.setattr("sys.argv", ["soak.py", "--model", "nope", "--config", str(base / "config.yaml")])
    assert soak.main() == 2
    assert "error: no model directory at nope" in capsys.readouterr().err and tempfile.tempdir is None
    assert Path(os.environ.get("TMPDIR", "/")).is_dir(), "the directory of the script is gone"


def flat() -> list[Row]:
    row = {"memory_mib": 1000.0, "peak_mib": 1010.0, "open_files": 7, "processes": 1, "threads": 30, "jax_arrays": 0}
    row |= {"iteration_bytes": 100, "iteration_files": 70, "checkpoints": 2, "cache_bytes": 50, "temporary_bytes": 0}
    return [{"iteration": i, "earlier_bytes": 10 + 100 * i, "run_bytes": 40 * i} | row for i in range(1, 12)]


def test_figures_that_are_flat_are_called_so(soak: Any) -> None:
    noisy = [row | {"memory_mib": 1000 + i % 3, "threads": 30 + i % 2} for i, row in enumerate(flat())]
    assert soak.judge(flat(), 0.02) == soak.judge(noisy, 0.02) == []


LEAKS: dict[str, Callable[[int], float]] = {
    "memory_mib": lambda i: 1000 + 10 * i,
    "peak_mib": lambda i: 1010 + 10 * i,
    "open_files": lambda i: 7 + (i > 8),
    "processes": lambda i: 1 + (i > 8),
    "threads": lambda i: 30 + 2 * i,
    "jax_arrays": lambda i: i,
    "iteration_bytes": lambda i: 100 + 4 * (i == 9),
    "iteration_files": lambda i: 70 + 3 * i,
    "checkpoints": lambda i: 2 + (i > 8),
    "cache_bytes": lambda i: 50 + 5 * i,
    "temporary_bytes": lambda i: 8 * (i > 8),
    "earlier_bytes": lambda i: 10 + 101 * i,
    "run_bytes": lambda i: 40 * i + i * i,
}


@pytest.mark.parametrize("name", LEAKS)
def test_each_figure_that_grows_is_named(soak: Any, name: str) -> None:
    said = {"earlier_bytes": "iterations that are finished grow"}.get(name, name)
    grown = [row | {name: LEAKS[name](row["iteration"])} for row in flat()]
    assert any(problem.startswith(said) for problem in soak.judge(grown, 0.02))


def test_too_few_iterations_are_no_verdict(soak: Any) -> None:
    assert "too few" in soak.judge(flat()[:3], 0.02)[0]
