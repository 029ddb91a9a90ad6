"""The configuration of an evaluation: what a run's config has a say in, and what it has not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from drift_jax.cli.evaluate import _label
from drift_jax.cli.evaluate_policy import _config_of, _config_of_run
from drift_jax.errors import ConfigError
from drift_jax.evaluation.settings import WILDBENCH, build_evaluation_config, fit_to_model
from tests.cli_runs import Drift, drift, write_yaml  # noqa: F401


def write(path: Path) -> Path:
    raw = {
        "run_dir": "runs/x",
        "model": {"path": "org/trained", "revision": "main"},
        "sampling": {
            "engine": "vllm",
            "temperature": 0.7,
            "max_new_tokens": 512,
            "n": 4,
            "chooser": "logprob",
            "seed": 7,
        },
        "judge": {"base_url": "http://127.0.0.1:1/v1", "model": "j"},
        "vllm": {"concurrency": 3},
    }
    path.write_text(yaml.safe_dump(raw))
    return path


def test_of_a_run_the_engine_and_judge_are_taken_and_not_how_it_samples(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml")
    config = build_evaluation_config("org/other", tmp_path / "out", WILDBENCH, file, ["sampling.max_new_tokens=64"])
    sampling = config.sampling
    assert (sampling.engine, sampling.seed, config.vllm.concurrency, config.judge.model) == ("vllm", 7, 3, "j")
    assert (sampling.temperature, sampling.top_p, sampling.n, sampling.chooser) == (0.0, 1.0, 1, "first")
    assert sampling.max_new_tokens == 64 and config.judge.max_tokens == 1024
    # The revision is one of the run's own model.
    assert (config.model.path, config.model.revision, config.run_dir) == ("org/other", None, str(tmp_path / "out"))
    own = build_evaluation_config("org/trained", tmp_path / "out", WILDBENCH, file, [])
    assert own.model.revision == "main" and own.sampling.max_new_tokens == WILDBENCH["max_new_tokens"]
    with pytest.raises(ConfigError, match="sampling.temprature"):
        build_evaluation_config("m", tmp_path, WILDBENCH, None, ["sampling.temprature=1"])


@pytest.mark.parametrize(
    ("written", "given", "most"),
    [
        ({"max_tokens": 512}, [], 1024),  # as a run writes it, which nobody asked for
        ({"max_tokens": 4096}, [], 4096),
        (None, [], 1024),
        ({"max_tokens": 512}, ["judge.max_tokens=300"], 300),
    ],
)
def test_verdicts_have_room(tmp_path: Path, written: object, given: list[str], most: int) -> None:
    file = write_yaml(tmp_path / "config.yaml", {"run_dir": "x", "model": {"path": "m"}, "judge": written})
    assert build_evaluation_config("m", tmp_path / "out", WILDBENCH, file, given).judge.max_tokens == most


@pytest.mark.parametrize("written", [0, "many", True])
def test_what_is_no_room_for_verdicts_is_named(tmp_path: Path, written: object) -> None:
    file = write_yaml(tmp_path / "run.yaml", {"run_dir": "x", "judge": {"max_tokens": written}})
    with pytest.raises(ConfigError, match=r"judge\.max_tokens"):
        build_evaluation_config("m", tmp_path / "out", WILDBENCH, file, [])


def test_prompts_and_answers_fit_the_model(tmp_path: Path) -> None:
    config = build_evaluation_config("m", tmp_path, WILDBENCH, None, [])
    assert fit_to_model(config, 32768) == (config, None) and fit_to_model(config, None) == (config, None)
    fitted, note = fit_to_model(config, 2048)
    assert (fitted.sampling.max_new_tokens, fitted.sampling.max_input_length) == (1024, 1024)
    assert note is not None and "made for 2048 tokens" in note


def test_a_revision_of_the_command_line_is_one_of_the_model_it_names(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml")
    for model in ("org/other", "org/trained"):
        for given in (file, None):
            changed = build_evaluation_config(model, tmp_path, WILDBENCH, given, ["model.revision=abc123"])
            assert (changed.model.path, changed.model.revision) == (model, "abc123")
    with pytest.raises(ConfigError, match=r"--set model.path: the model is m, .* Leave model.path out"):
        build_evaluation_config("m", tmp_path, WILDBENCH, None, ["model.path=n"])
    with pytest.raises(ConfigError, match=r"--set run_dir: results go to .* Leave run_dir out"):
        build_evaluation_config("m", tmp_path, WILDBENCH, None, ["run_dir=elsewhere"])


COMMANDS = ("wildbench", "alpaca-eval", "win-rate", "preference")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("raw", "words", "says"),
    [
        ({"model": "Qwen/X"}, [], "{file}: model: Input should be an object, found 'Qwen/X'."),
        ({"sampling": 3}, [], "{file}: sampling: Input should be an object, found 3."),
        ({}, ["--set", "model=foo"], "{file}: model: Input should be an object, found 'foo'."),
        ({"model": "Qwen/X"}, ["--set", "model.revision=a"], "--set model.revision: 'model' is not a section"),
    ],
)
def test_what_is_no_section_is_said(
    command: str, raw: dict[str, object], words: list[str], says: str, tmp_path: Path, drift: Drift
) -> None:
    file = write_yaml(tmp_path / "run.yaml", {"run_dir": "x"} | raw)
    own = {"win-rate": ["m", "--prompts", "p.jsonl"], "preference": ["--pairs", "p.jsonl", "--reference", "r"]}
    more = [*own.get(command, []), "--config", file, *words, "--out", tmp_path / "out"]
    code, _, err = drift("evaluate", command, "m", *more)
    assert code == 2 and says.format(file=file) in " ".join(err.split()), err


def test_a_revision_of_another_model_is_none_of_the_one_that_is_scored(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml")
    assert _config_of("org/trained", None, file, []).model.revision == "main"
    assert _config_of("org/other", None, file, []).model.revision is None
    assert _config_of("org/other", None, file, ["model.revision=abc123"]).model.revision == "abc123"


def test_a_stage_keeps_its_name_where_it_is_named_from_within_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run/iter_2/hf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    assert [_label(given) for given in ("iter_2/hf", str(tmp_path / "run/iter_2/hf"))] == ["run-iter_2"] * 2
    assert _label("org/model") == "model"


@pytest.mark.parametrize(
    ("written", "changes", "told"),
    [("", [], "template"), ("thinking: none", [], "none"), ("", ["data.thinking=none"], "none")],
)
def test_a_run_of_before_is_scored_as_it_was_trained(
    tmp_path: Path, written: str, changes: list[str], told: str
) -> None:
    """Its config has no `data.thinking`, which was as `template` says; the default is another one now."""
    path = tmp_path / "config.yaml"
    path.write_text(f"run_dir: r\nmodel: {{path: m}}\ndata:\n  max_length: 1999\n  {written}\n")
    config = _config_of_run(path, changes)
    assert config.data.thinking == told and config.data.max_length == 1999
