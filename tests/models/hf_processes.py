"""One of two processes that load a model together, and write it: started by `test_hf_streaming.py`, not a test itself.

    python hf_processes.py MODE INDEX PORT MODEL OUT

Prints one line of JSON. MODE is `whole`, or what fails on process 1: `disk` or `weights`.
"""

from __future__ import annotations

import errno
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax

REPO = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPO))

DEVICES, PROCESSES = 2, 2


def count_read_bytes() -> list[int]:
    """Sizes of everything that is read of tensors from now on."""
    from drift_jax.models.hf import WeightFiles

    sizes: list[int] = []
    read = WeightFiles.read

    def counting(self: Any, name: str, indices: Any) -> Any:
        for part in read(self, name, indices):
            sizes.append(part.nbytes)
            yield part

    WeightFiles.read = counting  # type: ignore[method-assign]
    return sizes


def share_bytes(params: Any, itemsize: int) -> int:
    """What the devices of this process hold, each part counted once."""
    total = 0
    for array in jax.tree.leaves(params):
        parts = {tuple(str(s) for s in shard.index): shard.data.shape for shard in array.addressable_shards}
        total += sum(math.prod(shape) for shape in parts.values()) * itemsize
    return total


def break_the_disk() -> None:
    """The third piece that this process writes finds no room."""
    from drift_jax.models.safetensors_file import SafetensorsWriter

    write, calls = SafetensorsWriter.write, [0]

    def failing(self: Any, *args: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *args)

    SafetensorsWriter.write = failing  # type: ignore[method-assign]


def main(mode: str, index: int, port: int, model: Path, out: Path) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, index, initialization_timeout=60)
    from drift_jax.config import MeshConfig
    from drift_jax.errors import DriftError
    from drift_jax.models import rows
    from drift_jax.models.hf import load_params
    from drift_jax.models.hf_export import save_hf
    from drift_jax.sharding import build_layout

    rows.PIECE_BYTES = 2**14  # so that a tiny model too is moved in pieces
    row: dict[str, Any] = {}
    start = time.monotonic()
    try:
        sizes = count_read_bytes()
        source = model.with_name("gone") if mode == "weights" and index == 1 else model
        params = load_params(source, build_layout(MeshConfig(1, 2, 2)), "bfloat16")
        row |= {"read": sum(sizes), "share": share_bytes(params, 4)}
        if mode == "disk" and index == 1:
            break_the_disk()
        start = time.monotonic()
        save_hf(params, model, out, "bfloat16", max_shard_gib=1e-4)
        # What a process finds when it comes back from it.
        row |= {"files": sorted(path.name for path in out.iterdir())}
    except DriftError as error:
        row |= {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(row | {"seconds": time.monotonic() - start}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
