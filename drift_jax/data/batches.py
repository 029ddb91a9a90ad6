"""Tokenised pairs -> packed batches on the mesh.

The order of pairs is a function of (seed, epoch) and a batch a function of the step: the loader has no state that
a checkpoint would have to hold besides the step number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float, Int

from drift_jax.data.packing import (
    FEWEST_SAVED,
    UNSPLIT,
    BatchShape,
    Split,
    choose_shape,
    count_micro_batches,
    most_micro_batches,
    pack_rows,
    plan_shapes,
    token_budget,
)
from drift_jax.data.pairs import TokenizedPair
from drift_jax.data.rules import GroupCut
from drift_jax.models.intervals import KeySpans
from drift_jax.sharding import Dims, Layout, build_sharding, put


class PairBatch(NamedTuple):
    """One update's N pairs, packed. A pair is `[prompt | chosen | rejected]`, a row holds several pairs, then padding.

    A are micro-batches of R rows of T tokens, of which the first `micro_batches` hold pairs. The prompt is there once:
    both sides look at it and not at each other, and the positions of both go on where the prompt ends. Padding is
    known by place, never by id: the pad id may be a real token. The completion tokens are listed apart, for each of the
    G devices that rows are split over: those of one side one after the other, C = T x R // G with room for all. The
    arrays are numpy's until `put_batch` places them.
    """

    ids: Int[Any, "A R T"]
    positions: Int[Any, "A R T"]
    spans: KeySpans  # each [A, R, T]
    sources: Int[Any, "A G C"]  # where in the device's rows the token stands whose state predicts completion token c
    targets: Int[Any, "A G C"]  # id of completion token c
    owners: Int[Any, "A G C"]  # 2 * pair + side (0 chosen, 1 rejected) of completion token c; -1: there is none
    real: Bool[Any, " N"]  # False for pairs that only fill the last batch of an epoch
    ref_logps: Float[Any, "N 2"]  # nats, summed over the completion; zeros before the reference pass
    micro_batches: Int[Any, ""]


_ROWS: Dims = (None, "batch", None)  # numbers of whole rows, which are turned round and only then split by tokens


def batch_shardings(batch: PairBatch, layout: Layout) -> PairBatch:
    """Placements: rows split over the mesh, the values of pairs on every device."""

    def place(array: np.ndarray | np.generic) -> NamedSharding:
        dims = _ROWS if array.ndim == len(_ROWS) else (None,) * array.ndim
        return build_sharding(layout, dims, array.shape, name="batch")

    return jax.tree.map(place, batch)


def batch_split(layout: Layout) -> Split:
    """Into how many parts a layout splits the rows of a micro-batch, and the tokens of a row."""
    return Split(layout.ways("batch"), layout.ways("length"))


def put_batch(batch: PairBatch, layout: Layout) -> PairBatch:
    """Host arrays -> device arrays."""
    return jax.tree.map(put, batch, batch_shardings(batch, layout))


@lru_cache(maxsize=2)  # each update asks for it: to shuffle all pairs anew would be quadratic in their number
def epoch_order(num_pairs: int, seed: int, epoch: int) -> Int[np.ndarray, "N"]:
    """The permutation of an epoch, the same on every machine; not to be written to."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_pairs)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class PairLoader:
    """Batches of a fixed number of pairs over tokenised pairs.

    With `group_cut`, `group_size` neighbours of a shuffled batch decide which completions lose their last token; it
    is masked, here and in the reference's log-probs, since nothing after it sees it.
    """

    pairs: Sequence[TokenizedPair]
    ref_logps: Float[np.ndarray, "N 2"]
    batch_size: int
    accumulation_steps: int
    max_length: int
    seed: int = 0
    group_cut: GroupCut | None = None
    group_size: int = 1
    ref_last_logps: Float[np.ndarray, "N 2"] | None = None  # of the last tokens; needed with `group_cut`
    split: Split = UNSPLIT  # `batch_split` of the layout
    tokens_per_device: int | None = None  # of a micro-batch; None: by `token_budget`
    attention: str = "splash"  # the back end, for what long rows cost: a key of `packing.COSTS`
    compile_tokens: int = FEWEST_SAVED  # what `packing.tokens_per_compilation` says

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.pairs) // self.batch_size)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest pair."""
        return max(map(pair_tokens, self.pairs))

    @cached_property
    def shapes(self) -> tuple[BatchShape, ...]:
        """The shapes of all micro-batches of the stage, planned on its first epoch."""
        return self._plan([self._rows_of(step) for step in range(self.steps_per_epoch)])

    def shuffled(self, step: int) -> PairBatch:
        """The batch of an update; `step` counts from 0 over all epochs. The last of an epoch may be part padding."""
        rows = self._rows_of(step)
        return self._build(rows, self._lost_ends(rows), self.shapes)

    def ids(self, step: int) -> list[str]:
        """Of the pairs of an update."""
        return [self.pairs[row].id for row in self._rows_of(step)]

    def first_epoch(self) -> Iterator[tuple[Int[np.ndarray, "R"], PairBatch]]:
        """The batches of the first epoch, whole, each with the positions of its pairs in `pairs`.

        For the reference pass: in bfloat16 a log-prob depends on the shape of its batch and on its neighbours by up to
        a nat, so that only in the batches of the first epoch the policy equals the reference.
        """
        for step in range(self.steps_per_epoch):
            rows = self._rows_of(step)
            yield rows, self._build(rows, np.zeros((len(rows), 2), bool), self.shapes)

    def by_length(self) -> Iterator[tuple[Int[np.ndarray, "R"], PairBatch]]:
        """All pairs once, longest first, each batch with the positions of its pairs in `pairs`.

        For passes without gradient, where the order does not matter: a batch that does not fit in memory fails at
        once.
        """
        order = np.argsort([-pair_tokens(pair) for pair in self.pairs], kind="stable")
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        shapes = self._plan(batches)
        for rows in batches:
            yield rows, self._build(rows, np.zeros((len(rows), 2), bool), shapes)

    def real_token_share(self) -> float:
        """Of the tokens that the first epoch computes, the share that belongs to pairs; a prompt counts once."""
        computed = 0
        for step in range(self.steps_per_epoch):
            lengths = self._lengths(self._rows_of(step))
            shape = choose_shape(lengths, self.shapes, self.split.rows, self.attention)
            computed += count_micro_batches(lengths, shape) * shape.tokens
        return sum(map(pair_tokens, self.pairs)) / computed

    def _rows_of(self, step: int) -> Int[np.ndarray, "R"]:
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch_order(len(self.pairs), self.seed, epoch)[position * self.batch_size :][: self.batch_size]

    def _lengths(self, rows: Int[np.ndarray, "R"]) -> list[int]:
        return [pair_tokens(self.pairs[row]) for row in rows]

    def _plan(self, batches: Sequence[Int[np.ndarray, "_"]]) -> tuple[BatchShape, ...]:
        lengths = [self._lengths(rows) for rows in batches]
        pairs, split = max(1, self.batch_size // self.accumulation_steps // self.split.rows), self.split
        budget = token_budget(self.longest, pairs, split)
        if self.tokens_per_device is not None:
            budget = self.tokens_per_device * split.tokens
        return plan_shapes(lengths, split, budget, self.attention, self.compile_tokens)

    def _lost_ends(self, rows: Int[np.ndarray, "R"]) -> Bool[np.ndarray, "R 2"]:
        """Which completions lose their last token because of their neighbours."""
        lost, cut = np.zeros((len(rows), 2), bool), self.group_cut
        if cut is None:
            return lost
        for start in range(0, len(rows), self.group_size):
            group = [self.pairs[row] for row in rows[start : start + self.group_size]]
            prompts = np.array([len(pair.prompt_ids) for pair in group])
            completions = np.array([pair.completion_lengths for pair in group])
            lost[start : start + len(group)] = cut(prompts, completions, self.max_length)
        return lost

    def _build(
        self, rows: Int[np.ndarray, "R"], lost_ends: Bool[np.ndarray, "R 2"], shapes: Sequence[BatchShape]
    ) -> PairBatch:
        lengths = self._lengths(rows)
        ways = self.split.rows
        shape = choose_shape(lengths, shapes, ways, self.attention)
        ref_logps = np.zeros((self.batch_size, 2), np.float32)
        ref_logps[: len(rows)] = self.ref_logps[rows]
        if self.ref_last_logps is not None:
            ref_logps[: len(rows)] -= np.where(lost_ends, self.ref_last_logps[rows], 0.0)
        packed = pack_rows(lengths, shape.length)
        micro_batches = -(-len(packed) // shape.rows)
        # As many micro-batches as the update could need at most, so that their number is no part of the shape.
        empty = _empty_rows(most_micro_batches(self.batch_size, self.longest, shape), shape, self.batch_size, ways)
        batch = empty._replace(ref_logps=ref_logps, micro_batches=np.int32(micro_batches))
        batch.real[: len(rows)] = True
        for i, members in enumerate(packed):
            # Dealt out in turn, to the devices too: only the last micro-batch may have empty rows, on all alike.
            micro, turn = divmod(i, shape.rows)
            row = turn % ways * (shape.rows // ways) + turn // ways
            _fill_row(batch, (micro, row), [(m, self.pairs[rows[m]], lost_ends[m]) for m in members])
        return batch


def _empty_rows(micro_batches: int, each: BatchShape, pairs: int, ways: int) -> PairBatch:
    """A batch without pairs: every token is padding that sees itself only."""
    shape = (micro_batches, each.rows, each.length)
    lists = (micro_batches, ways, each.rows // ways * each.length)
    own = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    return PairBatch(
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        KeySpans(*(own.copy() for _ in KeySpans._fields)),
        np.zeros(lists, np.int32),
        np.zeros(lists, np.int32),
        np.full(lists, -1, np.int32),
        np.zeros(pairs, bool),
        np.zeros((pairs, 2), np.float32),
        np.int32(0),
    )


def _fill_row(
    batch: PairBatch, at: tuple[int, int], members: Sequence[tuple[int, TokenizedPair, Bool[np.ndarray, "2"]]]
) -> None:
    """Writes pairs into a row, one after the other, and lists their completion tokens behind those of rows before it.

    Args:
      members: index in the update, pair, lost ends.
    """
    ids, positions = batch.ids[at], batch.positions[at]
    spans = KeySpans(*(array[at] for array in batch.spans))
    micro, row = at
    device, of_device = divmod(row, batch.ids.shape[1] // batch.owners.shape[1])
    sources, targets, owners = (array[micro, device] for array in (batch.sources, batch.targets, batch.owners))
    before, start, listed = of_device * len(ids), 0, int((owners >= 0).sum())
    for index, pair, lost in members:
        prompt = len(pair.prompt_ids)
        stop = start + prompt
        ids[start:stop] = pair.prompt_ids
        positions[start:stop] = np.arange(prompt)
        spans.own_start[start:stop] = start
        own = stop
        for side, completion in enumerate((pair.chosen_ids, pair.rejected_ids)):
            end = own + len(completion)
            ids[own:end] = completion
            positions[own:end] = np.arange(prompt, prompt + len(completion))
            spans.own_start[own:end] = own
            # The first token is predicted by the prompt's last one; after an empty prompt nothing predicts it.
            places = np.arange(own, end - int(lost[side]))[int(prompt == 0) :]
            listing = slice(listed, listed + len(places))
            sources[listing] = before + np.where(places == own, stop - 1, places - 1)
            targets[listing] = ids[places]
            owners[listing] = 2 * index + side
            listed, own = listing.stop, end
        spans.prompt_start[start:own], spans.prompt_stop[start:own] = start, stop
        start = own


def pair_tokens(pair: TokenizedPair) -> int:
    """Tokens that a pair takes in a row: its prompt once, and both completions, as cut."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def count_tokens(batch: PairBatch) -> int:
    """Real tokens of a host batch: prompts, once each, and both completions."""
    return int((np.asarray(batch.spans.prompt_stop) > np.asarray(batch.spans.prompt_start)).sum())
