"""What hygiene refuses and, as often, what it lets pass; masking; and a split that no prompt crosses."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from typing import Any

import pytest

from drift_jax.data.mining.config import HygieneRules, SplitRules, load_mining_config
from drift_jax.data.mining.hygiene import EXACT, LANGUAGE, Hygiene, NearDuplicates, held_out, local_text
from drift_jax.data.mining.mined import Mined
from drift_jax.data.mining.pii import _IBAN_LENGTHS, mask
from drift_jax.errors import ConfigError
from drift_jax.records import Message

GERMAN = (
    "Das ist leider überhaupt nicht, was ich wissen wollte: Bitte erkläre mir, wie man Reis kocht, ohne dass er klebt."
)
ENGLISH = (
    "That is not at all what I wanted to know: please tell me how to cook rice so that it does not stick together."
)
WORDS = [f"word{i}" for i in range(500)]


def record(prompt: str = "How do I cook rice?", reply: str = "Boil it.", feedback: str = "No.", **more: Any) -> Mined:
    return Mined("dsat", "f:3", "f:1", (Message("user", prompt),), reply, feedback, **more)


@pytest.mark.parametrize(
    ("rules", "least", "reason"),
    [
        ({"min_complaint": 4}, record(feedback="abcd"), "complaint too short"),
        ({"max_complaint": 3}, record(feedback="abc"), "complaint too long"),
        ({"min_reply": 3}, record(reply="abc"), "reply too short"),
        ({"max_reply": 3}, record(reply="abc"), "reply too long"),
        ({"max_prompt": 3}, record(prompt="abc"), "prompt too long"),
    ],
)
def test_lengths_at_their_bounds(rules: dict[str, int], least: Mined, reason: str) -> None:
    step = -1 if "min" in next(iter(rules)) else 1

    def change(text: str) -> str:
        return text[:step] if step < 0 else text + "x"

    field = reason.split()[0]
    if field == "prompt":
        beyond = dataclasses.replace(least, prompt=(Message("user", change(least.prompt[0].content)),))
    else:
        name = {"complaint": "feedback", "reply": "reply"}[field]
        beyond = dataclasses.replace(least, **{name: change(getattr(least, name))})
    assert Hygiene(HygieneRules(**rules)).refuse(least) is None
    assert Hygiene(HygieneRules(**rules)).refuse(beyond) == reason


def test_languages() -> None:
    hygiene = Hygiene(HygieneRules(languages=("en",)))
    assert hygiene.refuse(record(ENGLISH, feedback=ENGLISH)) is None
    assert hygiene.refuse(record(GERMAN, feedback=GERMAN)) == LANGUAGE
    assert hygiene.refuse(record("Nein", feedback="Falsch!")) is None  # too short to tell
    assert Hygiene(HygieneRules(languages=("de",))).refuse(record(GERMAN, feedback=GERMAN)) is None


def test_exact_duplicates() -> None:
    hygiene = Hygiene(HygieneRules())
    assert hygiene.refuse(record()) is None
    assert hygiene.refuse(record(reply="Boil  it.\n")) == EXACT  # white space counts as one space
    assert hygiene.refuse(record(reply="Boil it!")) is None
    assert hygiene.refuse(dataclasses.replace(record(), kind="sat")) is None
    assert Hygiene(HygieneRules(exact_duplicates="keep")).refuse(record()) is None


def find_near(records: list[Mined], most: float) -> set[int]:
    near = NearDuplicates(most)
    for one in records:
        near.add(one)
    return near.find(lambda i: local_text(records[i]))


def test_near_duplicates_are_those_that_are_alike() -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=80)) for _ in range(60)]
    records = [record(reply=text) for text in texts]
    altered = [record(reply=text.replace(text.split()[40], "another")) for text in texts[:30]]
    shuffled = [record(reply=" ".join(sorted(text.split()))) for text in texts[30:]]
    found = find_near([*records, *altered, *shuffled], 0.9)
    assert found == set(range(60, 90))  # the later ones go; the same words in another order are another text
    assert find_near([*records, *altered], 1.0) == set() and find_near([], 0.9) == set()


def test_near_duplicates_of_short_texts_and_of_scripts_without_spaces() -> None:
    chinese = "请用中文写一封邮件,感谢我的老师多年来的支持与帮助,并邀请他参加我们的毕业典礼"
    records = [record(chinese, "a"), record(chinese + "吧", "a"), record("Yes", "b", "c"), record("No", "b", "c!")]
    assert find_near(records, 0.9) == {1}


def test_two_complaints_of_one_long_conversation_are_not_alike() -> None:
    said = tuple(Message(("user", "assistant")[i % 2], " ".join(WORDS)) for i in range(8))
    first = Mined("dsat", "f:3", "f:1", (*said, Message("user", "Why is it so?")), "Because of A.", "That is wrong.")
    second = Mined("dsat", "f:5", "f:1", (*first.prompt, Message("user", "And B?")), "Not known.", "Look it up then.")
    assert find_near([first, second], 0.9) == set()


# --- masking -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.doe+x@mail.example.org.", "Write to [EMAIL]."),
        ("Call +49 30 901820 or (030) 9018-2000 now", "Call [PHONE] or [PHONE] now"),
        ("555-867-5309", "[PHONE]"),
        ("card 4111 1111 1111 1111", "card [CARD]"),
        ("IBAN DE89 3704 0044 0532 0130 00!", "IBAN [IBAN]!"),
        ("from 203.0.113.7 and 2001:db8::8a2e:370:7334", "from [IP] and [IP]"),
        ("SSN 123-45-6789", "SSN [SSN]"),
        ("key sk-abcdefghijklmnopqrstuvwx", "key [API_KEY]"),
        ("....jane@example.org,bob@example.org", "....[EMAIL],[EMAIL]"),
        ("a@b@c.org @x.org ann@x.org+bob@x.org", "a@[EMAIL] @x.org [EMAIL]+[EMAIL]"),
        # with words and numbers beside them
        ("AT61 1904 3002 3457 3201 BIC OPSKATWW", "[IBAN] BIC OPSKATWW"),
        ("BE68539007547034 BIC GKCCBEBB", "[IBAN] BIC GKCCBEBB"),
        ("SWIFT AB12 DE89 3704 0044 0532 0130 00 25 EUR", "SWIFT AB12 [IBAN] 25 EUR"),
        ("BE12 DE89 3704 0044 0532 0130 00", "BE12 [IBAN]"),  # four groups would be a Belgian one
        ("4111 1111 1111 1111 12/27 123", "[CARD] 12/27 123"),
        ("4111111111111111 123", "[CARD] 123"),
        ("4111-1111-1111-1111 0127", "[CARD] 0127"),
        ("2024 4111 1111 1111 1111", "2024 [CARD]"),
        ("2024 4111 1111 1111 1111 0127 123", "2024 [CARD] 0127 123"),
        ("5555 5555 5555 4444 4111 1111 1111 1111 378282246310005", "[CARD] [CARD] [CARD]"),
        ("3782 822463 10005 1234 and 3056 930902 5904 12", "[CARD] 1234 and [CARD] 12"),
        ("6212 3456 7890 1234 569 12", "[CARD] 12"),  # 19 digits
        ("4111 1111 1111 1111 3.50", "[CARD] 3.50"),
        ("3.14 4111 1111 1111 1111", "3.14 [CARD]"),
        ("41 11 11 11 11 11 11 11, 9000-0000-0000-0001", "[CARD], [CARD]"),  # alone: cut anyhow, of any issuer
    ],
)
def test_what_is_masked(text: str, masked: str) -> None:
    counts: Counter[str] = Counter()
    assert mask(text, counts) == masked
    assert counts.total() == masked.count("[")
    assert mask(masked, counts) == masked


@pytest.mark.parametrize(
    "text",
    [
        "x @ y; a@b; @decorator; the sum is 1234567890123",
        "card 4111 1111 1111 1112",  # wrong check digit
        "version 1.2.3.4.5, 999.1.1.1, ::, 127.0.0.1, 12:30:45, a[1:2:3]",
        "2024-01-15 10:00, 3.14159265358979, 10.1000/182, ISBN 978-3-16-148410-0"[:51],
        "DE89 3704 0044 0532 0130 01",
        "000-12-3456",
        "phi = 1.618-0.577 and 100-200 or 12-34-56",
        "41111111111111110000, 00004111111111111111 1, 2.4111111111111111 and 4111111111111111.5",
        "1234 5678 9012 3456 12 13 14 15 16 17 18 19 20 21",  # 1234567890123452 is a number of a card
        "AT61 1904 3002 3457 3202 BIC OPSKATWW",
        "AT61 1904 3002 3457 320",
        "1.2.3.1112",
    ],
)
def test_what_is_not_masked(text: str) -> None:
    counts: Counter[str] = Counter()
    assert mask(text, counts) == text and not counts


def checked(code: str, length: int) -> str:
    """An IBAN of that country, with the right check digits."""
    plain = f"{code}00{'1234567890' * 4}"[:length]
    rest = int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97
    return f"{code}{98 - rest:02}{plain[4:]}"


@pytest.mark.parametrize(("length", "codes"), [*_IBAN_LENGTHS.items(), (21, "ZZ")])
def test_ibans_of_every_country(length: int, codes: str) -> None:
    """With a word, a number or nothing after them; in groups and in one."""
    beside = ("", ".", " BIC ABCDEFGH", " 12 34 EUR") if codes != "ZZ" else ("", ".", " eur")
    for code in codes.split():
        whole = checked(code, length)
        for text in (whole, " ".join(whole[i : i + 4] for i in range(0, length, 4))):
            for after in beside:
                assert mask(f"IBAN {text}{after}", Counter()) == f"IBAN [IBAN]{after}"


def test_numbers_in_a_row_are_seldom_taken_for_cards() -> None:
    """One in ten passes the check: not as often as there are places to begin and end."""
    draw = random.Random(0)
    for digits, row in ((1, 40), (3, 20), (4, 7), (4, 40), (5, 20), (8, 10), (13, 3), (16, 3), (20, 1), (30, 1)):
        counts: Counter[str] = Counter()
        for _ in range(500):
            mask(" ".join("".join(draw.choices("0123456789", k=digits)) for _ in range(row)), counts)
        most = {4: 0.3, 13: 0.3, 16: 0.3}.get(digits, 0)
        assert counts["CARD"] <= 500 * most, (digits, row)


@pytest.mark.parametrize(
    "piece",
    ["a.", "a-", "a@", "a@b.", "@a.b", "1 ", "4", "4111 ", "1.", "a:", "+1(1", "(11) ", "111-", "AT61 ", "AT61", "sk-"],
)
def test_time_is_in_proportion_to_the_text(piece: str) -> None:
    """Of a text that is made to be slow: the square of 100,000 characters took half a minute."""
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    for end in (" @", "@", "-" * 50_000):
        mask(text + end, Counter())
    assert time.process_time() - start < 5


# --- split ---------------------------------------------------------------------------------------------------


def test_conversations_that_begin_alike_are_on_one_side() -> None:
    rules = SplitRules(test_share=0.3)
    sides = [held_out(record(f"question {i}"), rules) for i in range(1000)]
    assert 250 < sum(sides) < 350
    for i, side in enumerate(sides):
        later = (Message("user", f" Question  {i}\n"), Message("assistant", "x"), Message("user", "y"))
        assert held_out(dataclasses.replace(record(), prompt=later), rules) == side
        assert held_out(dataclasses.replace(record(), prompt=(Message("system", "s"), *later)), rules) == side
    other = [held_out(record(f"question {i}"), SplitRules(test_share=0.3, seed=7)) for i in range(1000)]
    assert other != sides
    assert {held_out(record(f"{i}"), SplitRules(test_share=0.0)) for i in range(50)} == {False}
    assert {held_out(record(f"{i}"), SplitRules(test_share=1.0)) for i in range(50)} == {True}


# --- config --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hygiene.max_similarty=0.5", "max_similarty: unknown key. Did you mean hygiene.max_similarity?"),
        ("hygiene.max_reply=0", "hygiene.max_reply"),
        ("split.test_share=2", "split.test_share"),
        ("wildfeedback.both_labels=some", "wildfeedback.both_labels"),
        ("hygiene.min_reply=40000", "hygiene.min_reply (40000) is more than hygiene.max_reply (32000)"),
        ("nothing=1", "The keys are wildfeedback, ultrafeedback, moderation, hygiene, split, detector"),
    ],
)
def test_impossible_rules(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_mining_config(None, [override])
    assert message in str(error.value)


def test_words_that_yaml_takes_for_booleans(tmp_path: Any) -> None:
    """Unquoted, YAML 1.1 reads `yes` as true, and `no`, which is Norwegian, as false."""
    said = ["wildfeedback.preceding=yes", "wildfeedback.missing_label=false", "hygiene.languages=[en, no]"]
    (tmp_path / "rules.yaml").write_text(
        "wildfeedback: {preceding: yes, missing_label: false}\nhygiene: {languages: [en, no]}\n"
    )
    for config in (load_mining_config(None, said), load_mining_config(tmp_path / "rules.yaml")):
        assert (config.wildfeedback.preceding, config.wildfeedback.missing_label) == ("yes", "false")
        assert config.hygiene.languages == ("en", "no")
    with pytest.raises(ConfigError, match="preceding: Input should be 'yes' or 'any', found False"):
        load_mining_config(None, ["wildfeedback.preceding=no"])


def test_rules_of_a_file(tmp_path: Any) -> None:
    (tmp_path / "rules.yaml").write_text("hygiene: {languages: [en, de]}\nsplit: {test_share: 0.1}\n")
    config = load_mining_config(tmp_path / "rules.yaml", ["split.seed=3"])
    assert (config.hygiene.languages, config.split.test_share, config.split.seed) == (("en", "de"), 0.1, 3)
