"""Which request has which slot of the cache: the host's side of continuous batching."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Int

from drift_jax.sampling.base import SampleRequest

_SHORTEST = 128  # kernels take rows of multiples of this


def round_length(tokens: int, steps: int = 2) -> int:
    """The next of 128, 256, 384, 512, 768, 1024, 1536, ...: few lengths are few compilations.

    Args:
      steps: between a power of two and the next, where they are multiples of 64; 4 gives 256, 320, 384, 448, 512, 640.
    """
    size = _SHORTEST
    while size < tokens:
        size *= 2
    least = _SHORTEST if steps <= 2 else _SHORTEST // 2
    between = (size // 2 + size * i // (2 * steps) for i in range(1, steps))
    return next((length for length in between if length >= tokens and length % least == 0), size)


@dataclass(frozen=True)
class Admission:
    """Requests that get slots together: what to compute, and what to copy.

    Slots are counted within a part of the cache, R of which lie on the devices.
    """

    ids: Int[np.ndarray, "R T"]  # packed prompts without their last token; T 0: there are none
    positions: Int[np.ndarray, "R T"]
    slots: Int[np.ndarray, "R F"]  # of each packed prompt
    starts: Int[np.ndarray, "R F"]
    inserts: int  # how many of the F are used, at most
    sources: Int[np.ndarray, "R F"]  # slots that hold the same prompt
    targets: Int[np.ndarray, "R F"]
    copies: int
    requests: dict[int, SampleRequest]  # by slot, counted over the whole cache


@final
class SlotTable:
    """The slots of a cache in `parts` equal parts, and the requests that wait for them.

    Args:
      budget: tokens of packed prompts a part at a time; a longer prompt goes alone.
    """

    def __init__(self, requests: Iterable[SampleRequest], parts: int, per_part: int, budget: int) -> None:
        # Rows of like lengths go together, since every row of the cache has the room that the longest needs. Whose
        # neighbours a row has changes none of its tokens.
        self.waiting = deque(sorted(requests, key=lambda request: len(request.prompt_ids)))
        self.parts, self.per_part, self.budget = parts, per_part, budget
        self.running: dict[int, SampleRequest] = {}
        self._held: list[dict[int, tuple[int, ...]]] = [{} for _ in range(parts)]  # the prompt in each slot

    @property
    def rows(self) -> int:
        return self.parts * self.per_part

    def release(self, slot: int) -> SampleRequest:
        """A request is done; its slot still holds the prompt until another needs it."""
        return self.running.pop(slot)

    def admit(self) -> Admission | None:
        """Gives free slots to waiting requests, as many as a packed row has tokens for; None: none can be admitted."""
        packed: list[list[tuple[int, Sequence[int]]]] = [[] for _ in range(self.parts)]
        copied: list[list[tuple[int, int]]] = [[] for _ in range(self.parts)]
        admitted: dict[int, SampleRequest] = {}
        used = [0] * self.parts
        while self.waiting and (choice := self._choose_part(self.waiting[0], used)) is not None:
            part, source = choice
            request = self.waiting.popleft()
            slot = self._free(part, source)
            if source is not None:
                copied[part].append((source, slot))
            elif len(request.prompt_ids) > 1:
                packed[part].append((slot, request.prompt_ids[:-1]))
                used[part] += len(request.prompt_ids) - 1
            self._held[part][slot] = request.prompt_ids
            admitted[part * self.per_part + slot] = request
            self.running[part * self.per_part + slot] = request
        return self._pack(packed, copied, admitted) if admitted else None

    def _choose_part(self, request: SampleRequest, used: list[int]) -> tuple[int, int | None] | None:
        """(the part to take a slot of, a slot of it with the same prompt)."""
        free = [part for part in range(self.parts) if self._count_running(part) < self.per_part]
        for part in free:
            source = next((slot for slot, ids in self._held[part].items() if ids == request.prompt_ids), None)
            # The only slot that is left may be the one with the prompt itself: then it is taken as it is.
            if source is not None:
                return part, source
        free = [p for p in free if used[p] == 0 or used[p] + len(request.prompt_ids) - 1 <= self.budget]
        return (min(free, key=lambda part: (used[part], self._count_running(part))), None) if free else None

    def _count_running(self, part: int) -> int:
        return sum(slot // self.per_part == part for slot in self.running)

    def _free(self, part: int, source: int | None) -> int:
        """A free slot, if possible one that holds no prompt, and not that of `source`."""
        free = [slot for slot in range(self.per_part) if part * self.per_part + slot not in self.running]
        return min(free, key=lambda slot: (slot == source, slot in self._held[part], slot))

    def _pack(
        self,
        packed: list[list[tuple[int, Sequence[int]]]],
        copied: list[list[tuple[int, int]]],
        admitted: dict[int, SampleRequest],
    ) -> Admission:
        tokens = max(sum(len(ids) for _, ids in of_part) for of_part in packed)
        shape = (self.parts, round_length(tokens) if tokens else 0)
        ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        none = np.full((self.parts, self.per_part), self.per_part, np.int32)
        slots, starts, sources, targets = none.copy(), np.zeros_like(none), np.zeros_like(none), none.copy()
        for part, prompts in enumerate(packed):
            start = 0
            for i, (slot, prompt) in enumerate(prompts):
                stop = start + len(prompt)
                ids[part, start:stop], positions[part, start:stop] = prompt, np.arange(len(prompt))
                slots[part, i], starts[part, i] = slot, start
                start = stop
            for i, (source, target) in enumerate(copied[part]):
                sources[part, i], targets[part, i] = source, target
        inserts, copies = (max(map(len, lists)) for lists in (packed, copied))
        return Admission(ids, positions, slots, starts, inserts, sources, targets, copies, admitted)
