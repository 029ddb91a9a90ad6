"""Who gets which slot: every request once, no slot twice, prompts packed within a budget, copies of what is there."""

from __future__ import annotations

import numpy as np
import pytest

from drift_jax.sampling.base import SampleRequest
from drift_jax.sampling.slots import Admission, SlotTable


def build_table(lengths: list[int], samples: int, parts: int, per_part: int, budget: int) -> SlotTable:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 100, n).tolist()) for n in lengths]
    requests = [SampleRequest(str(i), n, ids) for i, ids in enumerate(prompts) for n in range(samples)]
    return SlotTable(requests, parts, per_part, budget)


def apply(admission: Admission, cache: dict[tuple[int, int], list[int]]) -> None:
    """What the device does: prompts without their last token into slots, then copies one after the other."""
    parts, count = admission.slots.shape
    for part in range(parts):
        for i in range(admission.inserts):
            slot, start = admission.slots[part, i], admission.starts[part, i]
            if slot < count:
                row, places = admission.ids[part], admission.positions[part]
                ends = [at for at in range(start + 1, len(row)) if places[at] == 0]
                cache[part, slot] = row[start : min(ends, default=len(row))].tolist()
        for i in range(admission.copies):
            source, target = admission.sources[part, i], admission.targets[part, i]
            if target < count:
                cache[part, target] = cache.get((part, source), [])  # a prompt of one token is nowhere


@pytest.mark.parametrize("parts,per_part,samples", [(1, 4, 1), (1, 1, 3), (2, 3, 2), (4, 2, 3), (1, 8, 5)])
def test_every_request_finds_its_prompt_in_a_slot_of_its_own(parts: int, per_part: int, samples: int) -> None:
    lengths = [5, 9, 2, 1, 30, 7, 7, 12, 300, 3] * 3
    table = build_table(lengths, samples, parts, per_part, budget=64)
    rng, cache, seen, computed = np.random.default_rng(1), {}, [], 0
    while table.waiting or table.running:
        while (admission := table.admit()) is not None:
            assert admission.ids.shape[1] <= 384
            apply(admission, cache)
            computed += int((admission.slots < per_part).sum())
            for slot, request in admission.requests.items():
                assert table.running[slot] is request
                if len(request.prompt_ids) > 1:
                    assert cache[divmod(slot, per_part)] == list(request.prompt_ids[:-1])
                seen.append((request.row_id, request.sample))
        assert table.running
        for slot in rng.permutation(sorted(table.running))[: 1 + rng.integers(len(table.running))]:
            table.release(int(slot))
    assert sorted(seen) == sorted((str(i), n) for i in range(len(lengths)) for n in range(samples))
    if parts == 1:
        assert computed == sum(length > 1 for length in lengths)  # once each, whatever the samples


def test_a_packed_row_keeps_to_its_budget_unless_a_prompt_is_longer() -> None:
    table = build_table([60] * 6 + [500], 1, 1, 8, budget=128)
    sizes = []
    while (admission := table.admit()) is not None:
        sizes.append((len(admission.requests), admission.ids.shape[1]))
    assert sizes == [(2, 128), (2, 128), (2, 128), (1, 512)]
