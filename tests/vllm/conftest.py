"""Real vLLM servers, started once for all tests. `make test-vllm` names the interpreter that has vLLM."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from drift_jax.config import RunConfig, build_config
from drift_jax.models.hf import load_qwen_config
from drift_jax.sampling.server import SERVED_NAME, VllmServer
from drift_jax.sampling.vllm import Served
from tests.tiny_pairs import build_tiny_policy

PYTHON = os.environ.get("DRIFT_VLLM_PYTHON")
# Several servers are there at once, beside other tests: threads that do not spin, and 1 GiB for keys and values.
OWN_ENV = {"OMP_WAIT_POLICY": "passive", "VLLM_CPU_KVCACHE_SPACE": "1"}
HERE = Path(__file__).parent
QUIET = Console(file=io.StringIO(), width=200)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if not PYTHON:
                item.add_marker(pytest.mark.skip(reason="needs the environment that `make test-vllm` builds and names"))


def make_config(model: Path, **sections: dict[str, Any]) -> RunConfig:
    raw: dict[str, Any] = {
        "run_dir": str(model.parent / "run"),
        "model": {"path": str(model), "compute_dtype": "float32"},
        "sampling": {
            "engine": "vllm",
            "compute_dtype": "float32",
            "max_input_length": 192,
            "max_new_tokens": 12,
        },
        "vllm": {"python": PYTHON, "device": "cpu", "env": {"VLLM_SERVER_DEV_MODE": "1"} | OWN_ENV},
    }
    for name, keys in sections.items():
        raw[name] = raw.get(name, {}) | keys
    return build_config(raw)


class Running(NamedTuple):
    """A server, and the model directory that it was started with."""

    server: VllmServer
    model_dir: Path

    def connect(self) -> Served:
        return Served(self.server.connect(), SERVED_NAME)

    @property
    def url(self) -> str:
        return self.server.connect().base_url

    @property
    def key(self) -> str:
        return self.server._key


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tied, untied: tiny policies; *_new: the same with other weights, as another iteration would leave them."""
    base = tmp_path_factory.mktemp("models")
    for name, tied, sizes in (("untied", False, {}), ("tied", True, {})):
        for suffix in ("", "_new"):
            folder = build_tiny_policy(base / f"{name}{suffix}", tied=tied, hidden_size=128, **sizes)
            if suffix:
                shift_weights(folder)
    # What a server must not follow.
    path = base / "untied" / "generation_config.json"
    greedy = {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 5.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | greedy))
    return base


def shift_weights(model_dir: Path) -> None:
    """Every weight a little different."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(1)
    tensors = load_file(model_dir / "model.safetensors")
    moved = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(moved, model_dir / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def servers(
    models: Path, demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Running]]:
    """Servers of demo model, untied and tied; started together, since most of a start is imports on one core.

    That of the demo model has room for the questions of judges, which are longer than prompts.
    """
    logs = tmp_path_factory.mktemp("logs")
    dirs = {"demo": demo_model_dir, "untied": models / "untied", "tied": models / "tied"}
    rooms = {"demo": {"max_model_len": 2048}}

    def start(name: str) -> Running:
        model_dir = dirs[name]
        config = make_config(model_dir, vllm=rooms.get(name, {}))
        server = VllmServer(config, load_qwen_config(model_dir), model_dir, logs / f"{name}.log")
        stack.callback(server.stop)
        server.start(QUIET)
        return Running(server, model_dir)

    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        yield dict(zip(dirs, pool.map(start, dirs), strict=True))
