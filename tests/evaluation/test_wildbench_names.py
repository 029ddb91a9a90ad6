"""What `drift evaluate wildbench` compares with has names of its own: nothing is lost for having that of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drift_jax.errors import ConfigError
from drift_jax.evaluation.wildbench_inputs import by_name, open_scores
from tests.cli_runs import Drift, drift  # noqa: F401
from tests.evaluation.test_wildbench_run import options, verdict
from tests.http_servers import serve
from tests.wildbench_files import judge_of, write_checkout, write_outputs


def write_scores(path: Path, score: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    rows = [{"session_id": f"task{i:02}", "score": score, "out_len": 3} for i in range(16)]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--reference", "b/mine.json"],
            "a reference is called mine, as the model is, and differs from it in 16 of 16 outputs: it is not the model "
            "itself. Name it with --reference NAME=FILE, or the model with --name.",
        ),
        (
            ["--reference", "b/other.json", "--reference", "c/other.json"],
            "two of --reference are both called other: one would be lost. Name them with --reference NAME=FILE.",
        ),
        (
            ["--against", "s/mine.json"],
            "scores of --against are called mine, as the model is whose outputs are judged: its own would be lost.",
        ),
        (
            ["--against", "s/m.json", "--against", "t/m.json"],
            "two of --against are both called m: one would be lost. Name them with --against NAME=FILE.",
        ),
    ],
)
def test_names_that_are_alike_are_refused(
    tmp_path: Path, drift: Drift, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkout(tmp_path / "WildBench")
    ours = write_outputs(tmp_path / "ours.json", "mine", {i: "x" * (20 + i) for i in range(16)})
    for path in ("b/mine.json", "b/other.json", "c/other.json"):
        Path(path).parent.mkdir(exist_ok=True)
        write_outputs(Path(path), Path(path).stem, {i: path for i in range(16)})
    for path in ("s/mine.json", "s/m.json", "t/m.json"):
        write_scores(Path(path), "1")
    with serve(judge_of(verdict)) as small:
        code, _, err = drift("evaluate", "wildbench", ours, *options(tmp_path, small.url), *words)
        assert code == 2 and says in " ".join(err.split()), err
        assert not small.seen


def test_names_are_given(tmp_path: Path, drift: Drift, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that were refused are all counted under the names that they are given."""
    monkeypatch.chdir(tmp_path)
    write_checkout(tmp_path / "WildBench")
    ours = write_outputs(tmp_path / "ours.json", "mine", {i: "x" * 20 for i in range(4)})
    before = write_outputs(tmp_path / "before.json", "mine", {i: "y" for i in range(4)})
    low, high = write_scores(tmp_path / "s/mine.json", "1"), write_scores(tmp_path / "t/mine.json", "10")
    words = ["--reference", f"before={before}", "--against", f"low={low}", "--against", f"high={high}"]
    with serve(judge_of(verdict)) as small:
        code, _, err = drift("evaluate", "wildbench", ours, *options(tmp_path, small.url), *words)
    assert code == 0, err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["rewards"].keys() == {"before"} and report["rewards"]["before"]["reward"] > 0
    assert report["wb_elo"].keys() == {"mine", "low", "high"}


def test_names_of_files_and_columns_count_as_well() -> None:
    """Rows of pairs go to a file by the last part of a name, and the mix calls upstream's references by short names."""
    for one, other in (("org/x", "their/x"), ("gpt4t", "gpt-4-turbo-2024-04-09")):
        with pytest.raises(ConfigError, match=f"two of --reference are called {one} and {other}, the same in the res"):
            by_name([(one, 1), (other, 2)], "--reference")
    assert by_name([("a", 1), ("b", 2)], "--reference") == {"a": 1, "b": 2}


def test_a_path_may_hold_the_sign_of_a_name(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "K=500.json", "3")
    assert open_scores(str(path))[0] == "K=500" and open_scores(f"mine={path}")[0] == "mine"
