"""The configuration of an evaluation: what a run's config has a say in, and what it has not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from drift_jax.errors import ConfigError
from drift_jax.evaluation.settings import WILDBENCH, build_evaluation_config, fit_to_model


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


def test_prompts_and_answers_fit_the_model(tmp_path: Path) -> None:
    config = build_evaluation_config("m", tmp_path, WILDBENCH, None, [])
    assert fit_to_model(config, 32768) == (config, None) and fit_to_model(config, None) == (config, None)
    fitted, note = fit_to_model(config, 2048)
    assert (fitted.sampling.max_new_tokens, fitted.sampling.max_input_length) == (1024, 1024)
    assert note is not None and "made for 2048 tokens" in note
