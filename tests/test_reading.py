"""`[NAME=]PATH`: runs and files may have `=` in their own names."""

from __future__ import annotations

from pathlib import Path

import pytest

from drift_jax.errors import ConfigError
from drift_jax.evaluation.compare import collect
from drift_jax.evaluation.replies import name_sources
from drift_jax.reading import split_name
from drift_jax.report.runs import load_runs
from tests.cli_runs import Drift, drift  # noqa: F401
from tests.report_runs import write_run


@pytest.mark.parametrize(
    ("given", "name", "path"),
    [
        ("runs/a", None, "runs/a"),
        ("a=runs/a", "a", "runs/a"),
        ("lr=1e-5", None, "lr=1e-5"),  # is there
        ("runs/lr=1e-5", None, "runs/lr=1e-5"),
        ("a=runs/lr=1e-5", "a", "runs/lr=1e-5"),
        ("lr=1e-6", "lr", "1e-6"),  # is not there, and may be a path that is mistyped
        ("runs/lr=1e-6", None, "runs/lr=1e-6"),
        ("./lr=1e-6", None, "lr=1e-6"),
        ("Qwen/Qwen2.5=lr=1e-5", "Qwen/Qwen2.5", "lr=1e-5"),  # a name of the hub
        ("=lr=1e-5", None, "lr=1e-5"),
        ("a=\0", "a", "\0"),
        ("a" * 5000 + "/=b", None, "a" * 5000 + "/=b"),
    ],
)
def test_what_is_there_as_a_whole_is_a_path(
    given: str, name: str | None, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("lr=1e-5", "runs/lr=1e-5"):
        Path(folder).mkdir(parents=True)
    assert split_name(given) == (name, Path(path))


def test_runs_with_an_equals_sign_are_found_by_every_command(
    tmp_path: Path, drift: Drift, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, again = write_run(Path("lr=1e-5")), write_run(Path("runs/lr=1e-6"))
    given = [str(run), str(again), f"b={again}"]
    assert [(one.name, one.folder) for one in load_runs(given)] == [(run.name, run), (again.name, again), ("b", again)]
    assert {measure.method for measure in collect(given)[0]} == {"lr=1e-5", "lr=1e-6", "b"}
    files = {"lr=1e-5": run, "lr=1e-6": again, "b": again}
    assert name_sources(given) == {name: of / "iter_2/completions.jsonl" for name, of in files.items()}
    with pytest.raises(ConfigError, match="both called lr=1e-5: name them, as in NAME=runs/../lr=1e-5"):
        collect([str(run), "runs/../lr=1e-5"])
    for folder, word in ((run, run), (again, f"b={again}")):
        code, _, err = drift("report", word)
        assert code == 0 and (folder / "report.html").is_file(), err
