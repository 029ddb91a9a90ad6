"""Parameters, gradients and updates by the names and in the shapes that transformers has for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from drift_jax.models.architecture import QwenConfig
from drift_jax.models.hf_layout import hf_names, hf_shape, is_stacked, view_as_ours
from drift_jax.models.qwen import declare_qwen, is_declared


def to_hf_tensors(params: dict[str, Any], config: QwenConfig) -> dict[str, np.ndarray]:
    """Of a dict with the structure of the parameters the tensors in float32."""
    _, declared = declare_qwen(config)
    tensors = {}
    for leaf, array in zip(jax.tree.leaves(declared, is_leaf=is_declared), jax.tree.leaves(params), strict=True):
        layers = np.asarray(array) if is_stacked(leaf) else np.asarray(array)[None]
        for name, layer in zip(hf_names(leaf), layers, strict=True):
            tensors[name] = np.empty(hf_shape(leaf), np.float32)
            view_as_ours(leaf, tensors[name], tuple((0, size) for size in layer.shape))[...] = layer
    return tensors


def read_hf_tensors(model_dir: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, read by the safetensors library."""
    return {k: v for path in sorted(model_dir.glob("*.safetensors")) for k, v in load_file(path).items()}
