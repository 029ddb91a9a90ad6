"""Tokenised pairs -> batches on the mesh.

The order of pairs is a function of (seed, epoch) and a batch a function of the step: the loader has no state that
a checkpoint would have to hold besides the step number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from drift_jax.data.pairs import TokenizedPair
from drift_jax.data.rules import GroupCut
from drift_jax.sharding import Dims, build_sharding

# Rows are padded to one of few lengths, so that few programs are compiled.
_SHORTEST_BUCKET = 128
_BUCKET_MULTIPLE = 64


class PairBatch(NamedTuple):
    """One update's pairs in the plain layout: a row is prompt + completion, padded on the right.

    A is the number of micro-batches (accumulation steps), B the pairs of a micro-batch, side 0 chosen and 1
    rejected. Padding is known by position, never by id: the pad id may be a real token. The arrays are numpy's
    until `put_batch` places them.
    """

    ids: Int[Any, "A B 2 T"]
    completion_mask: Bool[Any, "A B 2 T"]  # ids[..., t] belongs to the completion (its end token included)
    real: Bool[Any, "A B"]  # False for pairs that only fill the last batch of an epoch
    ref_logps: Float[Any, "A B 2"]  # nats, summed over the completion; zeros before the reference pass


# In the order of PairBatch's fields.
_DIMS: tuple[Dims, ...] = (
    (None, "batch", "pair", "length"),
    (None, "batch", "pair", "length"),
    (None, "batch"),
    (None, "batch", "pair"),
)


def put_batch(batch: PairBatch, mesh: Mesh) -> PairBatch:
    """Host arrays -> device arrays, split over the mesh along the pairs."""
    return PairBatch(
        *(
            jax.device_put(array, build_sharding(mesh, dims, array.shape, name="batch"))
            for array, dims in zip(batch, _DIMS, strict=True)
        )
    )


def length_buckets(max_length: int) -> tuple[int, ...]:
    """The row lengths in use, ascending: max_length, its half, its quarter, ... down to 128 tokens."""
    buckets, size = [], max_length
    while not buckets or size >= _SHORTEST_BUCKET:
        buckets.append(-(-size // _BUCKET_MULTIPLE) * _BUCKET_MULTIPLE)
        size //= 2
    return tuple(sorted(set(buckets)))


def epoch_order(num_pairs: int, seed: int, epoch: int) -> Int[np.ndarray, "N"]:
    """The permutation of an epoch, the same on every machine."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_pairs)


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

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.pairs) // self.batch_size)

    def shuffled(self, step: int) -> PairBatch:
        """The batch of an update; `step` counts from 0 over all epochs. The last of an epoch may be part padding."""
        rows = self._rows_of(step)
        return self._build(rows, self._lost_ends(rows))

    def first_epoch(self) -> Iterator[tuple[Int[np.ndarray, "R"], PairBatch]]:
        """The batches of the first epoch, whole, each with the positions of its pairs in `pairs`.

        For the reference pass: in bfloat16 a log-prob depends on the shape of its batch and on its neighbours by up to
        a nat, so that only in the batches of the first epoch the policy equals the reference.
        """
        for step in range(self.steps_per_epoch):
            rows = self._rows_of(step)
            yield rows, self._build(rows, np.zeros((len(rows), 2), bool))

    def _rows_of(self, step: int) -> Int[np.ndarray, "R"]:
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch_order(len(self.pairs), self.seed, epoch)[position * self.batch_size :][: self.batch_size]

    def by_length(self) -> Iterator[tuple[Int[np.ndarray, "R"], PairBatch]]:
        """All pairs once, longest first, each batch with the positions of its pairs in `pairs`.

        For passes without gradient, where the order does not matter: neighbours of like length need little padding,
        and a batch that does not fit in memory fails at once.
        """
        order = np.argsort([-longest_row(pair) for pair in self.pairs], kind="stable")
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            yield rows, self._build(rows, np.zeros((len(rows), 2), bool))

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

    def _build(self, rows: Int[np.ndarray, "R"], lost_ends: Bool[np.ndarray, "R 2"]) -> PairBatch:
        chosen = [self.pairs[row] for row in rows]
        longest = max(map(longest_row, chosen))
        length = next(bucket for bucket in length_buckets(self.max_length) if bucket >= longest)
        ids = np.zeros((self.batch_size, 2, length), np.int32)
        mask = np.zeros((self.batch_size, 2, length), bool)
        for i, pair in enumerate(chosen):
            start = len(pair.prompt_ids)
            for side, completion in enumerate((pair.chosen_ids, pair.rejected_ids)):
                ids[i, side, :start] = pair.prompt_ids
                ids[i, side, start : start + len(completion)] = completion
                mask[i, side, start : start + len(completion) - int(lost_ends[i, side])] = True
        ref_logps = np.zeros((self.batch_size, 2), np.float32)
        ref_logps[: len(rows)] = self.ref_logps[rows]
        if self.ref_last_logps is not None:
            ref_logps[: len(rows)] -= np.where(lost_ends, self.ref_last_logps[rows], 0.0)
        real = np.arange(self.batch_size) < len(rows)
        micro = (self.accumulation_steps, self.batch_size // self.accumulation_steps)
        return PairBatch(*(a.reshape(micro + a.shape[1:]) for a in (ids, mask, real, ref_logps)))


def longest_row(pair: TokenizedPair) -> int:
    """Tokens of the longer side of a pair."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def count_tokens(batch: PairBatch) -> int:
    """Real tokens of a host batch: prompts and completions of real pairs, both sides."""
    last = batch.ids.shape[-1] - np.argmax(np.asarray(batch.completion_mask)[..., ::-1], axis=-1)
    return int((last * np.asarray(batch.real)[..., None]).sum())
