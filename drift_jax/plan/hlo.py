"""A compiled program as text (`compiled.as_text()`), read into what runs and how often. Nothing of JAX is needed here.

The compilers of CPU, GPU and TPU write the same language with other attributes. What this reader assumes:

1. A computation runs as often as its call sites do. Called are the body and the condition of a `while`, the branches
   of a `conditional`, and what `fusion`, `call` and `async-start` name. Functions of two numbers (the `to_apply` of a
   reduction, a sort or a scatter) are not visited.
2. A loop turns as often as the compiler says (`known_trip_count`: CPU and GPU), or as its condition says: a counter
   below a constant, from a constant, by an addition, or by 1 where the addition is fused with others (TPU). Else its
   count is known at run time only, and the caller gives it: `Region` says where in the source the loop was written.
3. All branches of a conditional are visited; the caller says how often each is taken, 1 if it does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NUMBERED = re.compile(r"^(\d+) (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_FRAME_SECTIONS = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_CALLS = {
    "while": ("condition", "body"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "fusion": ("calls",),
    "call": ("to_apply",),
    "async-start": ("calls",),
}
_SAME_VALUE = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start")
_MEMORY_OF_HOST = "S(5)"


class Shape(NamedTuple):
    """An array of a type; `on_host` when its layout puts it in the host's memory."""

    dtype: str
    dims: tuple[int, ...]
    on_host: bool = False

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.dims) * _bits(self.dtype) / 8)


def _bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 0


def read_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, those of a (nested) tuple one after the other."""
    shapes = []
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        shapes.append(Shape(dtype, sizes, _MEMORY_OF_HOST in layout))
    return tuple(shapes)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # what stands in the brackets, for constants and parameters
    attributes: str

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return read_shapes(self.type)

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    def called(self) -> tuple[str, ...]:
        """Names of the computations that run as part of this instruction."""
        names: list[str] = []
        for key in _CALLS.get(self.opcode, ()):
            found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
            names += _NAME.findall(found[1]) if found else []
        return tuple(names)

    def attribute(self, key: str) -> str | None:
        """The name or number after `key=`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """JAX's path to the operation, such as `jit(train_step)/while/body/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate for one execution; 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclass(frozen=True)
class Region:
    """A loop, or a conditional, as a part of the program that runs more or less often than what is around it."""

    name: str
    op_name: str
    sources: tuple[str, ...]  # source files of its stack frames, innermost first
    is_loop: bool
    known: int | None  # how often, when the program says so
    count: float  # how often it runs each time that it is reached
    computation: str  # body of the loop or branch


class Visit(NamedTuple):
    """An instruction where it runs."""

    instruction: Instruction
    computation: Computation
    executions: float
    regions: tuple[Region, ...]  # around it, outermost first


# How often an unknown loop turns, or a branch is taken.
CountRegion = Callable[[Region], float]


def count_once(region: Region) -> float:
    return 1.0


@dataclass(frozen=True)
class Program:
    """All computations, and where their instructions come from."""

    entry: str
    computations: dict[str, Computation]
    frames: dict[str, dict[int, str]] = field(default_factory=dict)

    def walk(self, count: CountRegion = count_once) -> Iterator[Visit]:
        """Every instruction that runs, with how often, those of fused and called computations included."""
        yield from self._walk(self.computations[self.entry], 1.0, (), count, None)

    def _walk(
        self,
        computation: Computation,
        executions: float,
        regions: tuple[Region, ...],
        count: CountRegion,
        scope: _Scope | None,
    ) -> Iterator[Visit]:
        for instruction in computation.instructions.values():
            yield Visit(instruction, computation, executions, regions)
            for name in instruction.called():
                if name not in self.computations:
                    continue
                inner, times, around, within = self.computations[name], executions, regions, scope
                if instruction.opcode in ("while", "conditional"):
                    region = self._region(instruction, computation, name, count, scope)
                    times, around = executions * region.count, (*regions, region)
                    within = _Scope(instruction, computation, scope) if region.is_loop else None
                elif instruction.opcode == "call":
                    within = None
                yield from self._walk(inner, times, around, count, within)

    def _region(
        self, instruction: Instruction, computation: Computation, name: str, count: CountRegion, scope: _Scope | None
    ) -> Region:
        is_loop = instruction.opcode == "while"
        known = self.trip_count(instruction, computation, scope) if is_loop else None
        region = Region(instruction.name, instruction.op_name, self.sources(instruction), is_loop, known, 1.0, name)
        times = float(known) if known is not None else count(region)
        return Region(region.name, region.op_name, region.sources, is_loop, known, times, name)

    def sources(self, instruction: Instruction) -> tuple[str, ...]:
        """Files of an instruction's stack frames, innermost first; empty where the compiler wrote none."""
        frame, files = instruction.attribute("stack_frame_id"), []
        at = int(frame) if frame else 0
        while at > 0 and at in self.frames.get("StackFrames", {}):
            numbers = dict(re.findall(r"(\w+)=(\d+)", self.frames["StackFrames"][at]))
            location = self.frames["FileLocations"].get(int(numbers["file_location_id"]), "")
            file = re.search(r"file_name_id=(\d+)", location)
            files.append(self.frames["FileNames"].get(int(file[1]), "").strip('"') if file else "")
            # Written as the parent's number plus one: 1 means that there is none.
            above = int(numbers.get("parent_frame_id", 1)) - 1
            at = above if above < at else 0
        return tuple(files)

    def trip_count(self, loop: Instruction, computation: Computation, scope: _Scope | None = None) -> int | None:
        """How often a `while` turns, where that is written in the program."""
        told = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
        if told:
            return int(told[1])
        condition = self.computations.get(loop.attribute("condition") or "")
        body = self.computations.get(loop.attribute("body") or "")
        if condition is None or body is None:
            return None
        bound = self._bound(condition)
        if bound is None:
            return None
        counter, limit = bound
        start = self._constant(loop.operands[0], computation, scope, counter)
        stop = limit if isinstance(limit, int) else self._carried(loop, computation, scope, body, int(limit[0]))
        step = self._step(body, counter)
        if start is None or stop is None or step < 1:
            return None
        return max(0, -(-(stop - start) // step))

    def _bound(self, condition: Computation) -> tuple[int, int | tuple[int]] | None:
        """(index of the counter, its limit or (index of the limit,)) of `counter < limit`."""
        root = condition.instructions[condition.root]
        names, inside = list(root.operands), root
        if root.opcode == "fusion":  # the CPU's compiler wraps the comparison
            inner = self.computations[root.called()[0]]
            inside = inner.instructions[inner.root]
            order = {i.name: int(i.arguments) for i in inner.instructions.values() if i.opcode == "parameter"}
            if any(name not in order for name in inside.operands):
                return None
            names = [root.operands[order[name]] for name in inside.operands]
        if inside.opcode != "compare" or "direction=LT" not in inside.attributes:
            return None
        sides = [_follow(condition, name) for name in names]
        if sides[0].opcode != "get-tuple-element":
            return None
        counter = int(sides[0].attribute("index") or 0)
        if sides[1].opcode == "constant":
            return counter, int(sides[1].arguments)
        if sides[1].opcode == "get-tuple-element":
            return counter, (int(sides[1].attribute("index") or 0),)
        return None

    def _step(self, body: Computation, counter: int) -> int:
        """By how much a turn raises the counter: 1, as in every loop of JAX, unless an addition says otherwise."""
        root = body.instructions[body.root]
        after = _follow(body, root.operands[counter])
        if after.opcode != "add":
            return 1
        constants = [i for i in (_follow(body, name) for name in after.operands) if i.opcode == "constant"]
        return int(constants[0].arguments) if constants else 1

    def _carried(
        self, loop: Instruction, computation: Computation, scope: _Scope | None, body: Computation, index: int
    ) -> int | None:
        """A constant that a loop carries unchanged."""
        if not is_passed_on(body, index):
            return None
        return self._constant(loop.operands[0], computation, scope, index)

    def _constant(
        self, name: str, computation: Computation, scope: _Scope | None, index: int | None = None
    ) -> int | None:
        """The integer that a value (or element `index` of a tuple) is, looking outwards through loops."""
        value = _follow(computation, name)
        if index is not None:
            if value.opcode == "tuple":
                return self._constant(value.operands[index], computation, scope)
            if value.opcode == "while":
                return self._constant(value.operands[0], computation, scope, index)
            return None
        if value.opcode == "constant":
            return int(value.arguments) if re.fullmatch(r"-?\d+", value.arguments) else None
        if value.opcode == "get-tuple-element":
            source, element = _follow(computation, value.operands[0]), int(value.attribute("index") or 0)
            if source.opcode == "parameter" and scope is not None:
                if not is_passed_on(computation, element):
                    return None
                return self._constant(scope.loop.operands[0], scope.computation, scope.around, element)
            if source.opcode == "tuple":
                return self._constant(source.operands[element], computation, scope)
        return None


class _Scope(NamedTuple):
    """The loop whose body or condition is read, and where that loop stands."""

    loop: Instruction
    computation: Computation
    around: _Scope | None


def _follow(computation: Computation, name: str) -> Instruction:
    """The instruction that makes a value, past those that only move it."""
    found = computation.instructions[name]
    while found.opcode in _SAME_VALUE and found.operands and found.operands[0] in computation.instructions:
        found = computation.instructions[found.operands[0]]
    return found


def is_passed_on(body: Computation, index: int) -> bool:
    """Whether a loop's body hands element `index` of its tuple on as it came."""
    root = body.instructions[body.root]
    if root.opcode != "tuple" or index >= len(root.operands):
        return False
    value = _follow(body, root.operands[index])
    if value.opcode != "get-tuple-element" or int(value.attribute("index") or 0) != index:
        return False
    return _follow(body, value.operands[0]).opcode == "parameter"


# --- the text ------------------------------------------------------------------------------------------------


def read_program(text: str) -> Program:
    """Raises `ValueError` for a text without an entry computation."""
    computations: dict[str, Computation] = {}
    frames: dict[str, dict[int, str]] = {}
    entry, current = "", ""
    section: dict[int, str] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if current and line == "}":
            computations[current] = _read_computation(current, lines)
            current = ""
        elif current and (_INSTRUCTION.match(line) or not lines):
            lines.append(line)
        elif current:
            lines[-1] += line  # attributes of kernels go over several lines
        elif line in _FRAME_SECTIONS:
            section = frames.setdefault(line, {})
        elif numbered := _NUMBERED.match(line):
            section[int(numbered[1])] = numbered[2]
        elif opened := _COMPUTATION.match(line):
            current, lines = opened[2], []
            entry = current if opened[1] else entry
    if entry not in computations:
        raise ValueError("the text has no ENTRY computation: it is not that of a compiled program")
    return Program(entry, computations, frames)


def _read_computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, ""
    for line in lines:
        found = _INSTRUCTION.match(line)
        if found:
            root = found[2] if found[1] or not root else root
            instructions[found[2]] = _read_instruction(found[2], found[3])
    return Computation(name, instructions, root)


def _read_instruction(name: str, text: str) -> Instruction:
    type_end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    rest = text[type_end:].lstrip()
    bracket = rest.index("(")
    end = _closing(rest, bracket)
    arguments = rest[bracket + 1 : end - 1]
    return Instruction(
        name, text[:type_end], rest[:bracket], tuple(_NAME.findall(arguments)), arguments, rest[end:].lstrip(", ")
    )


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place + 1
    return len(text)
