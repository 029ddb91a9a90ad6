"""Which device holds which part of an array, and how a mesh is laid out on lines of cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from jax.sharding import NamedSharding

from drift_jax.sharding import Dims, Layout

# A mesh is drawn on more lines than this only where they are too short for it.
_FEW_LINES = 8


@dataclass(frozen=True)
class Drawing:
    """A cell per device, in the order of the mesh: what stands in it, and which of `counts` parts it is."""

    name: str
    legend: str
    labels: tuple[str, ...]
    parts: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]


def draw_array(layout: Layout, name: str, dims: Dims, shape: tuple[int, ...], sharding: NamedSharding) -> Drawing:
    """The part of an array on each device, counted from 0 along each dim that is split."""
    shard = sharding.shard_shape(shape)
    split = [i for i, size in enumerate(shape) if shard[i] < size]
    counts = tuple(shape[i] // shard[i] for i in split)
    places = sharding.devices_indices_map(shape)
    parts = [tuple((places[device][i].start or 0) // shard[i] for i in split) for device in layout.mesh.devices.flat]
    if not split:
        return Drawing(name, "every device holds all of it", ("all",) * len(parts), tuple(parts), counts)
    words = []
    for i, count in zip(split, counts, strict=True):
        entry = sharding.spec[i]
        axes = entry if isinstance(entry, str) else " x ".join(entry or ())
        words.append(f"{dims[i]} in {count} parts ({axes})")
    labels = tuple(".".join(map(str, part)) for part in parts)
    return Drawing(name, ", ".join(words), labels, tuple(parts), counts)


def draw_devices(layout: Layout) -> Drawing | None:
    """The ids of the devices by host; None where one host has them all and they are counted in the mesh's order."""
    devices = list(layout.mesh.devices.flat)
    ids = [device.id for device in devices]
    hosts = sorted({device.process_index for device in devices})
    if len(hosts) == 1 and ids == sorted(ids):
        return None
    parts = tuple((hosts.index(device.process_index),) for device in devices)
    return Drawing("devices", "the number of each, a colour per host", tuple(map(str, ids)), parts, (len(hosts),))


class Line(NamedTuple):
    """Cells first..last of a mesh, and where on the mesh that is."""

    label: str
    first: int
    last: int  # inclusive


def lay_out(sizes: Mapping[str, int], cell: int, width: int) -> list[Line]:
    """Lines of cells, `cell` wide each, that fit with their labels into `width`.

    A line is the inner axes of the mesh, or several turns or a part of them: no line breaks off within one and goes
    on in the next.

    Args:
      sizes: devices per axis, outermost first.
    """
    fitting = max(1, width // cell)
    while True:
        lines = _cut({axis: size for axis, size in sizes.items() if size > 1}, fitting)
        label = max(len(line.label) for line in lines) + 1
        widest = max(line.last - line.first + 1 for line in lines)
        if label + widest * cell <= width or widest == 1:
            return lines
        fitting = max(1, min(widest - 1, (width - label) // cell))


def _cut(sizes: Mapping[str, int], fitting: int) -> list[Line]:
    shape = tuple(sizes.values())
    outer, inner = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    if inner <= fitting:
        turns = [n for n in range(1, outer + 1) if outer % n == 0 and inner * n <= fitting]
        columns = inner * next((n for n in turns if outer // n <= _FEW_LINES), turns[-1])
        starts = list(range(0, outer * inner, columns))
    else:
        columns = max(n for n in range(1, fitting + 1) if inner % n == 0)
        columns = columns if 2 * columns > fitting else fitting
        starts = [turn * inner + start for turn in range(outer) for start in range(0, inner, columns)]
    ends = [*(start - 1 for start in starts[1:]), outer * inner - 1]
    places = list(product(*map(range, shape)))
    return [
        Line(_label(sizes, places[first : last + 1]), first, last) for first, last in zip(starts, ends, strict=True)
    ]


def _label(sizes: Mapping[str, int], places: Sequence[tuple[int, ...]]) -> str:
    """The axes of which a line has only a part."""
    words = []
    for (axis, size), along in zip(sizes.items(), zip(*places, strict=True), strict=True):
        low, high = min(along), max(along)
        if high - low + 1 < size:
            words.append(f"{axis} {low}" if low == high else f"{axis} {low}-{high}")
    return ", ".join(words)
