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
        while self.waiting:
            request = self.waiting[0]
            # Packed prompts are written before slots are copied: what is still to be copied must not be written over.
            sources = [{source for source, _ in of_part} for of_part in copied]
            choice = self._choose_slot(request, used, sources)
            if choice is None:
                break
            part, slot, source = choice
            self.waiting.popleft()
            if source is not None:
                copied[part].append((source, slot))
            elif len(request.prompt_ids) > 1:
                packed[part].append((slot, request.prompt_ids[:-1]))
                used[part] += len(request.prompt_ids) - 1
            self._held[part][slot] = request.prompt_ids
            admitted[part * self.per_part + slot] = request
            self.running[part * self.per_part + slot] = request
        return self._pack(packed, copied, admitted) if admitted else None

    def _choose_slot(
        self, request: SampleRequest, used: list[int], sources: list[set[int]]
    ) -> tuple[int, int, int | None] | None:
        """(part, free slot of it, another slot of it with the same prompt)."""
        free = [self._free(part) for part in range(self.parts)]
        for part, slots in enumerate(free):
            held = (slot for slot, ids in self._held[part].items() if ids == request.prompt_ids)
            if slots and (source := next(held, None)) is not None:
                # The only slot that is left may be that of the prompt itself: then it is taken as it is.
                return part, min(slots, key=lambda slot: (slot == source, slot in self._held[part], slot)), source
        tokens = len(request.prompt_ids) - 1
        writable = [[slot for slot in slots if slot not in sources[part]] for part, slots in enumerate(free)]
        fitting = [p for p in range(self.parts) if writable[p] and (used[p] == 0 or used[p] + tokens <= self.budget)]
        if not fitting:
            return None
        part = min(fitting, key=lambda p: (used[p], -len(free[p])))
        return part, min(writable[part], key=lambda slot: (slot in self._held[part], slot)), None

    def _free(self, part: int) -> list[int]:
        return [slot for slot in range(self.per_part) if part * self.per_part + slot not in self.running]

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
