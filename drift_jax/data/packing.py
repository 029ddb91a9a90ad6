"""Which pairs share a row, and how long and how many the rows of a micro-batch are.

Everything here is arithmetic on lengths: no ids, no state. Few shapes are used in a whole stage, because every shape
is a program to compile; how many micro-batches of that shape an update takes costs no program.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

# Row lengths are multiples of this: the kernels' largest common block.
ROW_MULTIPLE = 128
# Tokens of a micro-batch on one device. More only costs memory; fewer leave matrices too thin.
_MOST_TOKENS, _FEWEST_TOKENS = 16384, 2048
# Shapes are planned on so many updates at most, spread evenly over the stage.
_MOST_PLANNED = 256
_MOST_SHAPES = 3
# A further shape must save this share of all computed tokens, and as many of them as are computed in the time that its
# compilation takes; a share of the second size, of no very few tokens, is not given up however short the stage.
_WORTHWHILE, _MOST_WASTED, FEWEST_SAVED = 0.01, 0.05, 4096
# FLOPs in that time, of a CPU with all its devices and of one other device: 8 seconds at 130 GFLOP/s, and 25 to 100 at
# 400 (an H100) to 100 (a TPU v5e) TFLOP/s.
_CPU_COMPILATION, _COMPILATION = 1e12, 1e16


class Costs(NamedTuple):
    """What a shape costs besides its tokens, in tokens of short rows on one device."""

    double: int  # a token of a row this long costs twice as much
    micro_batch: int  # every micro-batch goes through all weights and gradients, which takes as long as so many tokens
    multiple: int  # rows longer than any pair are multiples of this
    longest: int  # and no longer than this, unless a pair is


# By attention back end. All of them skip the keys of other pairs and only have some overhead; what the Triton kernel
# does for a token does not depend on its row. Of every parameter a micro-batch moves some 25 bytes, and a token takes
# 8 FLOPs: an H100 and a TPU v5e do 500 tokens in that time, a CPU few. Splash likes rows of its largest blocks; where
# rows may be very long, steps of 512 keep the shapes to choose from few.
COSTS = {
    "xla": Costs(65536, 64, 128, 8192),
    "splash": Costs(65536, 512, 512, 8192),
    "triton": Costs(1 << 20, 512, 512, 32768),
}


class BatchShape(NamedTuple):
    """Rows of a micro-batch over all devices, and their length in tokens."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Split(NamedTuple):
    """Into how many parts the mesh splits the rows of a micro-batch, and the tokens of a row."""

    rows: int = 1
    tokens: int = 1


UNSPLIT = Split()


def token_budget(longest: int, pairs: int, split: Split = UNSPLIT) -> int:
    """Tokens of a micro-batch where its rows lie when none are set: room for `pairs`, were all of them the longest.

    Args:
      pairs: of those devices that share the tokens of rows; of one device, if none do.
    """
    return min(pairs * longest, max(longest, _MOST_TOKENS * split.tokens))


def tokens_per_compilation(platform: str, devices: int, weights: int, flops_per_weight: float) -> int:
    """Tokens that are computed in the time that it takes to compile one more shape.

    Args:
      platform: `jax.Device.platform`.
      flops_per_weight: of all that is done with a token: 2 for a forward pass, 6 for one with its backward pass.
    """
    flops = _CPU_COMPILATION if platform == "cpu" else _COMPILATION * devices
    return math.ceil(flops / (weights * flops_per_weight))


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Indices of pairs per row, by best fit in order of decreasing length (ties: the earlier index first).

    Raises:
      ValueError: a pair is longer than a row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[index]
        if size > row_length:
            raise ValueError(f"a pair of {size} tokens does not fit in a row of {row_length}")
        tightest = bisect_left(rooms, (size, -1))
        if tightest < len(rooms):
            left, row = rooms.pop(tightest)
        else:
            left, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(rooms, (left - size, row))
    return rows


def count_micro_batches(lengths: Sequence[int], shape: BatchShape) -> int:
    """Micro-batches of this shape that the pairs of one update take."""
    return -(-len(pack_rows(lengths, shape.length)) // shape.rows)


def most_micro_batches(pairs: int, longest: int, shape: BatchShape) -> int:
    """Micro-batches of this shape that so many pairs of at most `longest` tokens can take, however they are packed.

    No two rows of `pack_rows` fit into one, so that any two hold more than a row.
    """
    rows = min(pairs, 2 * pairs * longest // shape.length + 1)
    return -(-rows // shape.rows)


def plan_shapes(
    batches: Sequence[Sequence[int]],
    split: Split,
    budget: int,
    attention: str = "splash",
    compile_tokens: int = FEWEST_SAVED,
) -> tuple[BatchShape, ...]:
    """The few shapes with which the updates of a stage cost the least.

    Args:
      batches: the lengths of each update's pairs.
      split: every shape's rows, and its length in blocks of `ROW_MULTIPLE`, are a multiple of it.
      budget: tokens of a micro-batch where its rows lie, as of `token_budget`; exceeded only where a pair is longer.
      attention: the back end, a key of `COSTS`.
      compile_tokens: what `tokens_per_compilation` says.
    """
    longest = max(max(lengths) for lengths in batches)
    stride = -(-len(batches) // _MOST_PLANNED)
    planned = batches[::stride]
    extra = COSTS[attention]
    costs = _tabulate(planned, _candidates(longest, split, budget, extra), split.rows, extra)
    # The first shape must take every pair of the stage, those of later epochs' batches included.
    whole = [shape for shape in costs if shape.length >= longest]
    chosen = [min(whole, key=lambda shape: (sum(costs[shape]), -shape.tokens))]
    best = costs[chosen[0]]
    while len(chosen) < _MOST_SHAPES:
        totals = {shape: sum(map(min, best, costs[shape])) for shape in costs}
        shape = min(totals, key=lambda shape: (totals[shape], -shape.tokens))
        saved = sum(best) - totals[shape]
        if saved < _least_saved(sum(best), compile_tokens / stride, FEWEST_SAVED / stride):
            break
        chosen.append(shape)
        best = list(map(min, best, costs[shape]))
    return tuple(chosen)


def _least_saved(computed: float, compilation: float, few: float) -> float:
    """Tokens that one more shape must save of those computed without it."""
    return max(_WORTHWHILE * computed, min(compilation, max(_MOST_WASTED * computed, few)))


def choose_shape(
    lengths: Sequence[int], shapes: Sequence[BatchShape], ways: int, attention: str = "splash"
) -> BatchShape:
    """Of the stage's shapes the one in which an update's pairs cost the least; arguments as of `plan_shapes`."""
    costs = _tabulate([lengths], shapes, ways, COSTS[attention])
    return min(shapes, key=lambda shape: costs[shape][0])


def _candidates(longest: int, split: Split, budget: int, extra: Costs) -> list[BatchShape]:
    """Rows of half the longest pair to several pairs; as many as the budget holds, or half as many, or some tokens."""
    least, step = ROW_MULTIPLE * split.tokens, math.lcm(extra.multiple, ROW_MULTIPLE * split.tokens)
    lengths = {round_up(-(-longest * eighths // 8), least) for eighths in range(4, 9)}
    lengths |= set(range(round_up(longest, step), min(budget, extra.longest * split.tokens) + 1, step))
    shapes = []
    for length in sorted(lengths, reverse=True):
        most = max(1, budget // length)
        fewest = min(-(-most // 2), -(-_FEWEST_TOKENS * split.tokens // length))
        shapes += [BatchShape(split.rows * count, length) for count in range(most, fewest - 1, -1)]
    return shapes


def _tabulate(
    batches: Sequence[Sequence[int]], shapes: Sequence[BatchShape], ways: int, extra: Costs
) -> dict[BatchShape, list[float]]:
    """What each update costs in each shape, in tokens of short rows; infinite where a pair does not fit."""
    lengths = {shape.length for shape in shapes}
    rows = {length: [_count_rows(pairs, length) for pairs in batches] for length in lengths}
    costs = {}
    for shape in shapes:
        one = shape.tokens * (1 + shape.length / extra.double) + ways * extra.micro_batch
        costs[shape] = [-(-count // shape.rows) * one for count in rows[shape.length]]
    return costs


def _count_rows(lengths: Sequence[int], row_length: int) -> float:
    return len(pack_rows(lengths, row_length)) if max(lengths) <= row_length else math.inf
