"""How long a compiled program might take: an estimate, made of what the compiler says and of what it does not.

1. The TPU compiler writes `estimated_cycles` on most instructions; they are added up with the trip counts of the loops
   around them and divided by the clock.
2. It writes none on kernels (`tpu_custom_call`: attention). They count with their FLOPs at half of the chip's peak.
3. It writes none on collectives. They count with the bytes that a device sends to its neighbours, at what one link
   carries. Those that run beside other work count only where they take longer than the work of the same loop.

No contention, no waiting for the slowest chip, no host: a step will rather take longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from drift_jax.plan.collectives import Collective
from drift_jax.plan.hlo import CountRegion, Instruction, Program, count_once
from drift_jax.plan.slices import Chip

KERNEL_SHARE = 0.5  # of the peak: what attention kernels reach on long rows

# FLOPs of one execution of a kernel.
CountFlops = Callable[[Instruction], float]


@dataclass(frozen=True)
class Estimate:
    """Seconds of one execution of a program."""

    compiler_s: float  # the compiler's cycles
    kernels_s: float  # kernels, from their FLOPs
    exposed_s: float  # collectives, as far as nothing else goes on meanwhile
    uncounted: int  # kernels of which nothing is known

    @property
    def seconds(self) -> float:
        return self.compiler_s + self.kernels_s + self.exposed_s


@dataclass
class _Part:
    """What runs in one loop body, without the loops inside."""

    work: float = 0.0
    beside: float = 0.0  # collectives that run beside the work
    alone: float = 0.0


def estimate(
    program: Program,
    chip: Chip,
    collectives: Iterable[Collective],
    kernel_flops: CountFlops,
    count: CountRegion = count_once,
) -> Estimate | None:
    """None where the compiler counts no cycles.

    Args:
      kernel_flops: of a `custom-call` of a kernel; 0: unknown.
    """
    if chip.clock_hz is None:
        return None
    compiler, kernels, uncounted = 0.0, 0.0, 0
    parts: dict[tuple[str, ...], _Part] = {}
    for visit in program.walk(count):
        part = parts.setdefault(tuple(region.computation for region in visit.regions), _Part())
        cycles = visit.executions * visit.instruction.cycles / chip.clock_hz
        compiler += cycles
        part.work += cycles
        if '"tpu_custom_call"' in visit.instruction.attributes:
            flops = kernel_flops(visit.instruction)
            seconds = visit.executions * flops / (KERNEL_SHARE * chip.peak_flops)
            uncounted += not flops
            kernels += seconds
            part.work += seconds
    if not compiler:
        return None
    for collective in collectives:
        part = parts.setdefault(tuple(region.computation for region in collective.regions), _Part())
        seconds = collective.executions * send_seconds(collective, chip)
        if collective.is_async:
            part.beside += seconds
        else:
            part.alone += seconds
    exposed = sum(part.alone + max(0.0, part.beside - part.work) for part in parts.values())
    return Estimate(compiler, kernels, exposed, uncounted)


def send_seconds(collective: Collective, chip: Chip) -> float:
    """One execution on a ring of the group's devices, both ways at once; a permute goes one way to the neighbour."""
    if not collective.axes:
        return 0.0
    if collective.kind == "collective-permute":
        return collective.bytes / chip.link_bytes
    devices = max(len(group) for group in collective.groups)
    passes = 2 if collective.kind == "all-reduce" else 1
    return passes * collective.bytes * (devices - 1) / devices / (2 * chip.link_bytes)


def estimate_from_flops(flops: float, collectives: Iterable[Collective], chip: Chip) -> float:
    """Seconds where the compiler counts no cycles: FLOPs at half of the peak, and the collectives after them."""
    sending = sum(collective.executions * send_seconds(collective, chip) for collective in collectives)
    return flops / (KERNEL_SHARE * chip.peak_flops) + sending
