"""One process of several that restore a checkpoint together and compare the part that each has; see test_checkpoint.py.

python -m tests.restore_part CHECKPOINTS EXPECTED.npz COORDINATOR COUNT INDEX
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from drift_jax.checkpoint import Checkpointer
from drift_jax.distributed import Processes, start_processes
from tests.test_checkpoint import make_trainer, restore


def main(checkpoints: str, expected: str, coordinator: str, count: str, index: str) -> None:
    start_processes(Processes("on", coordinator, int(count), int(index)))
    trainer = make_trainer((2, 1, jax.device_count() // 2))
    with Checkpointer(Path(checkpoints), keep=2) as checkpointer:
        step = checkpointer.latest_step()
        assert step is not None
        leaves = jax.tree.leaves(restore(checkpointer, trainer, step))
    parts = 0
    with np.load(expected) as whole:
        for name, leaf in enumerate(leaves):
            assert leaf.sharding.mesh.shape == trainer.layout.mesh.shape
            for shard in leaf.addressable_shards:
                part = whole[str(name)][shard.index]
                assert shard.data.dtype == part.dtype
                np.testing.assert_array_equal(np.asarray(shard.data), part)
                parts += 1
    print(f"process {jax.process_index()} of {jax.process_count()}: {parts} parts of {len(leaves)} arrays")


if __name__ == "__main__":
    main(*sys.argv[1:])
