"""The `drift` command in this process, and a directory with all that a run needs, for tests of the command."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from drift_jax.cli import main
from tests.tiny_pairs import build_tiny_policy, write_dsat, write_pairs

REPO = Path(__file__).resolve().parent.parent
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "SOME_JUDGE_KEY")
CANARY = "canary-0123456789-yranac"
Drift = Callable[..., tuple[int, str, str]]


@pytest.fixture()
def drift(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Drift:
    """Runs the command in this process: (exit code, stdout, stderr). No secret of the environment is ever printed."""
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["drift", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert CANARY not in out + err
        return int(stopped.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_policy(tmp_path_factory.mktemp("cli") / "model", tied=True)


@pytest.fixture()
def base(tmp_path: Path, model_dir: Path) -> Path:
    """A directory with everything `drift run config.yaml` needs."""
    shutil.copytree(model_dir, tmp_path / "model")
    write_dsat(tmp_path / "dsat.jsonl", 16)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    write_pairs(pairs / "pairs.train.jsonl", 8)
    raw = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model"), "compute_dtype": "float32"},
        "data": {"dsat": str(tmp_path / "dsat.jsonl"), "test_rows": 4, "max_length": 128, "max_prompt_length": 64},
        "recipe": {"iterations": 1},
        "sampling": {"max_new_tokens": 4, "batch_size": 8, "compute_dtype": "float32", "max_input_length": 128},
        "train": {"batch_size": 8},
    }
    write_yaml(tmp_path / "config.yaml", raw)
    return tmp_path


def write_yaml(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


def change_config(path: Path, **sections: object) -> Path:
    """The file with other values; a section is merged into the one that is there."""
    raw = yaml.safe_load(path.read_text())
    for key, value in sections.items():
        raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
    return write_yaml(path, raw)
