"""Writes random bfloat16 weights in the shape of a published model, for benchmarks without a download.

    python scripts/make_random_model.py qwen2.5-7b [--out .cache/random-qwen2.5-7b]

The weights stream: little of the model is ever in memory. They are noise, but no two tensors are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # runs from a checkout that is not installed

import jax  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

from drift_jax.models.architecture import qwen_config_from_hf  # noqa: E402
from drift_jax.models.hf_export import divide_into_files, weight_index  # noqa: E402
from drift_jax.models.published import ARCHITECTURES  # noqa: E402
from drift_jax.models.qwen import declare_qwen, is_declared  # noqa: E402
from drift_jax.models.safetensors_file import SafetensorsWriter  # noqa: E402

_NUMBERS = 2**24 + 9  # are made and used again and again; nothing in a model has a size of this kind


def make_random_model(config: Mapping[str, Any], out: Path, max_shard_gib: float = 4.0) -> None:
    """Writes the directory; one that is there already stays."""
    if (out / "config.json").exists():
        print(f"{out} is there already", file=sys.stderr)
        return
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    _, declared = declare_qwen(qwen_config_from_hf(dict(config)))
    leaves = jax.tree.leaves(declared, is_leaf=is_declared)
    files = divide_into_files(leaves, "bfloat16", int(max_shard_gib * 2**30))
    noise = (0.02 * np.random.default_rng(0).standard_normal(_NUMBERS, np.float32)).astype(ml_dtypes.bfloat16)
    ring, at = np.concatenate([noise, noise]), 0
    for name, shapes in files.items():
        with SafetensorsWriter(out / name, shapes, "bfloat16") as writer:
            for tensor, shape in shapes.items():
                at = _write_tensor(writer, tensor, shape, ring, at)
            writer.finish()
    if len(files) > 1:
        index = json.dumps(weight_index(files, "bfloat16"), indent=2) + "\n"
        (out / "model.safetensors.index.json").write_text(index)
    # Last: a directory with a config is whole.
    (out / "config.json").write_text(json.dumps(dict(config) | {"dtype": "bfloat16"}, indent=2) + "\n")
    print(f"wrote {out} in {time.monotonic() - start:.0f} s", file=sys.stderr)


def _write_tensor(writer: SafetensorsWriter, name: str, shape: tuple[int, ...], ring: np.ndarray, at: int) -> int:
    """A tensor from place `at` of the ring on. Returns where the next one starts."""
    size, width = len(ring) // 2, math.prod(shape[1:])
    rows_at_once = max(1, size // width)
    for first in range(0, shape[0], rows_at_once):
        count = min(rows_at_once, shape[0] - first) * width
        numbers = ring[at : at + count]
        if "norm" in name:
            numbers = numbers + np.ones((), ring.dtype)
        writer.write(name, first, numbers.reshape(-1, *shape[1:]))
        at = (at + count) % size
    return at


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path, help="default: .cache/random-SHAPE")
    args = parser.parse_args()
    make_random_model(ARCHITECTURES[args.shape], args.out or REPO / ".cache" / f"random-{args.shape}")
