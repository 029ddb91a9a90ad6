"""Annotated utterances: a file whose truth was counted by hand, and that records are consecutive rows of their log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_jax.data.mining.config import ModerationRules, WildFeedbackRules
from drift_jax.data.mining.mined import Mined
from drift_jax.data.mining.text_rows import BadRow
from drift_jax.data.mining.wildfeedback import LabelledConversations
from tests.mining.utterances import agent, user, without

# What comes of each conversation stands beside it; numbers are those of the rows, from 1.
ROWS = [
    # A complaint, and a revised reply that satisfied: dsat 3, sat 5, seed 5.
    user(0, "a0"), agent(1, "a1"), user(2, "a2", dsat=True), agent(3, "a3"), user(4, "a4", sat=True),
    # Both labels, then a plain turn: dsat 8, never sat.
    user(0, "b0"), agent(1, "b1"), user(2, "b2", dsat=True, sat=True), agent(3, "b3"), user(4, "b4"),
    # Booleans that are missing are false: nothing. Then SAT without a complaint: sat 15.
    user(0, "c0"), agent(1, "c1"), without(user(2, "c2"), "Satisfaction", "Disatisfaction"), agent(3, "c3"),
    user(4, "c4", dsat=None, sat=True),
    # A complaint as first row has no reply to complain about.
    user(0, "d0", dsat=True), agent(1, "d1"),
    # The agent row 1 is missing: neither label counts, nor does the one after.
    user(0, "e0"), user(2, "e2", dsat=True), agent(3, "e3"), user(4, "e4", sat=True),
    # The same, with numbers that go on.
    user(0, "f0"), user(1, "f1", dsat=True),
    # `Preceeding` is not YES: a new topic, or not known.
    user(0, "g0"), agent(1, "g1"), user(2, "g2", "NO", dsat=True), agent(3, "g3"), user(4, "g4", None, sat=True),
    # An empty reply, an empty complaint.
    user(0, "h0"), agent(1, " "), user(2, "h2", dsat=True),
    user(0, "i0"), agent(1, "i1"), user(2, None, dsat=True),
    # Two complaints in a row, then satisfied: dsat 37, dsat 39, sat 41, and one seed, from the second complaint.
    user(0, "j0"), agent(1, "j1"), user(2, "j2", dsat=True), agent(3, "j3"), user(4, "j4", dsat=True), agent(5, "j5"),
    user(6, "j6", sat=True),
    # Satisfied, but two turns after the complaint: dsat 44, sat 48, no seed.
    user(0, "k0"), agent(1, "k1"), user(2, "k2", dsat=True), agent(3, "k3"), user(4, "k4"), agent(5, "k5"),
    user(6, "k6", sat=True),
    # A label on an agent row judges nothing.
    user(0, "l0"), agent(1, "l1") | {"Disatisfaction": True},
]  # fmt: skip


def mine(rows: Iterable[Any], **rules: Any) -> tuple[list[Mined], LabelledConversations, list[tuple[int, str]]]:
    refused: list[tuple[int, str]] = []
    reader = LabelledConversations(WildFeedbackRules(**rules), ModerationRules())
    mined = list(reader.mine("f", enumerate(rows, start=1), lambda source, row, why: refused.append((row, why))))
    return mined, reader, refused


def names(mined: Iterable[Mined], kind: str) -> list[int]:
    return [int(one.id.removeprefix("f:")) for one in mined if one.kind == kind]


def test_the_truth_that_was_counted_by_hand() -> None:
    mined, reader, refused = mine(ROWS)
    assert refused == [] and reader.conversations == 12
    assert names(mined, "dsat") == [3, 8, 37, 39, 44]
    assert names(mined, "sat") == [5, 15, 41, 48]
    assert names(mined, "seed") == [5, 41]
    assert {key: count for key, count in reader.left_out.items() if count} == {
        "sat: both labels": 1,
        "dsat: first row of its conversation": 1,
        "dsat: no agent row before it": 2,
        "sat: rows of the conversation are missing": 1,
        "dsat: Preceeding is not YES": 1,
        "sat: Preceeding is not YES": 1,
        "dsat: empty content": 2,
    }
    assert reader.labels == {
        "DSAT": 11, "SAT": 7, "both": 1, "missing Disatisfaction": 2, "missing Satisfaction": 1, "on an agent row": 1,
    }  # fmt: skip


def test_the_parts_of_a_record() -> None:
    mined, _, _ = mine(ROWS)
    seed = [one for one in mined if one.kind == "seed"][1]
    assert [(m.role, m.content) for m in seed.prompt] == [("user", "j0"), ("assistant", "j1"), ("user", "j2")]
    assert (seed.reply, seed.feedback, seed.revised) == ("j3", "j4", "j5")
    assert (seed.id, seed.conversation, seed.turn) == ("f:41", "f:35", 3)


@pytest.mark.parametrize(("both", "dsat", "sat"), [("dsat", [3], []), ("sat", [], [3]), ("neither", [], [])])
def test_the_rule_for_both_labels(both: str, dsat: list[int], sat: list[int]) -> None:
    rows = [user(0, "a"), agent(1, "b"), user(2, "c", dsat=True, sat=True)]
    mined, reader, _ = mine(rows, both_labels=both)
    assert (names(mined, "dsat"), names(mined, "sat")) == (dsat, sat)
    assert reader.left_out.total() == 2 - len(dsat) - len(sat) and reader.labels["both"] == 1


def test_the_rules_for_missing_booleans_and_for_preceding() -> None:
    rows = [user(0, "a"), agent(1, "b"), without(user(2, "c", "NO", dsat=True), "Satisfaction")]
    assert names(mine(rows, preceding="any")[0], "dsat") == [3]
    assert names(mine(rows)[0], "dsat") == []
    _, _, refused = mine(rows, missing_label="bad_row", preceding="any")
    assert refused == [(3, "Satisfaction is missing (rule wildfeedback.missing_label: bad_row)")]


@pytest.mark.parametrize("true, false", [("True", "False"), ("true", "false"), (1.0, 0.0)])
def test_booleans_as_csv_and_pandas_have_them(true: Any, false: Any) -> None:
    rows = [user(0, "a", dsat=false, sat=float("nan")), agent(1, "b"), user(2, "c", dsat=true, sat=false)]
    rows = [row | {"UtteranceId": float(row["UtteranceId"])} for row in rows]
    mined, _, refused = mine(rows)
    assert (names(mined, "dsat"), names(mined, "sat"), refused) == ([3], [], [])
    assert "both_labels" not in mined[0].evidence


@pytest.mark.parametrize("true, false", [("True", "False"), ("true", "false"), (1.0, 0.0), (True, False)])
@pytest.mark.parametrize("flag", ["toxic", "redacted"])
def test_flags_as_csv_and_pandas_have_them(flag: str, true: Any, false: Any) -> None:
    rows = [user(0, "a"), agent(1, "b"), user(2, "c", dsat=True)]
    mined, reader, refused = mine(
        [row | {flag: false, "toxic" if flag == "redacted" else "redacted": ""} for row in rows]
    )
    assert (names(mined, "dsat"), refused) == ([3], []) and not reader.left_out
    mined, reader, refused = mine([row | {flag: true} for row in rows])
    assert (mined, refused, dict(reader.left_out)) == ([], [], {f"dsat: {flag}": 1})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"UtteranceId": "x"}, "UtteranceId must be an integer of at least 0, found 'x'"),
        ({"UtteranceId": -1}, "UtteranceId must be an integer of at least 0, found -1"),
        ({"UtteranceId": True}, "UtteranceId must be an integer of at least 0, found True"),
        ({"Role": "Bot"}, "Role must be User or Agent, found 'Bot'"),
        ({"Content": 7}, "Content must be a string, found 7"),
        ({"Disatisfaction": "maybe"}, "Disatisfaction must be true or false, found 'maybe'"),
        ({"Satisfaction": [True]}, "Satisfaction must be true or false, found [True]"),
        ({"toxic": "perhaps"}, "toxic must be true or false, found 'perhaps'"),
    ],
)
def test_a_row_that_breaks_the_format(change: dict[str, Any], why: str) -> None:
    """It is refused with its reason, and no record reaches across it."""
    rows = [user(0, "a"), agent(1, "b") | change, user(2, "c", dsat=True), user(0, "d"), agent(1, "e")]
    mined, _, refused = mine([*rows, user(2, "f", dsat=True)])
    assert refused == [(2, why)] and names(mined, "dsat") == [6]


def test_a_missing_row_may_have_begun_another_conversation() -> None:
    """Row 1 of the second conversation would follow row 0 of the first without a gap in the numbers."""
    rows = [user(0, "first"), BadRow("not JSON"), agent(1, "reply to another"), user(2, "c", dsat=True)]
    mined, reader, _ = mine(rows)
    assert mined == [] and reader.left_out == {"dsat: rows of the conversation are missing": 1}


def test_shards_go_on_where_the_one_before_ended_and_inputs_do_not() -> None:
    rows = [user(0, "a"), agent(1, "b"), user(2, "c", dsat=True)]
    for apart in (False, True):
        reader = LabelledConversations(WildFeedbackRules(), ModerationRules())
        found = list(reader.mine("x", enumerate(rows[:2], 1), pytest.fail))
        if apart:
            reader.break_off()
        found += list(reader.mine("y", enumerate(rows[2:], 1), pytest.fail))
        assert [one.id for one in found] == ([] if apart else ["y:1"])


def test_flags_of_rows_are_respected() -> None:
    rows = [user(0, "a"), agent(1, "b") | {"toxic": True}, user(2, "c", dsat=True)]
    mined, reader, _ = mine(rows)
    assert mined == [] and reader.left_out == {"dsat: toxic": 1}
    kept = LabelledConversations(WildFeedbackRules(), ModerationRules(toxic="keep"))
    assert len(list(kept.mine("f", enumerate(rows, 1), pytest.fail))) == 1


LABEL = st.sampled_from([True, False, None])
ROW = st.fixed_dictionaries(
    {
        "UtteranceId": st.integers(0, 7),
        "Role": st.sampled_from(["User", "Agent"]),
        "Content": st.sampled_from(["", " "]) | st.text(min_size=1, max_size=6),
        "Preceeding": st.sampled_from(["YES", "NO", None]),
        "Satisfaction": LABEL,
        "Disatisfaction": LABEL,
    }
)


@st.composite
def logs(draw: st.DrawFn) -> list[Any]:
    """Conversations in order, some rows of which are lost, broken or others."""
    rows: list[Any] = []
    for _ in range(draw(st.integers(1, 4))):
        for place in range(draw(st.integers(1, 8))):
            row = draw(ROW)
            fit = {"UtteranceId": place, "Role": "Agent" if place % 2 else "User"}
            keep = draw(st.integers(0, 9))
            rows += [] if keep == 0 else [BadRow("broken")] if keep == 1 else [row | (fit if keep > 2 else {})]
    return rows


@settings(max_examples=150, deadline=None)
@given(logs())
def test_records_are_consecutive_rows_letter_by_letter(rows: list[Any]) -> None:
    mined, reader, _ = mine(rows)
    for one in mined:
        parts = [*(m.content for m in one.prompt), one.reply, one.feedback]
        end = int(one.id.removeprefix("f:")) - (2 if one.kind == "seed" else 0)
        log = rows[end - len(parts) : end]
        assert [row["Content"] for row in log] == parts
        assert [row["UtteranceId"] for row in log] == list(range(len(parts)))
        assert [row["Role"] for row in log] == ["User", "Agent"] * (len(parts) // 2) + ["User"]
        assert log[-1]["Preceeding"] == "YES" and log[-1]["Satisfaction" if one.kind == "sat" else "Disatisfaction"]
        assert all(text.strip() for text in parts)
        if one.kind == "seed":
            assert rows[end]["Content"] == one.revised and rows[end + 1]["Satisfaction"]
    for kind, label in (("dsat", "DSAT"), ("sat", "SAT")):  # a label gives a record, or is counted under a reason
        left = sum(count for reason, count in reader.left_out.items() if reason.startswith(f"{kind}:"))
        assert sum(one.kind == kind for one in mined) + left == reader.labels[label]
