"""Rules that find complaints: their examples, their figures on real turns, files of users, and hostile text."""

from __future__ import annotations

import importlib.resources
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from drift_jax.data.mining.complaint_rules import _spell_out, load_rules, opening
from drift_jax.data.mining.detect import RulesDetector, build_detector
from drift_jax.data.mining.detector_config import DetectorConfig
from drift_jax.data.mining.dialogue import Conversation, Turn
from drift_jax.errors import ConfigError

REPO = Path(__file__).parent.parent.parent
REAL = REPO / "../shared/data/dsat_real.jsonl"
OURS = sorted(
    file.name.removeprefix("rules_").removesuffix(".yaml")
    for file in importlib.resources.files("drift_jax.data.mining").iterdir()
    if file.name.startswith("rules_")
)
GERMAN: dict[str, Any] = {
    "name": "de",
    "version": 2,
    "parts": {"IT": "das|die \\pL+", "IS": "<IT> ist"},
    "rules": [
        {
            "name": "wrong",
            "means": "the reply is called wrong",
            "patterns": "^<IS> falsch\n(?:^|\\PL)überprüfe das\n",
            "fires": ["Das ist falsch!", "Bitte überprüfe das."],
            "silent": ["Was ist falsch?", "Danke!"],
        }
    ],
}


def conversation(*contents: str, name: str = "c") -> Conversation:
    """User and assistant in turn."""
    return Conversation(name, tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)))


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def changed(**changes: Any) -> dict[str, Any]:
    return GERMAN | {"rules": [GERMAN["rules"][0] | changes]}


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_every_example_says_what_its_rule_does(name: str) -> None:
    rules = load_rules(name)
    assert len(rules.rules) >= 10
    for rule in rules.rules:
        label = f"{name.replace('_', '-')}/{rule.name}"
        for example in rule.fires:
            assert label in dict(rules.match(example)), (label, example)
        for example in rule.silent:
            assert label not in dict(rules.match(example)), (label, example)


def test_a_part_that_several_hold_is_the_same_in_each() -> None:
    parts = {"A": "<B>x<C>", "B": "<C>y", "C": "c|d", "D": "<A><B>"}
    c = "(?:c|d)"
    b = f"(?:{c}y)"
    assert _spell_out("here", "<D><C>\n<B>", parts) == f"(?:(?:{b}x{c}){b}){c}|{b}"
    with pytest.raises(ConfigError, match="part A holds itself"):
        _spell_out("here", "<C><A>", parts | {"B": "<C><A>"})  # C is spelled out by then


def test_a_file_of_ones_own_adds_a_language(tmp_path: Path) -> None:
    path = write(tmp_path, GERMAN)
    detector = build_detector(DetectorConfig(rules=("en_v1", str(path))), tmp_path / "journal")
    logs = [conversation("Frage", "Antwort", "Die Antwort ist falsch."), conversation("Ask", "Reply", "That is wrong.")]
    found = [[c.evidence for c in complaints] for _, complaints in detector.find(logs)]
    assert found == [
        [{"detector": "rules", "rules": {"de-v2/wrong": "Die Antwort ist falsch"}}],
        [{"detector": "rules", "rules": {"en-v1/wrong": "That is wrong"}}],
    ]
    assert set(detector.stats()["rules"]["files"]) == {"en-v1", "de-v2"}
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(fires=["Das ist falsch!", "Das ist gut"]), "wrong does not find 'Das ist gut'"),
        (changed(silent=["Danke", "Das ist falsch"]), "wrong finds 'Das ist falsch'"),
        (changed(patterns="^<THAT> ist falsch"), "rule wrong: the file has no part THAT"),
        (changed(patterns="(?<!nicht) falsch"), "rule wrong: not a pattern of RE2"),
        (changed(patterns=r"(falsch) \1"), "rule wrong: not a pattern of RE2"),
        (changed(patern="x"), "rules.0.patern: Unexpected"),
        (changed(fires=["Das ist falsch!"]), "rules.0.fires: Tuple should have at least 2 items"),
        (GERMAN | {"rules": GERMAN["rules"] * 2}, r"rules have the same name: \['wrong'\]"),
        (GERMAN | {"parts": {"IT": "<BE>", "BE": "<IT>", "IS": "<IT>"}}, "part IT holds itself"),
        (GERMAN | {"version": 0}, "version: Input should be greater"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    load_rules(write(tmp_path, GERMAN))
    with pytest.raises(ConfigError, match=message) as caught:
        load_rules(write(tmp_path, content))
    assert "own.yaml" in str(caught.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="no rules 'fr_v1': ours are en_v1"):
        load_rules("fr_v1")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_rules("nowhere.yaml")
    with pytest.raises(ConfigError, match="detector rules needs rules"):
        build_detector(DetectorConfig(rules=()), Path("unused"))


# --- what is looked at ------------------------------------------------------------------------------------


def test_code_and_typography_do_not_hide_a_complaint() -> None:
    assert opening("```py\nx = 'that is wrong'\n```\nThat’s\n  `no`  list") == "That's 'no' list"
    assert opening("```py\nunclosed") == ""
    rules = load_rules("en_v1")
    assert "en-v1/not_working" in dict(rules.match("```\nprint(1)\n```\nthis doesn’t work"))
    assert not dict(rules.match("```\nthis doesn't work\n```"))


def test_half_a_surrogate_pair_is_no_error() -> None:
    assert dict(load_rules("en_v1").match("That is wrong \ud83d"))


@given(st.text(max_size=3000), st.text(max_size=200))
def test_only_the_opening_of_a_turn_is_read(text: str, more: str) -> None:
    start = text.ljust(2400, "x")
    assert len(opening(start)) <= 300
    assert opening(start + more) == opening(start)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a|aa)*b", "(.*a){25}!"])
def test_no_pattern_takes_long(tmp_path: Path, pattern: str) -> None:
    """An engine that backtracks would not come back from these."""
    rules = load_rules(write(tmp_path, changed(patterns=f"^x: {pattern}\nfalsch|überprüfe", silent=["Danke", "Bitte"])))
    assert not dict(rules.match("x: " + "a" * 250 + "?" + "a" * 1_000_000))


@pytest.mark.parametrize("unit", ["no ", "it is not ", "you ", "``` ", "\n", "'", "wait, but ", "i mean i ", "\u2028é"])
def test_long_hostile_turns_are_no_burden(unit: str) -> None:
    list(load_rules("en_v1").match(unit * 1_000_000))


# --- conversations ----------------------------------------------------------------------------------------


def test_only_user_turns_after_a_reply_complain() -> None:
    detector = RulesDetector([load_rules("en_v1")])
    turns = (
        Turn("system", "That is wrong."),
        Turn("user", "That is wrong."),  # nothing was replied yet
        Turn("assistant", "That is wrong."),
        Turn("user", "That is wrong."),
        Turn("user", "That is wrong."),  # no reply before it
        Turn("assistant", " \n"),
        Turn("user", "That is wrong."),  # to an empty reply
        Turn("assistant", "Sorry."),
        Turn("user", "Thanks, and what is the capital of Peru?"),
    )
    (found,) = detector.find([Conversation("c", turns)])
    assert [complaint.turn for complaint in found[1]] == [3]
    rules = detector.stats()["rules"]
    assert (rules["turns_seen"], rules["turns_fired"]) == (2, 1)
    assert rules["fired"]["en-v1/wrong"] == 1 and sum(rules["fired"].values()) == 1
    assert rules["fired"]["en-v1/again"] == 0


def test_conversations_are_taken_one_at_a_time() -> None:
    taken = 0

    def logs() -> Iterator[Conversation]:
        nonlocal taken
        for i in range(100):
            taken += 1
            yield conversation("ask", "reply", "no, that is wrong", name=str(i))

    found = RulesDetector([load_rules("en_v1")]).find(logs())
    for i in range(10):
        one, complaints = next(found)
        assert one.id == str(i) and len(complaints) == 1 and taken == i + 1


# --- how good they are ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quality() -> Any:
    spec = importlib.util.spec_from_file_location("detector_quality", REPO / "scripts" / "detector_quality.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def turns(quality: Any) -> Any:
    if not REAL.exists():
        pytest.skip(f"needs the real complaints at {REAL}")
    return quality.load_turns(REAL)


def share_of_ordinary(measured: dict[str, Any], rule: str | None = None) -> dict[str, float]:
    """Of follow-ups, and of all ordinary turns, where a rule (or any) fires."""
    follow_ups, first = measured["turns"]["follow_up"], measured["turns"]["first_turn"]
    if rule is None:
        fired = [measured["all_rules"][f"{kind}_fired"]["count"] for kind in ("follow_ups", "first_turns")]
    else:
        fired = [measured["rules"][rule][kind] for kind in ("follow_ups", "first_turns")]
    return {"follow_ups": fired[0] / follow_ups, "all": sum(fired) / (follow_ups + first)}


def test_no_rule_fires_on_more_than_3_percent_of_ordinary_turns(quality: Any, turns: Any) -> None:
    measured = quality.measure(turns, [load_rules("en_v1")])
    assert measured["turns"] == {"explicit": 89, "refinement": 109, "follow_up": 74, "first_turn": 135}
    for rule in (*measured["rules"], None):
        shares = share_of_ordinary(measured, rule)
        print(f"{rule or 'all rules together'}: {shares['follow_ups']:.1%} of follow-ups, {shares['all']:.1%} of all")
        assert max(shares.values()) <= 0.03, rule


def test_a_rule_that_fires_on_ordinary_turns_is_seen(quality: Any, turns: Any, tmp_path: Path) -> None:
    question = {"patterns": r"^(?:how|what)\b|falsch|überprüfe", "silent": ["Danke", "Bitte"]}
    measured = quality.measure(turns, [load_rules(write(tmp_path, changed(**question)))])
    assert max(share_of_ordinary(measured, "de-v2/wrong").values()) > 0.03


def test_quality_is_what_the_readme_says(quality: Any, turns: Any) -> None:
    rules, readme = [load_rules("en_v1")], " ".join((REPO / "README.md").read_text().split())
    halves = {half: [turn for turn in turns if turn.half == half] for half in quality.HALVES}
    assert not {t.text for t in halves["develop"]} & {t.text for t in halves["held_out"] if len(t.text) > 40}
    for name, half in {"written with": halves["develop"], "only scored": halves["held_out"], "all": turns}.items():
        rates = quality.measure(half, rules)["all_rules"]
        cells = [
            f"{rates[key]['rate']:.0%} ({rates[key]['count']} of {rates[key]['of']})".replace("%", " %")
            for key in ("recall_explicit", "recall", "precision", "follow_ups_fired")
        ]
        assert f"| {name} | {' | '.join(cells)} |" in readme
