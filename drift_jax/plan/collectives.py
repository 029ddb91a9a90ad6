"""What the devices send each other in a compiled program: kind, bytes, mesh axes, how often.

The bytes of a collective are those of one device, whichever is larger of what goes in and what comes out: the result
of an all-gather, what a reduce-scatter takes, and for the others both. It is counted once although it may be written
several times: as `-start` and `-done`, and on TPU as start, steps and end of a fused collective, which have one
channel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from drift_jax.plan.hlo import CountRegion, Instruction, Program, Region, Shape, Visit, count_once, read_shapes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_EXPLICIT = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_BY_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{} ]*)\}\}?")


@dataclass(frozen=True)
class Collective:
    """One collective of a program, where it runs."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]  # what each device has afterwards
    bytes: int  # of one execution on one device
    groups: tuple[tuple[int, ...], ...]  # of devices; for permutes the (source, target) pairs
    axes: tuple[str, ...]  # mesh axes along which the devices of a group differ; empty: nobody sends anything
    executions: float
    regions: tuple[Region, ...]
    op_name: str
    is_async: bool  # other work may go on meanwhile
    computation: str

    @property
    def axis(self) -> str:
        return "+".join(self.axes) or "none"

    @property
    def total_bytes(self) -> float:
        return self.bytes * self.executions


def find_collectives(program: Program, mesh: Mapping[str, int], count: CountRegion = count_once) -> list[Collective]:
    """All collectives of a program.

    Args:
      mesh: axis -> size, in the order of the mesh: device i of the program is element i of the mesh.
      count: how often loops of unknown length turn and branches are taken.
    """
    fused: dict[tuple[str, str], list[Collective]] = {}
    found: list[Collective] = []
    for visit in program.walk(count):
        opcode = visit.instruction.opcode
        kind = opcode.removesuffix("-start")
        if kind not in KINDS or opcode.endswith("-done"):
            continue
        collective = _read(visit, kind, mesh)
        channel = visit.instruction.attribute("channel_id")
        if "async_collective_fusion_config" in visit.instruction.attributes and channel:
            fused.setdefault((kind, channel), []).append(collective)
        else:
            found.append(collective)
    # Steps of a fused collective may be spread over the turns of a loop; its start and end are outside.
    return found + [min(parts, key=lambda part: part.executions) for parts in fused.values()]


def _read(visit: Visit, kind: str, mesh: Mapping[str, int]) -> Collective:
    instruction, computation = visit.instruction, visit.computation
    taken = sum(computation.instructions[name].bytes for name in instruction.operands)
    shapes, size = instruction.shapes, instruction.bytes
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # The result is (what went in, what comes out, and perhaps two numbers).
        shapes = tuple(shape for shape in _elements(instruction)[1] if shape.dims)
        size = sum(shape.bytes for shape in shapes)
    devices = math.prod(mesh.values())
    groups = read_groups(instruction, devices)
    return Collective(
        instruction.name,
        kind,
        shapes,
        max(taken, size),
        groups,
        name_axes(groups, mesh),
        visit.executions,
        visit.regions,
        instruction.op_name,
        instruction.opcode.endswith("-start") or "async_collective_fusion_config" in instruction.attributes,
        computation.name,
    )


def _elements(instruction: Instruction) -> list[tuple[Shape, ...]]:
    """The arrays of each element of a tuple."""
    parts, depth, start, text = [], 0, 1, instruction.type
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(read_shapes(text[start:place]))
            start = place + 1
    return parts


def read_groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices, in any of the ways they are written; all devices where none are."""
    text = instruction.attributes
    pairs = _PAIRS.search(text)
    if pairs:
        return _number_lists(pairs[1])
    iota = _IOTA.search(text)
    if iota:
        ids = _arrange(_numbers(iota[2]), iota[3]).reshape(_numbers(iota[1]))
        return tuple(map(tuple, ids.reshape(-1, ids.shape[-1]).tolist()))
    mesh = _BY_MESH.search(text)
    if mesh:
        return _groups_by_mesh(mesh[1], mesh[2], mesh[3])
    explicit = _EXPLICIT.search(text)
    if explicit and explicit[1]:
        return _number_lists(explicit[1])
    return (tuple(range(devices)),)


def _groups_by_mesh(axes: str, devices: str | None, members: str) -> tuple[tuple[int, ...], ...]:
    """`mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(1)2}`: groups along axes, or parts of axes, of a mesh."""
    names, sizes = zip(*((name, int(size)) for name, size in re.findall(r"([^,=]+)=(\d+)", axes)), strict=True)
    ids = np.arange(math.prod(sizes))
    if devices:
        iota = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", devices)
        ids = _arrange(_numbers(iota[1]), iota[2]) if iota else np.array(_numbers(devices))
    # An axis of which only a part is used is cut into (before, part, behind).
    cut: list[int] = []
    chosen: list[int] = []
    wanted = re.findall(r"([^,:]+)(?::\((\d+)\)(\d+))?(?:,|$)", members)
    for name, size in zip(names, sizes, strict=True):
        parts = sorted((int(before), int(part)) for other, before, part in wanted if other == name and part)
        if any(other == name and not part for other, _, part in wanted):
            chosen.append(len(cut))
            cut.append(size)
            continue
        done = 1
        for before, part in parts:
            cut.append(before // done)
            chosen.append(len(cut))
            cut.append(part)
            done = before * part
        cut.append(size // done)
    grid = ids.reshape(cut)
    rest = [place for place in range(len(cut)) if place not in chosen]
    width = math.prod(cut[place] for place in chosen)
    return tuple(map(tuple, grid.transpose(rest + chosen).reshape(-1, width).tolist()))


def _arrange(sizes: Sequence[int], order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _number_lists(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(_numbers(group)) for group in re.findall(r"[\d, ]+", text.replace("},{", "}{")) if group.strip())


def name_axes(groups: Iterable[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ, in the order of the mesh."""
    grid = np.indices(tuple(mesh.values())).reshape(len(mesh), -1)
    varying = np.zeros(len(mesh), bool)
    for group in groups:
        places = grid[:, list(group)]
        varying |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, varies in zip(mesh, varying, strict=True) if varies)


@dataclass(frozen=True)
class Traffic:
    """A kind of collective along some mesh axes, over a whole execution of the program."""

    kind: str
    axis: str  # mesh axes, joined by "+"
    count: float  # executions
    bytes: float  # of one device


def sum_traffic(collectives: Iterable[Collective]) -> list[Traffic]:
    """The table of kinds and axes, the largest first; what nobody sends is left out."""
    sums: dict[tuple[str, str], list[float]] = {}
    for collective in collectives:
        if not collective.axes:
            continue
        entry = sums.setdefault((collective.kind, collective.axis), [0.0, 0.0])
        entry[0] += collective.executions
        entry[1] += collective.total_bytes
    rows = [Traffic(kind, axis, count, size) for (kind, axis), (count, size) in sums.items() if count]
    return sorted(rows, key=lambda row: -row.bytes)
