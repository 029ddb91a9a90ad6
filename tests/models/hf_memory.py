"""How much memory loading and writing a model takes: a process of its own, started by `test_hf_streaming.py`.

    python hf_memory.py MODEL SMALL_MODEL PARAM_DTYPE PIECE_BYTES

Prints one line of JSON. What the process needs by itself, compiler and all, is there after SMALL_MODEL was loaded and
written; the peaks are what comes on top, in sizes of the parameters.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak)."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(field + ":")[2].split()[0])


def main(model: Path, small: Path, dtype: str, piece_bytes: int) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    from drift_jax.config import MeshConfig
    from drift_jax.models import rows
    from drift_jax.models.hf import load_params
    from drift_jax.models.hf_export import save_hf
    from drift_jax.sharding import build_layout

    layout, out = build_layout(MeshConfig()), model.with_name("out")
    rows.PIECE_BYTES = 2**12
    save_hf(load_params(small, layout, dtype), small, out, "bfloat16")
    rows.PIECE_BYTES = piece_bytes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    params = load_params(model, layout, dtype)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    load = resident_bytes("VmHWM") - before
    save_hf(params, model, out, "bfloat16")
    export = resident_bytes("VmHWM") - before
    shutil.rmtree(out)
    print(json.dumps({"size": size, "load": load / size, "load and export": export / size}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
