"""A small run to plan for: sizes of which no two can be taken for each other in a compiled program."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from drift_jax.config import RunConfig, build_config
from drift_jax.plan.slices import Slice, open_local

REPO = Path(__file__).resolve().parents[2]

TPU_COMPILER, GPU_COMPILER = (Path(sys.prefix) / f"{kind}_compiler" for kind in ("tpu", "gpu"))  # by `make test`

# `make test` sets these variables: there a compiler must be there, and its absence a failure.
needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None
    and not TPU_COMPILER.is_dir()
    and "DRIFT_NEEDS_TPU_COMPILER" not in os.environ,
    reason="libtpu, the TPU compiler, is not installed: make test does it, or pip install 'drift-jax[plan]'",
)

needs_gpu_compiler = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin")))
    and not GPU_COMPILER.is_dir()
    and "DRIFT_NEEDS_GPU_COMPILER" not in os.environ,
    reason="XLA's GPU compiler is not installed: make test does it, or pip install 'drift-jax[plan-gpu]'",
)


def run_with_tpu_compiler(words: list[Any], seconds: float) -> str:
    """What `python WORDS` prints, apart from the settings of this process; one such process at a time."""
    with FileLock(Path(tempfile.gettempdir()) / "drift_jax_libtpu.lock"):
        return _run_beside(TPU_COMPILER, words, seconds)


def run_with_gpu_compiler(words: list[Any], seconds: float) -> str:
    """What `python WORDS` prints, apart from the settings of this process."""
    return _run_beside(GPU_COMPILER, words, seconds)


def _run_beside(packages: Path, words: list[Any], seconds: float) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    environment["PYTHONPATH"] = os.pathsep.join((str(packages), str(REPO)))
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return done.stdout


ARCHITECTURE: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 1096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


def raw_config(model_dir: str = "tiny", **sections: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "run_dir": "unused",
        "model": {"path": model_dir, "compute_dtype": "float32"},
        "data": {"max_length": 192, "max_prompt_length": 64},
        "sampling": {"batch_size": 8, "max_new_tokens": 32, "max_input_length": 100, "compute_dtype": "float32"},
        "train": {"batch_size": 16},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section
    return raw


def tiny_config(**sections: dict[str, Any]) -> RunConfig:
    return build_config(raw_config(**sections))


def write_model(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE))
    return folder


def eight_devices(hbm_gib: float | None = None) -> Slice:
    return open_local(8, hbm_gib)
