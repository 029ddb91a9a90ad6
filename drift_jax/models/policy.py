"""A model with its weights on a mesh: what the trainer trains and the sampler samples from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from drift_jax.models.architecture import QwenConfig
from drift_jax.models.hf import Progress, load_params, load_qwen_config
from drift_jax.models.qwen import Qwen, declare_qwen
from drift_jax.sharding import Layout


@dataclass(frozen=True)
class Policy:
    """`graphdef` is the code (static under jit), `params` the arrays."""

    config: QwenConfig
    graphdef: Any
    params: dict[str, Any]
    layout: Layout


def load_policy(
    model_dir: Path,
    layout: Layout,
    compute_dtype: str,
    param_dtype: str = "float32",
    progress: Progress | None = None,
) -> Policy:
    """A Hugging Face directory onto a mesh. Raises `ModelError` or `ConfigError`; see `models.hf`."""
    config = load_qwen_config(model_dir)
    graphdef, _ = declare_qwen(config, dtype=jnp.dtype(compute_dtype))
    return Policy(config, graphdef, load_params(model_dir, layout, param_dtype, progress), layout)


def bind(graphdef: Any, params: dict[str, Any]) -> Qwen:
    """The callable model, inside or outside jit."""
    return nnx.merge(graphdef, params)
