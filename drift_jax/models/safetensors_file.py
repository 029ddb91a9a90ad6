"""A safetensors file that is written piece by piece: the library's own writer wants all tensors in memory at once.

The format: eight bytes with the length of the header (little-endian), the header (JSON, filled up with spaces to a
multiple of eight bytes), and the tensors without gaps, rows first, little-endian.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import final

import numpy as np

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@final
class SafetensorsWriter:
    """Tensors of one dtype, written in any order; the file is whole once every row was written once."""

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]], dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        # transformers refuses files whose metadata do not say which framework the layout is for.
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._shapes, self._starts, end = dict(shapes), {}, 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * self.dtype.itemsize
            self._starts[name] = start
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data_start, self._missing = 8 + len(text), end
        # Without a buffer: what is left in one on a full disk would make closing fail as well.
        self._file = path.open("wb", buffering=0)
        self._write_at(0, memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, first_row: int, rows: np.ndarray) -> None:
        """Rows of a tensor from `first_row` on, whole ones."""
        shape = self._shapes[name]
        if rows.dtype != self.dtype or rows.shape[1:] != tuple(shape[1:]) or first_row + len(rows) > shape[0]:
            raise AssertionError(f"{name}: {rows.dtype} {rows.shape} at row {first_row} of {self.dtype} {shape}")
        bytes_of_row = math.prod(shape[1:]) * self.dtype.itemsize
        start = self._data_start + self._starts[name] + first_row * bytes_of_row
        # As bytes: numpy's bfloat16 is none of the types that a buffer can have.
        self._write_at(start, np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        self._missing -= rows.nbytes

    def _write_at(self, start: int, data: memoryview) -> None:
        self._file.seek(start)
        while data:  # one call writes 2 GiB at most
            data = data[self._file.write(data) :]

    def finish(self) -> None:
        """Returns when all is on the disk."""
        if self._missing:
            raise AssertionError(f"{self._file.name}: {self._missing} bytes were not written")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
