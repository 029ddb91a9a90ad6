"""What there is to say about mined records: counts, lengths, turns, and a few examples drawn by a hash."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from typing import Any, final

from drift_jax.data.mining.mined import KINDS
from drift_jax.records import Row

_EXAMPLES = 12
_LONGEST_BIN = 20  # 2**20 characters and more


@final
class Tally:
    """Counts rows of the files one by one; holds numbers and the examples."""

    def __init__(self, seed: int) -> None:
        self.records = {kind: Counter({"test": 0, "train": 0}) for kind in KINDS}
        self.turns: dict[str, Counter[int]] = {kind: Counter() for kind in KINDS}
        self._lengths: dict[str, Counter[int]] = {}
        self._sums: Counter[str] = Counter()
        self._examples: list[tuple[int, str, Row]] = []  # a heap: the one to go first is in front
        self._seed = seed

    def add(self, kind: str, split: str, row: Row) -> None:
        """`row` is one of dsat.jsonl, sat.jsonl or seed.*.jsonl."""
        self.records[kind][split] += 1
        self.turns[kind][1 + sum(message["role"] == "user" for message in row["prompt"])] += 1
        if kind != "dsat":
            return
        self._measure("prompt", sum(len(message["content"]) for message in row["prompt"]))
        self._measure("rejected", len(row["rejected"][0]["content"]))
        self._measure("user_preference", len(row["user_preference"]["content"]))
        place = hashlib.sha256(f"{self._seed}\0{row['id']}".encode()).digest()
        entry = (-int.from_bytes(place[:8], "big"), row["id"], row)
        (heapq.heappush if len(self._examples) < _EXAMPLES else heapq.heappushpop)(self._examples, entry)

    @property
    def examples(self) -> list[Row]:
        """DSAT rows with the smallest hash of seed and id: as good as drawn, and the same in every run."""
        return [row for _, _, row in sorted(self._examples, key=lambda entry: (-entry[0], entry[1]))]

    def _measure(self, part: str, length: int) -> None:
        self._sums[part] += length
        self._lengths.setdefault(part, Counter())[min(_LONGEST_BIN, max(0, length - 1).bit_length())] += 1

    def lengths(self) -> dict[str, Any]:
        """Of DSAT records, in characters: the mean, and how many have at most 2, 4, 8, ... and more than half of it."""
        found = {}
        for part, bins in self._lengths.items():
            count = sum(bins.values())
            counts = {str(2**i): bins[i] for i in range(min(bins), max(bins) + 1)}
            found[part] = {"mean": round(self._sums[part] / count, 1), "up_to": counts}
        return found
