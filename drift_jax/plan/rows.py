"""One row of the plan: a mesh, what it needs of a chip, what its devices send, how long an update might take."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from drift_jax.config import RunConfig
from drift_jax.errors import ConfigError
from drift_jax.plan.collectives import Traffic, find_collectives, sum_traffic
from drift_jax.plan.estimate import Estimate, estimate, estimate_from_flops
from drift_jax.plan.hlo import Program, is_passed_on, read_program
from drift_jax.plan.programs import PROGRAMS, Programs, build_programs, resolve_mesh
from drift_jax.plan.slices import Slice

GIB = 2**30
# The compiler names what does not fit in one of these ways, the whole before a part.
_NEEDS = (
    re.compile(r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm"),
    re.compile(r"Total hbm usage >= ([\d.]+)([KMGT]?)"),
    re.compile(r"required for [\w ]+\(([\d.]+)([KMGT]?)i?B?\) exceeds"),
    re.compile(r"[Oo]ut of memory[^\d]*allocat\w+ ([\d.]+)([KMGT]?)i?B"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Parts(NamedTuple):
    """What the train step's memory on a chip is made of, in GiB."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float  # what the layers' forward pass keeps for the backward pass
    temporaries: float  # the rest


@dataclass(frozen=True)
class Row:
    """What is known of one choice of mesh, accumulation and remat."""

    mesh: dict[str, int]
    accumulation_steps: int
    remat: str
    fits: bool
    limit_gib: float | None
    hbm_gib_per_chip: float | None = None  # of the largest program; None: no program was compiled
    programs: dict[str, float] = field(default_factory=dict)  # GiB per chip of each
    parts: Parts | None = None
    pairs: int = 0
    micro_batches: int = 0
    row_length: int = 0
    tokens_per_step: int = 0
    collectives: tuple[Traffic, ...] = ()  # of an update
    estimated_step_s: float | None = None
    estimate: Estimate | None = None
    bound_step_s: float | None = None  # FLOPs that the pairs need at the chips' peak
    compile_s: float = 0.0
    about: str = ""  # where the figures come from
    note: str = ""  # why it does not fit

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded to what they are worth."""
        row = dataclasses.asdict(self) | {"parts": self.parts and self.parts._asdict()}
        return _round(row)


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3) if abs(value) < 1e6 else round(value)
    if isinstance(value, dict):
        return {key: _round(inner) for key, inner in value.items()}
    return [_round(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class Compiled(NamedTuple):
    """A compiled program, or what it would need."""

    gib: float | None  # per chip; None: the compiler does not say
    compiled: jax.stages.Compiled | None  # None: it does not fit
    seconds: float
    words: str = ""  # of the compiler, where it does not fit


def plan_row(
    config: RunConfig,
    architecture: dict[str, Any],
    where: Slice,
    names: Sequence[str] = PROGRAMS,
    on_program: Callable[[str], None] = lambda name: None,
    on_text: Callable[[str, str], None] | None = None,
) -> Row:
    """Compiles the programs of a config for a slice. What cannot be split, or does not fit, is a row that says so.

    Args:
      architecture: as in `config.json`.
      names: which programs; after one that does not fit the rest are left out.
      on_program: called after each compilation.
      on_text: gets the name of each compiled program and its text.
    """
    sizes = {axis: size for axis, size in dataclasses.asdict(config.mesh).items() if isinstance(size, int)}
    row = Row(sizes, config.train.accumulation_steps, config.model.remat, False, where.chip.limit_gib, about=where.note)
    try:
        row = dataclasses.replace(row, mesh=resolve_mesh(config, where.devices))
        programs = build_programs(config, architecture, where)
        row = dataclasses.replace(row, **_describe(programs, where))
        for name in names:
            done = compile_program(programs, name)
            row = _add_program(row, name, done)
            on_program(name)
            if done.compiled is None:
                break
            text = done.compiled.as_text() if name == "train" or on_text else None
            if on_text and text:
                on_text(name, text)
            if name == "train" and text:
                row = dataclasses.replace(row, **_read_step(programs, where, done.compiled, text))
    except ConfigError as error:
        return dataclasses.replace(row, fits=False, note=_join(row.note, f"cannot be split: {error}"))
    return _judge(row)


def compile_program(programs: Programs, name: str) -> Compiled:
    start = time.monotonic()
    try:
        compiled = programs.compile(name)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(read_need(str(error)), None, time.monotonic() - start, str(error).splitlines()[0])
    return Compiled(total_bytes(compiled) / GIB, compiled, time.monotonic() - start)


def total_bytes(compiled: jax.stages.Compiled) -> int:
    """Of a chip's memory: arguments, results that are not donated arguments, and temporaries."""
    m = compiled.memory_analysis()
    assert m is not None
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def read_need(message: str) -> float | None:
    """GiB that the compiler says a program would need; it may only speak of a part of it."""
    for pattern in _NEEDS:
        found = pattern.search(message)
        if found:
            return float(found[1]) * _UNITS[found[2]] / GIB
    return None


def _describe(programs: Programs, where: Slice) -> dict[str, Any]:
    batch = programs.batch
    return {
        "pairs": programs.config.train.batch_size,
        "micro_batches": int(batch.micro_batches),
        "row_length": batch.ids.shape[2],
        "tokens_per_step": programs.tokens,
        "bound_step_s": programs.step_flops / (len(where.devices) * where.chip.peak_flops),
    }


def _add_program(row: Row, name: str, done: Compiled) -> Row:
    programs = row.programs | ({name: done.gib} if done.gib is not None else {})
    note = row.note
    if done.compiled is None:
        needs = f"{done.gib:.2f} of {row.limit_gib:.2f} GiB" if done.gib and row.limit_gib else done.words
        note = _join(note, f"{name} does not fit: needs {needs}")
    return dataclasses.replace(
        row,
        fits=done.compiled is not None,
        programs=programs,
        hbm_gib_per_chip=max(programs.values(), default=None),
        compile_s=row.compile_s + done.seconds,
        note=note,
    )


def _judge(row: Row) -> Row:
    """A compiler that knows no limit compiles what does not fit."""
    if row.limit_gib is None or row.hbm_gib_per_chip is None or row.hbm_gib_per_chip <= row.limit_gib:
        return row
    if "does not fit" in row.note:
        return row
    over = max(row.programs, key=lambda name: row.programs[name])
    text = f"{over} does not fit: needs {row.hbm_gib_per_chip:.2f} of {row.limit_gib:.2f} GiB"
    return dataclasses.replace(row, fits=False, note=_join(row.note, text))


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _read_step(programs: Programs, where: Slice, compiled: jax.stages.Compiled, text: str) -> dict[str, Any]:
    """What the text of the compiled train step says."""
    program = read_program(text)
    collectives = find_collectives(program, programs.mesh_sizes, programs.count_region)
    cost = estimate(program, where.chip, collectives, programs.kernel_flops, programs.count_region)
    if cost is None:
        # Without cycles: what the pairs need, with the forward pass of a layer made again where it is not kept.
        again = 1.0 if programs.config.model.remat in ("none", "dots") else 4 / 3
        seconds = estimate_from_flops(again * programs.step_flops / len(where.devices), collectives, where.chip)
    else:
        seconds = cost.seconds
    return {
        "collectives": tuple(sum_traffic(collectives)),
        "estimated_step_s": seconds,
        "estimate": cost,
        "parts": _split_memory(programs, program, total_bytes(compiled)),
    }


def _split_memory(programs: Programs, program: Program, total: int) -> Parts:
    state = programs.trainer.abstract_state
    gradient = jnp.dtype(programs.config.train.gradient_dtype)
    parameters, optimizer = _bytes_of(state.params), _bytes_of(state.opt_state)
    gradients = _bytes_of(state.params, gradient)
    activations = kept_bytes(program, programs.architecture.layers)
    rest = max(0, total - parameters - optimizer - gradients - activations)
    return Parts(*(size / GIB for size in (parameters, optimizer, gradients, activations, rest)))


def _bytes_of(tree: Any, dtype: Any = None) -> int:
    """Of the arrays of a tree on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(dtype or x.dtype).itemsize for x in leaves)


def kept_bytes(program: Program, layers: int) -> int:
    """What the layers' forward pass keeps in a chip's memory, by the shapes that its loop stacks up.

    Where the layers are not a loop (`model.scan_layers`) it cannot be told from other temporaries: 0.
    """
    for visit in program.walk():
        loop = visit.instruction
        if loop.opcode != "while" or "transpose(" in loop.op_name:
            continue
        if program.trip_count(loop, visit.computation) != layers:
            continue
        body = program.computations[loop.attribute("body") or ""]
        stacked = [
            shape.bytes
            for index, shape in enumerate(loop.shapes)
            if shape.dims[:1] == (layers,) and not shape.on_host and not is_passed_on(body, index)
        ]
        if stacked:
            return sum(stacked)
    return 0
