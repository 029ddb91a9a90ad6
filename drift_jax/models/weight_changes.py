"""How many weights of a policy differ, as they are written, from those of the model that it came from.

In bfloat16 a weight takes no change of less than half of its spacing (a 256th of it at most): what an export has
rounded away is not in the policy that is served, nor in the one that the next stage starts from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import final

import numpy as np
from safetensors import SafetensorError

from drift_jax.errors import ModelError
from drift_jax.models.hf import WeightFiles

_CHUNK_BYTES = 2**21  # read at a time: pages of a mapped file count as memory of this process


@final
class WeightChanges:
    """Counts in the pieces that are written; of several processes each counts in its own."""

    def __init__(self, before: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes`: of all tensors that are written, by name. Beside another model, or none, nothing is counted."""
        self.changed, self.weights = 0, 0
        self._files: WeightFiles | None = None
        with contextlib.suppress(ModelError):  # `drift export` may be given config and tokenizer alone
            files = WeightFiles.open(before)
            if all(files.shapes.get(name) == shape for name, shape in shapes.items()):
                self._files = files

    @property
    def known(self) -> bool:
        """Whether all pieces so far were counted."""
        return self._files is not None

    def count(self, name: str, first_row: int, rows: np.ndarray) -> None:
        """Takes rows of a tensor, as they are written; the model before is rounded to the same dtype."""
        bits = np.dtype(f"u{rows.dtype.itemsize}")  # numpy compares its own types many times faster than bfloat16
        step = max(1, _CHUNK_BYTES // max(1, rows[:1].nbytes))
        for start in range(0, len(rows), step):
            if self._files is None:
                return
            ours = np.ascontiguousarray(rows[start : start + step])
            place = slice(first_row + start, first_row + start + len(ours))
            try:
                (before,) = self._files.read(name, [(place,)])
            except (OSError, SafetensorError):
                self._files = None  # it is gone: then there is nothing to say
                return
            before = before.astype(ours.dtype, copy=False)
            self.changed += int(np.count_nonzero(before.view(bits) != ours.view(bits)))
            self.weights += ours.size
