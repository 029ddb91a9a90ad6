"""`drift evaluate win-rate`: what must hold of its statistics, and the command with an endpoint and with functions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_jax.evaluation.elo import EloRules, Game, elo_ratings, games_of_scores
from drift_jax.evaluation.intervals import bootstrap_interval, mean_interval, score_interval
from drift_jax.evaluation.wildbench import PairRow, ScoreRow, reward_table
from drift_jax.evaluation.win_rate import Preference, win_rate
from tests.cli_runs import Drift, drift  # noqa: F401
from tests.http_servers import serve
from tests.wildbench_files import judge_of

DRAWS, WITHIN = 2000, 0.02

preferences = st.lists(
    st.builds(
        Preference,
        id=st.just("p"),
        value=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
        length_a=st.integers(0, 5000),
        length_b=st.integers(0, 5000),
    ),
    min_size=1,
    max_size=30,
)
OPPOSITE = {"win_much": "lose_much", "win": "lose", "tie": "tie", "lose": "win", "lose_much": "win_much"}
pair_rows = st.lists(
    st.builds(
        PairRow,
        session_id=st.just("s"),
        outcome=st.sampled_from(list(OPPOSITE)),
        length=st.integers(0, 2000),
        reference_length=st.integers(0, 2000),
        usable=st.booleans(),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=30, deadline=None)
@given(preferences)
def test_swapping_a_and_b_negates_the_reward(rows: list[Preference]) -> None:
    there, back = win_rate(rows), win_rate([row.swapped() for row in rows])
    assert there["reward"] == pytest.approx(-back["reward"], abs=1e-12)
    assert there["win_rate"] == pytest.approx(100 - back["win_rate"], abs=1e-9)
    assert there["length_controlled_win_rate"] == pytest.approx(100 - back["length_controlled_win_rate"], abs=1e-6)
    assert (there["wins"], there["ties"], there["losses"]) == (back["losses"], back["ties"], back["wins"])
    low, high = there["win_rate_interval"]
    assert back["win_rate_interval"] == pytest.approx([100 - high, 100 - low], abs=1e-9)
    assert 0 <= low <= there["win_rate"] + 1e-9 and there["win_rate"] - 1e-9 <= high <= 100


@given(pair_rows, st.sampled_from([-1, 0, 500]))
def test_swapping_model_and_reference_negates_the_reward(rows: list[PairRow], k: int) -> None:
    swapped = [
        PairRow(row.session_id, OPPOSITE[row.outcome], row.reference_length, row.length, row.usable)  # pyright: ignore[reportArgumentType]
        for row in rows
    ]
    there, back = reward_table("m", rows, None, k), reward_table("r", swapped, None, k)
    assert there["reward"] == -back["reward"]
    assert [there[name] for name in OPPOSITE] == [back[OPPOSITE[name]] for name in OPPOSITE]


@pytest.mark.parametrize("judge", ["fair", "first", "random"])
def test_a_model_against_itself_is_a_half(judge: str) -> None:
    """With a judge that sees no difference, one that takes what stands first, and one that draws lots."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(300):
        orders = {"fair": (0.5, 0.5), "first": (1.0, 0.0), "random": tuple(rng.choice([0.0, 0.5, 1.0], 2))}[judge]
        rows.append(Preference(str(i), sum(orders) / 2, length := int(rng.integers(10, 900)), length, orders))
    found = win_rate(rows)
    low, high = found["win_rate_interval"]
    assert low <= 50 <= high
    if judge != "random":
        assert found["win_rate"] == 50 and found["length_controlled_win_rate"] == pytest.approx(50)
    assert found["first_wins"] == pytest.approx({"fair": 50, "first": 100, "random": 50}[judge], abs=8)


def test_length_is_controlled_for() -> None:
    """A judge that prefers longer replies and nothing else: at equal lengths neither is better."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(400):
        longer, shorter = int(rng.integers(200, 900)), int(rng.integers(100, 400))
        difference = longer - shorter
        wins = rng.random() < 1 / (1 + np.exp(-difference / 150))
        rows.append(Preference(str(i), float(wins), longer, shorter))
    found = win_rate(rows)
    low, high = found["length_controlled_interval"]
    assert found["win_rate"] > 75 and low <= 50 <= high


@pytest.mark.parametrize("shares", [(0.45, 0.1, 0.45), (0.2, 0.2, 0.6), (0.3, 0.0, 0.7)])
def test_score_intervals_cover_as_often_as_they_say(shares: tuple[float, float, float]) -> None:
    rng, truth = np.random.default_rng(5), shares[2] + shares[1] / 2
    draws = rng.choice([0.0, 0.5, 1.0], (DRAWS, 400), p=shares)
    assert covered([score_interval(list(draw)) for draw in draws], truth) == pytest.approx(0.95, abs=WITHIN)
    # At another level they would not.
    assert covered([score_interval(list(draw), 0.8) for draw in draws], truth) < 0.95 - WITHIN


@pytest.mark.parametrize("kind", ["mean", "bootstrap"])
def test_intervals_of_means_cover_as_often_as_they_say(kind: str) -> None:
    draws = np.random.default_rng(6).gamma(4.0, 1.0, (DRAWS, 150))  # skewed, as scores are
    find = mean_interval if kind == "mean" else lambda draw: bootstrap_interval(np.asarray(draw), resamples=400)
    assert covered([find(list(draw)) for draw in draws], 4.0) == pytest.approx(0.95, abs=WITHIN)


def covered(intervals: list[Any], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_intervals_of_few_values() -> None:
    assert score_interval([]) is None and mean_interval([1.0]) is None
    assert bootstrap_interval(np.asarray([1.0])) is None
    low, high = score_interval([1.0] * 20) or (0, 0)
    assert 0.75 < low < 0.9 and high == 1.0
    assert score_interval([0.5] * 20) == pytest.approx((0.5, 0.5))
    with pytest.raises(ValueError, match="within"):
        score_interval([2.0])


def test_games_and_ratings() -> None:
    rules = EloRules(rounds=20)
    scores = {
        "good": [ScoreRow("a", 9, 5, False), ScoreRow("b", 8, 5, False), ScoreRow("c", 9, 0, False)],
        "bad": [ScoreRow("a", 4, 5, False), ScoreRow("b", 7, 5, False), ScoreRow("d", 1, 5, False)],
    }
    # Task c has an empty output and d one row: two games, of which b is a tie.
    assert games_of_scores(scores, rules) == [Game("good", "bad", 1.0), Game("good", "bad", 0.5)]
    games = [Game("good", "bad", 1.0)] * 200 + [Game("bad", "good", 1.0)] * 20
    ratings = elo_ratings(games, rules)
    assert list(ratings) == ["good", "bad"] and ratings == elo_ratings(games, rules)
    assert ratings["good"]["avg"] - ratings["bad"]["avg"] > 150
    held = elo_ratings(games, rules, anchors={"bad": 1200.0})
    assert held["bad"]["avg"] == 1200 and held["bad"]["std"] == 0 and held["good"]["avg"] > 1200


# --- the command --------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts_file(tmp_path: Path, count: int = 8) -> Path:
    return write(
        tmp_path / "prompts.jsonl", [{"id": f"p{i}", "prompt": f"Question {i}?", "max_words": 2} for i in range(count)]
    )


def prefers(prompt: str) -> dict[str, Any] | str:
    """The reply with more letters a, if it is not about question 5; ties for equal numbers."""
    first, second = re.findall(r"<reply_[12]>\n(.*?)\n</reply_[12]>", prompt, re.DOTALL)
    if "Question 5?" in prompt:
        return "neither"
    better = "tie" if first.count("a") == second.count("a") else "1" if first.count("a") > second.count("a") else "2"
    return {"reason": "-", "better": better}


def test_files_against_each_other_by_an_endpoint(tmp_path: Path, drift: Drift) -> None:
    prompts = prompts_file(tmp_path)
    a = write(tmp_path / "a.jsonl", [{"id": f"p{i}", "output": "aaa b"} for i in range(8)])
    b = write(
        tmp_path / "b.jsonl",
        [{"id": f"p{i}", "text": "aaa b" if i == 0 else "a" if i < 6 else "aaaa"} for i in range(7)],
    )
    with serve(judge_of(prefers)) as small:
        words = ["--prompts", prompts, "--set", f"judge.base_url={small.url}", "--set", "judge.model=j"]
        code, out, err = drift("evaluate", "win-rate", a, b, *words, "--out", tmp_path / "out")
        assert code == 0, err
        there = json.loads((tmp_path / "out/report.json").read_text())
        # Equal outputs are a tie and no question; each other prompt is asked in both orders, one three times each.
        assert there["judge"]["questions"] == 12 and there["judge"]["equal_outputs"] == 1
        assert there["excluded"] == {"no verdict": 1, "no output of A or B": 1}
        assert there["judge"]["malformed_answers"] == 6
        assert (there["wins"], there["ties"], there["losses"], there["total"]) == (4, 1, 1, 6)
        assert there["win_rate"] == 75 and there["same_in_both_orders"] == 100
        assert there["judge"]["prompt"] == "compare_v1" and len(there["judge"]["prompt_hash"]) == 16
        assert "1 no verdict" in out
        before = len(small.seen)
        code, _, err = drift(
            "evaluate", "win-rate", b, a, *words, "--out", tmp_path / "back", "--cache", tmp_path / "out/verdicts.jsonl"
        )
        assert code == 0, err
        assert len(small.seen) - before == 6  # the same texts in the same orders: only what failed is asked again
    back = json.loads((tmp_path / "back/report.json").read_text())
    assert back["reward"] == -there["reward"]
    assert "|  | win rate of A, % | at equal lengths, % |" in (tmp_path / "out/report.md").read_text()


def test_a_verdict_in_one_order_only_is_left_out(tmp_path: Path, drift: Drift) -> None:
    prompts = prompts_file(tmp_path, 2)
    a = write(tmp_path / "a.jsonl", [{"output": "one"}, {"output": "one"}])
    b = write(tmp_path / "b.jsonl", [{"output": "two"}, {"output": "two"}])

    def half(prompt: str) -> dict[str, Any] | str:
        return "no" if "Question 1" in prompt and "<reply_1>\none" in prompt else {"reason": "", "better": "1"}

    with serve(judge_of(half)) as small:
        words = ["--prompts", prompts, "--set", f"judge.base_url={small.url}", "--set", "judge.model=j"]
        code, _, err = drift("evaluate", "win-rate", a, b, *words, "--out", tmp_path / "out")
    assert code == 0, err
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["excluded"] == {"a verdict in one order only": 1}
    # A judge that always takes the first: a tie, and it is said.
    assert (found["win_rate"], found["first_wins"], found["same_in_both_orders"]) == (50, 100, 0)


def test_by_functions(tmp_path: Path, drift: Drift, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_file(tmp_path, 4)
    a = write(tmp_path / "a.jsonl", [{"id": f"p{i}", "output": "two words"} for i in range(4)])
    b = write(
        tmp_path / "b.jsonl",
        [{"id": f"p{i}", "output": "no more than five words" if i else "two words"} for i in range(4)],
    )
    (tmp_path / "my_checks.py").write_text(
        "def check(messages, output, row):\n"
        "    if row['id'] == 'p3':\n        raise RuntimeError('no compiler')\n"
        "    return output.count('o')\n"
    )
    monkeypatch.chdir(tmp_path)

    def run(check: str) -> dict[str, Any]:
        words = ["--judge", "programmatic", "--check", check, "--prompts", prompts, "--out", tmp_path / check[-5:]]
        code, _, err = drift("evaluate", "win-rate", a, b, *words)
        assert code == 0, err
        return json.loads((tmp_path / check[-5:] / "report.json").read_text())

    found = run("drift_jax.evaluation.checks:within_words")
    assert (found["wins"], found["ties"], found["losses"]) == (3, 1, 0)
    found = run("my_checks:check")
    assert (found["wins"], found["losses"], found["ties"]) == (0, 2, 1)
    assert found["excluded"] == {"the check failed": 1} and found["failures"] == {"p3": "RuntimeError: no compiler"}
    (tmp_path / "my_limits.py").write_text("def limit(messages, output, row):\n    return row['max_letters']\n")
    for words, message in (
        (["--check", "my_limits:limit"], "failed on all 4 prompts, first on p0: KeyError: 'max_letters'"),
        (["--check", "no_such:thing"], "No module named"),
        (["--check", "my_checks"], "MODULE:FUNCTION"),
        ([], "needs --check"),
    ):
        code, _, err = drift(
            "evaluate",
            "win-rate",
            a,
            b,
            "--judge",
            "programmatic",
            *words,
            "--prompts",
            prompts,
            "--out",
            tmp_path / "x",
        )
        assert code == 2 and message in " ".join(err.split())
