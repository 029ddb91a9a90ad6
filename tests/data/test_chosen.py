"""What may become a chosen response: texts that each rule refuses, and texts like them that it must let pass."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_jax.config import SamplingConfig
from drift_jax.data import chosen
from drift_jax.data.chosen import Candidate, refusal, repetition, similarity, speaks_for_another
from drift_jax.errors import ConfigError
from drift_jax.records import DsatRecord, Message, read_dsat

REPO = Path(__file__).resolve().parent.parent.parent
LOGGED = "Paris is the capital of France. It lies on the Seine and has two million inhabitants."
RECORD = DsatRecord("r", (Message("user", "What is the capital of France?"),), LOGGED, "I asked for one sentence.")
ALL_ON = SamplingConfig(on_cut="drop", same_language=True)


def reason(text: str, record: DsatRecord = RECORD, finish: str = "stop", **changes: Any) -> str | None:
    return refusal(Candidate(text, finish), record, dataclasses.replace(ALL_ON, **changes))


def asked(text: str) -> DsatRecord:
    return dataclasses.replace(RECORD, prompt=(Message("user", text),))


def test_a_good_reply_passes_all_rules() -> None:
    assert reason("The capital of France is Paris.") is None


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\u200b", "\ufeff\n"])
def test_a_reply_that_shows_nothing_is_empty(text: str) -> None:
    assert reason(text) == "empty"


@pytest.mark.parametrize("text", ["7", "...", "🙂", "不"])
def test_a_short_reply_is_not_empty(text: str) -> None:
    assert reason(text) is None


def test_the_logged_reply_again() -> None:
    assert reason(LOGGED.replace(". ", ".\n\n") + "\n") == "same as rejected"
    assert reason(LOGGED.replace("lies", "is")) == "near the rejected"
    assert reason(LOGGED.replace("lies", "is"), max_similarity=1.0) is None
    assert reason(LOGGED, max_similarity=1.0) == "same as rejected"
    assert reason(LOGGED.replace("It lies on the Seine and has", "There live")) is None
    assert similarity("abc", "abc") == 1 and similarity("abc", "xyz") == 0
    assert similarity("aaab", "aaac") == pytest.approx(0.75)  # one deletion and one insertion of eight characters


def test_a_thought_without_a_reply_is_refused() -> None:
    assert reason("\n<think>\nThe user asks for", finish="length", on_cut="keep") == "unfinished thought"
    assert reason("<think>\nWhich one?\n</think>\n\nThe capital is", finish="length", on_cut="keep") is None
    assert reason("Write <think> before a thought.") is None


def test_a_cut_reply_is_refused_unless_it_is_kept() -> None:
    assert reason("The capital of", finish="length") == "cut by length"
    assert reason("The capital of", finish="length", on_cut="resample") == "cut by length"
    assert reason("The capital of", finish="length", on_cut="keep") is None


# --- loops --------------------------------------------------------------------------------------------------

WALL = "bottles of beer on the wall"
BEER = "\n".join(
    f"{n} {WALL}, {n} bottles of beer. Take one down, pass it round, {n - 1} {WALL}." for n in range(12, 1, -1)
)
TABLE = "| name | a | b |\n| --- | --- | --- |\n" + "\n".join(f"| row {i} | 0 | 0 |" for i in range(30))
CODE = "```\n" + "\n".join(f"    x[{i}] = 0" for i in range(40)) + "\n```"
MATRIX = "The matrix is\n" + "\n".join(" ".join("1" if i == j else "0" for j in range(12)) for i in range(12))
REFRAIN = "\n\n".join(
    f"Verse {v} tells of {v} ships and of their crew.\nOh, sail away, sail away home." for v in "ABCDEF"
)
LOOPS = [
    "I am sorry. " * 40,
    "Here is the list:\n" + "- Read the book carefully.\n" * 30,
    "The answer depends on a number of things that I will explain now. " + "and " * 60,
    "That is a good question, and here is what I know of it. " * 2 + "So the reply is yes and no and" + " no and" * 40,
    "第一次世界大战" * 30,
    "para one.\n\npara two is longer than the first.\n\n" * 6,
]


@pytest.mark.parametrize("text", LOOPS)
def test_a_loop_is_refused(text: str) -> None:
    assert reason(text, finish="length") == "repeats itself"
    assert reason(text, max_repetition=1.0, same_language=False) is None


@pytest.mark.parametrize(
    "text", [BEER, TABLE, CODE, MATRIX, REFRAIN, "ha " * 20, "Merrily, merrily, merrily, merrily, " * 2]
)
def test_what_repeats_for_a_reason_passes(text: str) -> None:
    assert reason(text, same_language=False) is None


def test_digits_are_a_loop_where_they_ran_into_the_limit() -> None:
    assert reason(MATRIX, finish="length", on_cut="keep") == "repeats itself"
    assert reason("x = 0." + "3" * 200, finish="length") == "repeats itself"


@settings(max_examples=60, deadline=None)
@given(
    st.text("ab ", max_size=24), st.text("ab", min_size=1, max_size=40), st.integers(1, 12), st.text("ab ", max_size=24)
)
def test_the_share_is_that_of_a_search_by_hand(before: str, unit: str, times: int, after: str) -> None:
    text = before + unit * times + after
    assert repetition(text) == pytest.approx(by_hand(" ".join(text.split())))


def by_hand(text: str) -> float:
    longest = 0
    for start in range(len(text)):
        for period in range(1, (len(text) - start) // 4 + 1):
            end = start + period
            while end < len(text) and text[end] == text[end - period]:
                end += 1
            if end - start >= max(4 * period, 100):
                longest = max(longest, end - start)
    return longest / max(1, len(text))


# --- other speakers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Paris.\nUser: Thank you!\nAssistant: You are welcome.",
        "Paris.\n\nHuman: And of Spain?",
        "Paris.\n**User:** And of Spain?",
        "Paris.\nAssistant: Is there anything else?",
        "User: And of Spain?",
        "Paris.\n<|im_start|>user\nAnd of Spain?",
        "Paris.\n### Instruction:\nName the capital of Spain.",
        "Paris.\n[INST] And of Spain? [/INST]",
        "Answer: Paris\nUser: And of Spain?\nAssistant: Madrid",
    ],
)
def test_a_reply_that_goes_on_as_someone_else_is_refused(text: str) -> None:
    assert reason(text) == "speaks for another"
    assert reason(text, other_speakers="keep") is None


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("How is a log written?", "Write one line each:\n```\nUser: Hi\nAssistant: Hello\n```\nThat is all."),
        ("Write a dialogue of a user and an assistant.", "User: Hi!\nAssistant: Hello, what can I do for you?"),
        ("Continue:\nHuman: Hi\nAI: Hello", "Human: How are you?\nAI: Fine."),
        ("Which roles are there?", "These:\nAdmin: may do all\nUser: may read\nGuest: may log in"),
        ("Which roles are there?", "- **Admin**: may do all\n- **User**: may read"),
        ("Who wrote it?", "The field is User: the name of the author."),
        ("How do I mark a turn in ChatML, with <|im_start|>?", "With this line:\n<|im_start|>user\nthen the text."),
        ("What is a user?", "Users: those who use it.\nUser-defined: made by them."),
        ("Make a README.", "## User guide\n### User\nA person.\n### Input\nA file.\n"),
    ],
)
def test_a_label_that_belongs_to_the_reply_passes(prompt: str, text: str) -> None:
    record = asked(prompt)
    assert not speaks_for_another(text, record)


def test_a_control_token_that_the_text_hides_is_seen() -> None:
    candidate = Candidate("Paris.user\nAnd of Spain?", "stop", control_token="<|im_start|>")
    assert refusal(candidate, RECORD, ALL_ON) == "speaks for another"
    assert refusal(dataclasses.replace(candidate, control_token=None), RECORD, ALL_ON) is None


# --- languages ----------------------------------------------------------------------------------------------

GERMAN = "Die Hauptstadt von Frankreich ist Paris, eine Stadt an der Seine mit etwa zwei Millionen Einwohnern."
LONG = asked("Please tell me in one sentence which town is the capital of France, and how many people live there.")


def test_a_reply_in_another_language_is_refused_where_that_is_asked_for() -> None:
    assert reason(GERMAN, LONG) == "other language"
    assert reason(GERMAN, LONG, same_language=False) is None
    assert reason("The capital of France is Paris, a town on the Seine where two million people live.", LONG) is None
    assert reason("Die Hauptstadt ist Paris.", LONG) is None  # too short to tell
    assert reason(f"```\n{GERMAN}\n```", LONG) is None


def test_the_library_for_languages_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "py3langid.langid", None)
    chosen._language_identifier.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'drift-jax\[language\]'"):
        chosen.check_rules(ALL_ON)
    chosen.check_rules(SamplingConfig())
    chosen._language_identifier.cache_clear()


def test_real_replies_pass() -> None:
    """Those of the sample that is shipped, and what was said before in their dialogues."""
    path = REPO / "data/sample/dsat.jsonl"
    records = read_dsat(path).records
    assert len(records) > 50
    for record in records:
        other = dataclasses.replace(record, rejected="x")
        for text in (record.rejected, *(m.content for m in record.prompt if m.role == "assistant")):
            assert reason(text, other) is None, (record.id, text)
    assert json.loads(path.read_text().splitlines()[0])
