"""Logs without labels, and scored responses: what is read of a row, what is left out, and why."""

from __future__ import annotations

from typing import Any

import pytest

from drift_jax.data.mining.config import ModerationRules, UltraFeedbackRules
from drift_jax.data.mining.dialogue import Conversation
from drift_jax.data.mining.logs import Conversations
from drift_jax.data.mining.mined import Mined
from drift_jax.data.mining.text_rows import BadRow
from drift_jax.data.mining.ultrafeedback import ScoredPrompts

SAID = ("hi", "hello", "No, really", "oh")


def said(*texts: Any, keys: tuple[str, str] = ("role", "content"), start: int = 0) -> list[dict[str, Any]]:
    return [{keys[0]: ("user", "assistant")[(i + start) % 2], keys[1]: text} for i, text in enumerate(texts)]


def read(log_format: str, *rows: Any, **moderation: Any) -> tuple[list[Conversation], Conversations, list[str]]:
    refused: list[str] = []
    reader = Conversations(log_format, ModerationRules(**moderation))
    found = list(reader.read("f", enumerate(rows, 1), lambda source, row, why: refused.append(f"{row}: {why}")))
    return found, reader, refused


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in conversation.turns]


EXPECTED = [("user", "hi"), ("assistant", "hello"), ("user", "No, really"), ("assistant", "oh")]


def test_the_same_conversation_in_three_formats() -> None:
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[turn["role"]], "value": turn["content"]} for turn in said(*SAID)]
    rows = {
        "wildchat": {"conversation_hash": "abc", "conversation": said(*SAID), "country": "X"},
        "messages": {"messages": said(*SAID)},
        "sharegpt": {"id": "sg_1", "conversations": sharegpt},
    }
    ids = {"wildchat": "f:1:abc", "messages": "f:1", "sharegpt": "f:1:sg_1"}
    for log_format, row in rows.items():
        (found,), reader, refused = read(log_format, row)
        assert turns(found) == EXPECTED and found.id == ids[log_format]
        assert (reader.count, refused, reader.left_out, reader.cut) == (1, [], {}, {})


def test_system_messages_and_messages_in_parts() -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    row = {"messages": [{"role": "developer", "content": "Be brief."}, *said(parts, *SAID[1:])]}
    (found,), _, _ = read("messages", row)
    assert turns(found) == [("system", "Be brief."), *EXPECTED]


@pytest.mark.parametrize(
    ("more", "cut"),
    [
        (said("again", start=1), "roles do not alternate"),
        (said(" "), "empty content"),
        (said(None), "empty content"),
        ([{"role": "tool", "content": "42"}], "another speaker"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "not text alone"),
        ([{"role": "system", "content": "late"}], "roles do not alternate"),
    ],
)
def test_a_conversation_is_kept_up_to_what_no_record_can_hold(more: list[Any], cut: str) -> None:
    (found,), reader, _ = read("messages", {"messages": [*said(*SAID), *more, *said("x", "y")]})
    assert turns(found) == EXPECTED and reader.cut == {cut: 1}


def test_tool_calls_end_a_conversation() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    found, reader, _ = read("messages", {"messages": [*said("hi"), call, *said("x")]})
    assert found == [] and reader.left_out == {"tool call (turn 2)": 1}


def test_what_holds_no_complaint() -> None:
    rows = [{"messages": []}, {"messages": said("a", "b")}, {"messages": said("a", "b", "c", start=1)}]
    found, reader, _ = read("messages", *rows)
    assert found == [] and reader.count == 3
    assert reader.left_out == {"no user turn after a reply": 2, "roles do not alternate (turn 1)": 1}


@pytest.mark.parametrize(
    ("flags", "turn_flags", "reason"),
    [
        ({"toxic": True}, {}, "toxic"),
        ({}, {"toxic": True}, "toxic"),
        ({"redacted": True}, {}, "redacted"),
        ({}, {"redacted": True}, "redacted"),
        ({"openai_moderation": [{"flagged": False}, {"flagged": True}]}, {}, "moderated"),
    ],
)
def test_flags_are_respected(flags: dict[str, Any], turn_flags: dict[str, Any], reason: str) -> None:
    row = {"conversation": [turn | turn_flags for turn in said(*SAID)], "toxic": False, "redacted": False} | flags
    found, reader, _ = read("wildchat", row)
    assert found == [] and reader.left_out == {reason: 1}
    found, reader, _ = read("wildchat", row, **{reason: "keep"})
    assert len(found) == 1 and reader.left_out == {}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chat": []}, "messages must be a list of turns; the row holds chat"),
        ({"messages": ["hi"]}, "messages[0] must be an object with role and content"),
        ({"messages": said(7)}, "messages[0].content must be text, found 7"),
        ({"messages": said(["hi"])}, "messages[0]: a part must be an object, found 'hi'"),
        ({"messages": said(*SAID), "toxic": "perhaps"}, "toxic must be true or false, found 'perhaps'"),
        ({"messages": said(*SAID), "openai_moderation": "no"}, "openai_moderation must be a list, found 'no'"),
        (BadRow("not JSON"), "not JSON"),
    ],
)
def test_rows_that_break_the_format(row: Any, why: str) -> None:
    found, reader, refused = read("messages", row, {"messages": said(*SAID)})
    assert refused == [f"1: {why}"] and len(found) == reader.count == 1


# --- UltraFeedback -------------------------------------------------------------------------------------------


def scored(*completions: tuple[Any, str, Any], instruction: str = "Do it.") -> dict[str, Any]:
    held = [
        {"model": f"m{i}", "overall_score": score, "response": response, "critique": critique}
        for i, (score, response, critique) in enumerate(completions)
    ]
    return {"source": "x", "instruction": instruction, "completions": held}


def judge(*rows: Any, **rules: Any) -> tuple[list[Mined], ScoredPrompts, list[str]]:
    refused: list[str] = []
    reader = ScoredPrompts(UltraFeedbackRules(**rules))
    found = list(reader.mine("f", enumerate(rows, 1), lambda source, row, why: refused.append(f"{row}: {why}")))
    return found, reader, refused


def test_the_lowest_and_the_highest_score() -> None:
    row = scored((7.0, "middle", "ok"), (3, "worst", "Too short."), (9.5, "best", "Fine."), (3.0, "as bad", "No."))
    found, _, refused = judge(row)
    assert refused == [] and [(one.kind, one.reply, one.feedback, one.revised) for one in found] == [
        ("dsat", "worst", "Too short.", ""),
        ("sat", "best", "Fine.", ""),
        ("seed", "worst", "Too short.", "best"),
    ]
    assert found[2].evidence["chosen"] == {"score": 9.5, "model": "m2"}


@pytest.mark.parametrize(
    ("row", "kinds", "left"),
    [
        (scored((5, "a", "bad"), (8.0, "b", "")), ["dsat"], {"seed: highest score is not above sat_above": 1}),
        (scored((5, "a", " "), (9, "b", "good")), [], {"dsat: no critique": 1, "seed: no critique": 1}),
        (scored((5, "a", "x"), (5, "b", "y")), [], {"dsat: no response has a lower score than another": 1}),
        (scored(("N/A", "a", "x"), (9, "b", "y")), [], {"completion: no score": 1}),
        (scored((5, "", "x"), (9, "b", "y")), [], {"completion: empty response": 1}),
        (scored((5, "a", "x"), (9, "b", "y"), instruction=" "), [], {"dsat: empty prompt": 1}),
        (scored(), [], {"dsat: no response has a lower score than another": 1}),
    ],
)
def test_what_gives_no_record(row: Any, kinds: list[str], left: dict[str, int]) -> None:
    found, reader, refused = judge(row)
    assert [one.kind for one in found] == kinds and refused == [] and left.items() <= reader.left_out.items()


def test_the_rule_is_a_config() -> None:
    row = {"task": {"text": "Q"}, "answers": [{"text": "bad", "by": {"score": 1}, "why": "wrong"}]}
    row["answers"] += [{"text": "good", "by": {"score": 4}, "why": "right"}]
    fields = {"prompt": "task.text", "completions": "answers", "response": "text", "score": "by.score"}
    found, _, _ = judge(row, **fields, critique="why", sat_above=3.0)
    assert [(one.kind, one.prompt[0].content, one.reply) for one in found][2] == ("seed", "Q", "bad")
    found, reader, _ = judge(row, **fields, critique="why", dsat_below=1.0)
    assert found == [] and reader.left_out["dsat: score is not below dsat_below"] == 1


def test_scored_rows_that_break_the_format() -> None:
    rows = [{"instruction": 3}, scored((True, "a", "x")), scored((5, None, "x")), scored(("five", "a", "x"))]
    _, reader, refused = judge(*rows)
    assert reader.count == 0 and refused == [
        "1: instruction must be text, found 3",
        "2: completions[0].overall_score must be a number, found True",
        "3: completions[0].response must be text, found None",
        "4: completions[0].overall_score must be a number, found 'five'",
    ]
