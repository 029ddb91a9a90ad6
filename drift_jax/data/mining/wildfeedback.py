"""WildFeedback's annotated utterances: one row each, in order; a user row's label judges the agent row before it.

For a DSAT user row n of a conversation: prompt = rows 0..n-2, rejected = row n-1, user_preference = row n. A seed pair
is DSAT at n and SAT at n + 2: chosen = row n+1, rejected = row n-1, the same prompt. A conversation begins where
`UtteranceId` is 0; rows must follow it without a gap, from user to agent in turn. Where they do not, the labels behind
are counted under the reason, and so are labels whose rule (config section `wildfeedback`) lets them not count.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, final

from drift_jax.data.mining.config import ModerationRules, WildFeedbackRules
from drift_jax.data.mining.mined import Mined
from drift_jax.data.mining.text_rows import BadRow, Numbered, name_keys
from drift_jax.records import Message, Row

# As published, spelling included.
COLUMNS = (
    "UtteranceId",
    "TurnId",
    "Role",
    "Content",
    "Preceeding",
    "Satisfaction",
    "Disatisfaction",
    "Satisfaction-Justificiation",
    "Dissatisfaction-Justificiation",
    "State",
    "toxic",
    "redacted",
)
FIRST_ROW = "first row of its conversation"
NO_AGENT = "no agent row before it"
GAP = "rows of the conversation are missing"
TURNS = "roles do not alternate"
EMPTY = "empty content"
NOT_PRECEDING = "Preceeding is not YES"
BOTH = "both labels"
Refuse = Callable[[str, int, str], None]  # takes source, row and reason

_COLUMNS_OF = {
    "dsat": ("Disatisfaction", "Dissatisfaction-Justificiation"),
    "sat": ("Satisfaction", "Satisfaction-Justificiation"),
}
_ROLES = {"User": "user", "Agent": "assistant"}
_BOOLEANS = {True: True, False: False, "true": True, "false": False, "": None, "nan": None, "none": None, "null": None}


class Label(NamedTuple):
    """Which of the two labels of a row are true."""

    dsat: bool
    sat: bool


@final
class LabelledConversations:
    """Reads rows one after the other; holds the rows of one conversation."""

    def __init__(self, rules: WildFeedbackRules, moderation: ModerationRules) -> None:
        self.conversations = 0
        self.labels: Counter[str] = Counter()  # what stands in the rows
        self.left_out: Counter[str] = Counter()  # kind: reason -> labels that gave no record
        self._rules, self._moderation = rules, moderation
        self._start_conversation("", GAP)

    def mine(self, source: str, rows: Iterable[Numbered], refuse: Refuse) -> Iterator[Mined]:
        """Records, in the order of the rows that give the feedback; rows that break the format go to `refuse`.

        A conversation goes on from one source to the next, as shards have it, unless `break_off` is called in between.
        """
        for number, row in rows:
            try:
                if isinstance(row, BadRow):
                    raise ValueError(row.why)
                label = self._add(source, number, row)
            except ValueError as error:
                refuse(source, number, str(error))
                self.break_off()
                continue
            if label is not None:
                yield from self._judge(f"{source}:{number}", label, row)

    def break_off(self) -> None:
        """A row is missing here. Whose it was is not known: it may have been the first of another conversation."""
        self._trouble = self._trouble or GAP
        self._role = ""

    def _start_conversation(self, name: str, trouble: str) -> None:
        self._name = name
        self._turns: list[str] = []  # from user to agent in turn
        self._trouble = trouble  # why no record can be made from here on
        self._role = self._role_before = ""  # of the last row and of the one before it; empty: there is none
        self._complaint: tuple[int, Mined] | None = None  # the last DSAT record, and how many turns there were

    def _add(self, source: str, number: int, row: Row) -> Label | None:
        """Takes a row into the conversation; its labels if one is true. Raises `ValueError` for a broken row."""
        place = row.get("UtteranceId")
        if type(place) is not int or place < 0:
            place = _integer(row)
        name = row.get("Role")
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise ValueError(f"Role must be User or Agent, found {row.get('Role')!r:.80}")
        content = row.get("Content")
        if content is None:
            content = ""
        elif type(content) is not str:
            raise ValueError(f"Content must be a string, found {content!r:.80}")
        dsat, sat = row.get("Disatisfaction"), row.get("Satisfaction")
        if type(dsat) is not bool or type(sat) is not bool:
            if role == "assistant" and dsat is None and sat is None:  # as it should be
                dsat = sat = False
            else:
                dsat, sat = self._boolean("Disatisfaction", dsat, role), self._boolean("Satisfaction", sat, role)
        flag = self._flag(row)
        if place == 0:
            self.conversations += 1
            self._start_conversation(f"{source}:{number}", "")
        self._role_before, self._role = self._role, role
        if not self._trouble:
            if place != len(self._turns):
                self._trouble = GAP
            elif role != ("assistant" if place & 1 else "user"):
                self._trouble = TURNS
            elif not content or content.isspace():
                self._trouble = EMPTY
            elif flag:
                self._trouble = flag
            else:
                self._turns.append(content)
        return Label(dsat, sat) if dsat or sat else None

    def _flag(self, row: Row) -> str:
        """The first flag by which the row is left out, and all behind it."""
        for flag in ("toxic", "redacted"):
            value = row.get(flag)
            if value and (value is True or _read_boolean(flag, value)) and getattr(self._moderation, flag) == "drop":
                return flag
        return ""

    def _judge(self, name: str, label: Label, row: Row) -> Iterator[Mined]:
        """What the labels of the row that was added last say about the rows before it."""
        if self._role != "user":
            self.labels["on an agent row"] += 1
            return
        held, reason = self._resolve(label), self._why_not(row)
        if reason:
            for kind, holds in zip(("dsat", "sat"), held, strict=True):
                self.left_out.update([f"{kind}: {reason}"] * holds)
            return
        *before, reply, feedback = self._turns
        prompt = tuple(Message(role, text) for role, text in zip(itertools.cycle(_ROLES.values()), before))
        if held.dsat:
            found = Mined("dsat", name, self._name, prompt, reply, feedback, evidence=_evidence(row, "dsat", label))
            self._complaint = len(self._turns), found
            yield found
        if held.sat:
            evidence = _evidence(row, "sat", label)
            yield Mined("sat", name, self._name, prompt, reply, feedback, evidence=evidence)
            turns, first = self._complaint or (0, None)
            if first is not None and turns == len(self._turns) - 2:
                evidence = {"complaint": first.evidence, "satisfied": evidence}
                yield dataclasses.replace(first, kind="seed", id=name, revised=reply, evidence=evidence)

    def _resolve(self, label: Label) -> Label:
        """Counts the labels of a user row, and says which of them hold."""
        self.labels["DSAT"] += label.dsat
        self.labels["SAT"] += label.sat
        if not (label.dsat and label.sat):
            return label
        self.labels["both"] += 1
        held = self._rules.both_labels
        for kind in ("dsat", "sat"):
            self.left_out.update([f"{kind}: {BOTH}"] * (held != kind))
        return Label(held == "dsat", held == "sat")

    def _why_not(self, row: Row) -> str:
        if not self._role_before:
            return FIRST_ROW if len(self._turns) == 1 and not self._trouble else self._trouble or GAP
        if self._role_before != "assistant":
            return NO_AGENT
        if self._trouble:
            return self._trouble
        preceding = row.get("Preceeding")
        if self._rules.preceding == "yes" and not (type(preceding) is str and preceding.strip().upper() == "YES"):
            return NOT_PRECEDING
        return ""

    def _boolean(self, column: str, value: Any, role: str) -> bool:
        """A label. Missing ones follow `missing_label`."""
        read = _read_boolean(column, value)
        if read is None and role == "user":
            self.labels[f"missing {column}"] += 1
            if self._rules.missing_label == "bad_row":
                raise ValueError(f"{column} is missing (rule wildfeedback.missing_label: bad_row)")
        return bool(read)


def _read_boolean(column: str, value: Any) -> bool | None:
    """Text and numbers are read too, as CSV and pandas have them; None: it is missing. Raises `ValueError`."""
    key = value.strip().lower() if isinstance(value, str) else value
    if isinstance(key, (list, dict)) or (key is not None and key == key and key not in _BOOLEANS):
        raise ValueError(f"{column} must be true or false, found {value!r:.80}")
    return None if key is None or key != key else _BOOLEANS[key]


def _integer(row: Row) -> int:
    """The row's UtteranceId: CSV has text, pandas floats."""
    value: Any = row.get("UtteranceId")
    try:
        number = float(value)
        if number == int(number) and number >= 0 and not isinstance(value, bool):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    found = name_keys(row) if value is None else f", found {value!r:.80}"
    raise ValueError(f"UtteranceId must be an integer of at least 0{found}")


def _evidence(row: Row, kind: str, label: Label) -> dict[str, Any]:
    column, reasons = _COLUMNS_OF[kind]
    evidence: dict[str, Any] = {"by": "label", "label": column}
    if label.dsat and label.sat:
        evidence["both_labels"] = True
    if isinstance(row.get(reasons), str) and row[reasons].strip():
        evidence["justification"] = row[reasons]
    return evidence
