"""Paths that a person mistypes: refused with one message, before any work, and never read as this directory."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from drift_jax.errors import StageError
from drift_jax.evaluation.report import Report, write_report
from drift_jax.report.card import write_card
from drift_jax.report.page import write_page
from drift_jax.report.runs import load_run
from tests.cli_runs import Drift, base, drift, model_dir  # noqa: F401
from tests.report_runs import write_run

LONG = "a" * 300  # no file system of ours has such names
OUT = {
    "win-rate": "evaluate win-rate A B --prompts prompts.jsonl --check json:loads --judge programmatic --out {}",
    "preference": "evaluate preference run --pairs pairs/pairs.train.jsonl --out {}",
    "compare": "evaluate compare run --out {}",
    "coverage": "evaluate coverage run --out {}",
    "alpaca-eval": "evaluate alpaca-eval model --out {}",
    "wildbench": "evaluate wildbench model --out {}",
    "run": "run config.yaml --run-dir {}",
    "sample": "sample config.yaml --model model --input dsat.jsonl --out {}",
    "train": "train config.yaml --model model --pairs pairs --out {}",
    "export": "export run/iter_1/checkpoints --model model --out {}",
    "mine": "mine dsat.jsonl --format messages --out {}",
    "convert": "data convert pairs --to disk --out {}",
    "card": "card run --out {}/card.md",
    "report": "report run --out {}/page.html",
    "translate": "config translate dpo.yaml --out {}/config.yaml",
    "html": "plan config.yaml --devices 1 --html {}/plan.html",
    "write": "plan config.yaml --devices 1 --search --write {}/config.yaml",
}
FILES = [name for name, words in OUT.items() if "{}/" in words]
NAMED = {
    "config": "run {}",
    "run_dir of the config": "run config.yaml --set run_dir={}",
    "model of the config": "run config.yaml --set model.path={}",
    "inspect": "data inspect {}",
    "convert": "data convert {} --to disk --out out",
    "report": "report {}",
    "card": "card {}",
    "mine": "mine {} --format messages --out out",
    "export": "export {} --model model --out out",
    "pairs": "train config.yaml --model model --pairs {} --out out",
    "input": "sample config.yaml --model model --input {} --out out",
    "win-rate": "evaluate win-rate {} B --prompts prompts.jsonl --judge programmatic --check json:loads --out out",
    "coverage": "evaluate coverage {} --out out",
    "plan": "plan {} --devices 1",
}


@pytest.fixture()
def work(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base` as the current directory, with what the commands name besides."""
    (base / "prompts.jsonl").write_text(json.dumps({"id": "p", "prompt": "Why?"}) + "\n")
    (base / "file").write_text("precious")
    monkeypatch.chdir(base)
    return base


def refused(drift: Drift, words: str) -> str:
    code, out, err = drift(*words.split(" "))
    assert code == 2 and err.startswith("error:") and err.count("error:") == 1, out + err
    assert "Traceback" not in out + err
    return " ".join(err.split())


@pytest.mark.parametrize("name", OUT)
def test_results_do_not_go_into_a_file(drift: Drift, work: Path, name: str) -> None:
    """Models, runs and judges that are not there are not even asked for."""
    before = sorted(work.rglob("*"))
    assert "there can be no directory file: file is a file" in refused(drift, OUT[name].format("file"))
    assert (work / "file").read_text() == "precious" and sorted(work.rglob("*")) == before


def test_the_run_dir_of_a_config_is_no_file(drift: Drift, work: Path) -> None:
    assert "cannot write to the directory file: File exists" in refused(drift, "run config.yaml --set run_dir=file")
    assert (work / "file").read_text() == "precious"


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_results_is_no_directory(drift: Drift, work: Path, name: str) -> None:
    words = OUT[name].partition("{}")[0] + "pairs"
    assert "pairs: that is a directory. Name a file in it." in refused(drift, words)


@pytest.mark.parametrize("words", [*OUT.values(), *NAMED.values()], ids=[*(f"out of {name}" for name in OUT), *NAMED])
def test_a_name_that_is_too_long(drift: Drift, work: Path, words: str) -> None:
    before = sorted(work.rglob("*"))
    assert "File name too long" in refused(drift, words.format(LONG))
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize("name", ["run", "sample", "train", "export", "compare", "coverage", "mine"])
def test_an_empty_path_is_not_this_directory(drift: Drift, work: Path, name: str) -> None:
    before = sorted(work.rglob("*"))
    option = "--run-dir" if name == "run" else "--out"
    assert f"{option} is empty" in refused(drift, OUT[name].format(""))
    assert sorted(work.rglob("*")) == before


def test_this_directory_is_one(drift: Drift, work: Path) -> None:
    write_run(work / "run")
    assert drift("evaluate", "compare", "run", "--out", ".")[0] == 0
    assert (work / "compare.json").is_file()


def test_a_plan_is_not_compiled_for_a_place_that_is_not_there(
    drift: Drift, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drift_jax.cli.plan.run_plan", lambda *_: pytest.fail("it was compiled"))
    said = refused(drift, "plan config.yaml --devices 1 --html nowhere/plan.html")
    assert "there is no directory nowhere. Make it first." in said


def test_pages_and_cards_name_the_file_in_their_way(work: Path) -> None:
    """Also where no command has looked before."""
    run = load_run(write_run(work / "run"))
    (run.folder / "iter_2" / "hf").mkdir(exist_ok=True)
    (run.folder / "iter_2" / "hf" / "config.json").write_text("{}")
    inside = work / "file" / "x"
    for write in (
        lambda: write_card(run, inside),
        lambda: write_page([run], inside),
        lambda: write_report(Report("t", ()), work / "file"),
    ):
        with pytest.raises(StageError, match=r"file is a file\. Give another path"):
            write()


@pytest.mark.parametrize("named", [(), (7,)], ids=["no name", "a number"])
def test_an_error_without_the_name_of_a_file_is_ours(
    drift: Drift, monkeypatch: pytest.MonkeyPatch, named: tuple[int, ...]
) -> None:
    def fail() -> None:
        raise OSError(errno.EEXIST, "File exists", *named)

    monkeypatch.setattr("drift_jax.presets.presets_table", fail)
    with pytest.raises(FileExistsError):
        drift("presets")


def test_an_error_that_names_a_file_is_told(drift: Drift, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.ELOOP, "Too many levels of symbolic links", "around/around")

    monkeypatch.setattr("drift_jax.presets.presets_table", fail)
    assert "refuses to read or write around/around: Too many levels" in refused(drift, "presets")
