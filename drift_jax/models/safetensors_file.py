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
from typing import Any, TypeGuard, final

import numpy as np

from drift_jax.errors import ModelError
from drift_jax.reading import open_file, parse_json, why_not_json

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Of the format; a dtype that is not here is refused by name where tensors are loaded.
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_BITS |= {"U64": 64, "U32": 32, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
_LONGEST_HEADER = 100_000_000  # bytes; the library reads no longer one
_AGAIN = "Download or copy it again."
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def check_header(path: Path) -> None:
    """Holds a file's header to the format, before anything believes it.

    Raises:
      ModelError: the header's length is none that the file can have, it is not JSON that says one thing, or tensors lie
        over each other, leave gaps, or go beyond the end of the file; names file and tensor.
    """
    with open_file(path, ModelError) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ModelError(f"{path} is not a whole safetensors file: {size} bytes on disk. {_AGAIN}")
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise ModelError(
                f"{path} is not a whole safetensors file: its header is to have {length:,} bytes, and {size - 8:,} "
                f"follow (at most {_LONGEST_HEADER:,} are read). {_AGAIN}"
            )
        text = file.read(length)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise ModelError(f"{path}: the header is not JSON: {why_not_json(error)}. {_AGAIN}") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the header must be a JSON object. {_AGAIN}")
    spans = sorted(_span(path, name, entry) for name, entry in header.items() if name != "__metadata__")
    end, before = 0, "the header"
    for first, last, name in spans:
        if first != end:
            what = "lies over" if first < end else "leaves a gap after"
            raise ModelError(f"{path}: tensor {name:.80} (bytes {first} to {last}) {what} {before:.80}. {_AGAIN}")
        end, before = last, name
    if end != size - 8 - length:
        raise ModelError(
            f"{path} is not a whole safetensors file: its tensors have {end:,} bytes, and {size - 8 - length:,} follow "
            f"the header. {_AGAIN}"
        )


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """The bytes of a tensor, from the end of the header on."""
    form = entry if isinstance(entry, dict) else {}
    dtype, shape, span = (form.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
        raise ModelError(
            f"{path}: tensor {name:.80} must have a dtype, a shape and two data_offsets, found {entry!r:.120}. {_AGAIN}"
        )
    first, last = span
    bits = _BITS.get(dtype)
    if last < first or (bits is not None and 8 * (last - first) != math.prod(shape) * bits):
        raise ModelError(
            f"{path}: tensor {name:.80} of dtype {dtype:.20} and shape {shape!r:.80} cannot lie in bytes {first} to "
            f"{last}. {_AGAIN}"
        )
    return first, last, name


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)


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
