"""What mining finds: a reply in a log and the user turn that judges it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from drift_jax.records import DsatRecord, Message, Pair, Row, SatRecord, dsat_to_row, pair_to_row, sat_to_row

Kind = Literal["dsat", "sat", "seed"]
KINDS: tuple[Kind, ...] = ("dsat", "sat", "seed")


@dataclass(frozen=True)
class Mined:
    """One record before hygiene. `prompt`, `reply` and `feedback` are consecutive rows of the log, letter by letter."""

    kind: Kind
    id: str  # source:row of the feedback
    conversation: str
    prompt: tuple[Message, ...]
    reply: str  # the rejected one; of kind `sat` the one that satisfied
    feedback: str  # the user turn that judges the reply
    revised: str = ""  # kind `seed`: the reply after the complaint, which satisfied
    evidence: dict[str, Any] = field(default_factory=dict)  # why it counts: label, rules or verdict

    @property
    def turn(self) -> int:
        """Which user turn gives the feedback, from 1; a synthetic critique counts as one."""
        return 1 + sum(message.role == "user" for message in self.prompt)

    def texts(self) -> tuple[str, ...]:
        """Every text of the record."""
        return (*(message.content for message in self.prompt), self.reply, self.feedback, self.revised)

    def with_texts(self, texts: tuple[str, ...], evidence: dict[str, Any]) -> Mined:
        """The same record with other texts, in the order of `texts()`."""
        *contents, reply, feedback, revised = texts
        prompt = tuple(Message(m.role, content) for m, content in zip(self.prompt, contents, strict=True))
        changes = {"prompt": prompt, "reply": reply, "feedback": feedback, "revised": revised, "evidence": evidence}
        return dataclasses.replace(self, **changes)


def to_row(mined: Mined, split: str) -> Row:
    """The row of dsat.jsonl, sat.jsonl or seed.*.jsonl; what is known of it is in `meta`."""
    meta: Row = {"conversation": mined.conversation, "split": split, "evidence": mined.evidence}
    if mined.kind == "dsat":
        return dsat_to_row(DsatRecord(mined.id, mined.prompt, mined.reply, mined.feedback, {"meta": meta}))
    if mined.kind == "sat":
        return sat_to_row(SatRecord(mined.id, mined.prompt, mined.reply, mined.feedback, {"meta": meta}))
    meta = {"id": mined.id, **meta, "complaint": mined.feedback}
    return pair_to_row(Pair(mined.id, mined.prompt, mined.revised, mined.reply, meta))
