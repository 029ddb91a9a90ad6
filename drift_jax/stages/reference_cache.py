"""Reference log-probs that runs share: of one reference, the same pairs and the same batches they are the same bits.

A sweep over beta, the learning rate or any other key of the loss and the optimizer starts from one policy and one file
of pairs, so its runs differ in nothing that their reference passes see. The first of them leaves its log-probs in
`train.reference_cache`, under a hash of all that made them; the others take them from there. Tokens alone would be too
weak a name: in bfloat16 a log-prob depends on the shape of its batch and on its neighbours by up to a nat, and the
policy would no longer equal its reference before the first update.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import jax
import numpy as np

from drift_jax.config import RunConfig
from drift_jax.data.batches import PairLoader
from drift_jax.data.pairs import TokenizedPair
from drift_jax.errors import StageError
from drift_jax.files import atomic_writer
from drift_jax.stages.reference import read_ref_logps, token_hashes
from drift_jax.train import Trainer

_FORMAT = 1  # part of every name; raise it when what is stored, or how it is computed, changes
# How the pass is packed. What of the config shapes tokens is in the tokens, what shapes weights in the model's hash.
_KEYS = ("batch_size", "accumulation_steps", "tokens_per_device", "eval_batch_size", "master_dtype", "seed")


@final
class ReferenceCache:
    """One file of `train.reference_cache`, used by one process: fetched before the pass, or stored after it.

    What is wrong with it, or with the directory, is no reason to end a run that can do without: `warn` says it.
    """

    def __init__(self, directory: Path, key: str, pairs: list[TokenizedPair], warn: Callable[[str], None]) -> None:
        self.path = directory / f"reference.{key}.npz"
        self._pairs, self._warn = pairs, warn

    def fetch(self, path: Path) -> bool:
        """Copies the log-probs to `path`; False where there are none that are whole and of these pairs."""
        try:
            if read_ref_logps(self.path, self._pairs) is None:
                return False
            _copy(self.path, path)
        except (StageError, OSError) as error:
            self._warn(f"train.reference_cache: {error} The reference pass runs instead.")
            return False
        return True

    def store(self, path: Path) -> None:
        """Copies the log-probs from `path`, for other runs; none where one is not finite, which is no run's example."""
        try:
            ref = read_ref_logps(path, self._pairs)
            if ref is None or not np.isfinite(ref).all():
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _copy(path, self.path)
        except (StageError, OSError) as error:
            self._warn(f"train.reference_cache: nothing is kept there for other runs: {error}")


def reference_key(
    config: RunConfig, trainer: Trainer, loader: PairLoader, held_out: Sequence[TokenizedPair], model_hash: str
) -> str:
    """A sha256 of all that reference log-probs depend on, to their last bit.

    Args:
      loader: of the pairs to train on.
      model_hash: of the reference (`Manifest.model_hash`).
    """
    setup, devices = trainer.setup, trainer.layout.mesh.devices
    values: dict[str, Any] = {
        "format": _FORMAT,
        "jax": jax.__version__,
        "model": [model_hash, config.model.compute_dtype],
        "program": [setup.attention.name, setup.scan_layers, setup.remat],
        "devices": [devices.flat[0].platform, devices.flat[0].device_kind, jax.process_count()],
        "mesh": [sorted(trainer.layout.sizes.items()), sorted(trainer.layout.rules.items()), trainer.layout.strategy],
        "train": {key: getattr(config.train, key) for key in _KEYS},
        "max_length": config.data.max_length,
        "shapes": [list(shape) for shape in loader.shapes],
        "pairs": [token_hashes(loader.pairs).tolist(), token_hashes(held_out).tolist()],
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file, atomic_writer(target, "wb") as copy:
        shutil.copyfileobj(file, copy)
