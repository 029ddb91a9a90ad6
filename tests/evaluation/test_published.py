"""The published tables, recomputed from published rows; and rows that no number can be made of."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from drift_jax.errors import DataError
from drift_jax.evaluation.alpaca_eval import LC_MISSING, win_rates
from drift_jax.evaluation.wildbench import (
    TASK_GROUPS,
    WEIGHTS,
    PairRow,
    groups_of,
    macro,
    mix_rewards,
    reward_table,
    rewards_of_counts,
    score_table,
)
from drift_jax.evaluation.wildbench_files import recompute
from drift_jax.evaluation.wildbench_rows import pair_rows, score_rows
from tests.cli_runs import Drift, drift  # noqa: F401

FIXTURES = Path(__file__).parents[2] / "../shared/fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs the published rows in ../shared/fixtures")
WILDBENCH, ALPACA = FIXTURES / "wildbench", FIXTURES / "alpaca_eval"
SCORED = ("Qwen1.5-72B-Chat-greedy", "gemma-7b-it", "gpt-3.5-turbo-0125", "reka-edge")
REFERENCES = ("haiku", "llama", "gpt4t")
TOLERANCE = 1e-6


def load(path: Path) -> Any:
    return json.loads(path.read_text())


@needs_fixtures
@pytest.mark.parametrize("model", SCORED)
def test_wildbench_scores_are_the_published_ones(drift: Drift, model: str) -> None:
    published = load(WILDBENCH / "score.json")[model]
    code, out, err = drift("evaluate", "wildbench", "--rows", WILDBENCH / f"{model}.json")
    assert code == 0, err
    found = json.loads(out)
    for key in ("score", "adjusted_score", "avg_len", "total"):
        assert found[key] == pytest.approx(published[key], abs=TOLERANCE), key
    assert found["task_macro_score"] is None and found["excluded"] == {}


@needs_fixtures
def test_macros_are_the_published_ones() -> None:
    table = load(WILDBENCH / "score.json")
    assert len(table) > 50
    for name, row in recompute([WILDBENCH / "score.json"], None, None, 500).items():
        assert row["task_macro_score"] == pytest.approx(table[name]["task_macro_score"], abs=TOLERANCE)
        # The weights matter: without them the table is another one.
        plain = sum(row["task_categorized_scores"].values()) / len(WEIGHTS)
        assert plain != pytest.approx(row["task_macro_score"], abs=TOLERANCE)


@needs_fixtures
def test_rewards_and_their_mix_are_the_published_ones() -> None:
    paths = [WILDBENCH / f"pairwise-{name}-K=500.json" for name in REFERENCES]
    for path in paths:
        published = load(path)
        for model, row in recompute([path], None, None, 500).items():
            for key in ("reward", "task_macro_reward"):
                assert row[key] == pytest.approx(published[model][key], abs=TOLERANCE)
            assert row["task_categorized_rewards"] == pytest.approx(
                published[model]["task_categorized_rewards"], abs=TOLERANCE
            )
    published = load(WILDBENCH / "all_stat_wildbench.500.json")
    mixed, compared = recompute(paths, None, None, 500), 0
    for model, row in mixed.items():
        for key, value in row.items():
            if isinstance(value, float) and model in published:
                assert value == pytest.approx(published[model][key], abs=TOLERANCE), (model, key)
                compared += 1
    assert compared > 500
    # A reference has no rows against itself: 0 in the mix, and not left out of its mean.
    own = mixed["gpt-4-turbo-2024-04-09"]
    assert own["mixture_of_rewards.K=500"] == pytest.approx(
        (own["haiku_reward.K=500"] + own["llama_reward.K=500"]) / 3, abs=TOLERANCE
    )


@needs_fixtures
@pytest.mark.parametrize("model", ["claude-2", "gemma-7b-it", "vicuna-7b"])
def test_alpaca_eval_is_the_published_leaderboard(drift: Drift, model: str) -> None:
    with (ALPACA / "leaderboard.csv").open() as file:
        (published,) = [row for row in csv.DictReader(file) if row[""] == model]
    code, out, err = drift("evaluate", "alpaca-eval", "--rows", ALPACA / f"{model}.json")
    assert code == 0, err
    found = json.loads(out)
    columns = ("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate")
    for key in (*columns, "avg_length"):
        assert found[key] == pytest.approx(float(published[key]), abs=TOLERANCE), key
    assert found["length_controlled_winrate"] == LC_MISSING and found["dropped"] == 0


@needs_fixtures
def test_several_models_are_rated(drift: Drift) -> None:
    files = [word for model in SCORED for word in ("--rows", WILDBENCH / f"{model}.json")]
    code, out, err = drift("evaluate", "wildbench", *files)
    assert code == 0, err
    found = json.loads(out)
    ratings = {name: row["WB_Elo"]["avg"] for name, row in found.items()}
    scores = {name: row["score"] for name, row in found.items()}
    assert sorted(ratings, key=lambda name: ratings[name]) == sorted(scores, key=lambda name: scores[name])
    assert sum(ratings.values()) == pytest.approx(4 * 1000)  # points change hands


# --- rows that are not all right ----------------------------------------------------------------------------


def score(value: Any, output: str = "An answer.", session: str = "s", **more: Any) -> dict[str, Any]:
    return {"session_id": session, "score": value, "model_output": output, **more}


def test_what_counts_for_a_score() -> None:
    rows = [
        score("8", "x" * 10),
        score(4, "x" * 20 + "... (truncated)"),
        score("1", ""),
        score("1", "[This model response is empty.]"),
        {"session_id": "s", "parsed_result": {"score": "6"}, "model_output": ["x" * 30]},
        score(None),
        score("good"),
        score("nan"),
        {"session_id": "s"},
    ]
    found = score_rows(rows)
    assert found.excluded == {"no score": 2, "score that is no number": 2}
    table = score_table("m", found.rows, {"s": frozenset({"Coding & Debugging"})})
    # Cut and empty rows count for the score, and neither for categories nor for lengths.
    assert table["score"] == (8 + 4 + 1 + 1 + 6) / 5 and table["total"] == 5
    assert table["avg_len"] == 20 and (table["truncated"], table["empty"]) == (1, 2)
    assert table["task_categorized_scores"] == {"Coding & Debugging": (7 - 5) * 2}
    # A group without rows weighs all the same.
    assert table["task_macro_score"] == pytest.approx(1.25 * 4 / 4.75)


def test_slimmed_rows_say_the_same_as_whole_ones() -> None:
    whole = [score("7", "x" * 5), score("2", ""), score("9", "y... (truncated)")]
    lengths = [len(row["model_output"]) for row in whole]
    slim = [
        {"session_id": "s", "score": row["score"], "out_len": length, "truncated": row["model_output"].endswith(")")}
        for row, length in zip(whole, lengths, strict=True)
    ]
    assert score_rows(slim) == score_rows(whole)


def pair(winner: str, extent: int, tested: str, other: str, **more: Any) -> dict[str, Any]:
    return {"session_id": "s", "winner": winner, "extent": extent, "model_outputs": {"m": tested, "r": other}, **more}


@pytest.mark.parametrize(
    ("row", "k", "outcome"),
    [
        (pair("m", 1, "x" * 600, "x" * 99), 500, "tie"),
        (pair("m", 1, "x" * 600, "x" * 100), 500, "win"),  # exactly 500 longer is not more than 500
        (pair("m", 1, "x" * 600, "x" * 99), -1, "win"),
        (pair("m", 2, "x" * 6000, "x"), 500, "win_much"),
        (pair("r", 1, "x", "x" * 502), 500, "tie"),
        (pair("r", 1, "x" * 600, "x"), 500, "lose"),
        (pair("r", 2, "x", "x" * 600), 500, "lose_much"),
        (pair("tie", 0, "x", "x"), 0, "tie"),
        (pair("m", 1, "xx", "x"), 0, "tie"),
    ],
)
def test_outcomes_and_the_length_penalty(row: dict[str, Any], k: int, outcome: str) -> None:
    table = reward_table("m", pair_rows([row], "m", "r").rows, None, k)
    counts = {name: table[name] for name in ("win_much", "win", "tie", "lose", "lose_much")}
    assert counts == {name: int(name == outcome) for name in counts}


def test_pairs_with_cut_or_empty_outputs_stay_in_the_denominator() -> None:
    rows = [
        pair("m", 2, "good", "bad"),
        pair("m", 2, "cut... (truncated)", "bad"),
        pair("m", 2, "good", "[This model response is empty.]"),
        pair("r", 2, "", "good"),
        pair("somebody", 2, "good", "bad"),
        pair("m", 2, "good", "bad") | {"model_outputs": {"m": "good"}},
        {"session_id": "s", "model_A": "r", "model_B": "m", "parsed_result": {"choice": "A+"}}
        | {"model_outputs": {"m": "x", "r": "y"}},
    ]
    found = pair_rows(rows, "m", "r")
    assert found.excluded == {"no verdict": 1, "an output is missing": 1}
    table = reward_table("m", found.rows, {"s": groups_of("Math", ["Data Analysis", "Editing"])}, 500)
    assert (table["total"], table["win_much"], table["lose"], table["lose_much"]) == (5, 1, 1, 0)
    assert table["reward"] == (1 - 0.5) / 5
    # Math and Data Analysis are one group, in which a row counts once; those rows leave its denominator as well.
    assert table["task_categorized_rewards"] == {"Creative Tasks": 0.25, "Math & Data Analysis": 0.25}
    assert rewards_of_counts(table)["reward"] == table["reward"]


def test_a_model_without_rows_against_a_reference_has_nothing_there() -> None:
    row = reward_table("m", [PairRow("s", "win_much", 1, 1, True)], None)
    assert mix_rewards({"a": {"m": row}, "b": {}}, 500)["m"]["mixture_of_rewards.K=500"] == 50.0


def test_groups_are_those_of_the_specification() -> None:
    """Written out: a tag in another group would change every macro, and no published row here has tags."""
    groups = {
        "Information/Advice seeking": ("Information seeking", "Advice seeking"),
        "Creative Tasks": ("Creative Writing", "Editing", "Brainstorming", "Role playing", "Others"),
        "Coding & Debugging": ("Coding & Debugging",),
        "Planning & Reasoning": ("Reasoning", "Planning"),
        "Math & Data Analysis": ("Math", "Data Analysis"),
    }
    assert {tag: group for group, tags in groups.items() for tag in tags} == TASK_GROUPS
    assert WEIGHTS == {
        "Creative Tasks": 0.5,
        "Planning & Reasoning": 1.25,
        "Math & Data Analysis": 1.0,
        "Information/Advice seeking": 0.75,
        "Coding & Debugging": 1.25,
    }


def test_macro_is_weighted() -> None:
    assert macro(dict.fromkeys(WEIGHTS, 3.0)) == pytest.approx(3.0)
    assert macro({"Creative Tasks": 4.75}) == pytest.approx(0.5)


def annotation(preference: Any, **more: Any) -> dict[str, Any]:
    return {"preference": preference, "output_1": "base", "output_2": "model", **more}


# What the package alpaca-eval 0.6.6 gives for these preferences (`metrics.get_winrate`): win rate, SE, discrete, n.
PACKAGE = [
    ([1, 2, 1.5, 0], (50.0, 20.41241452319315, 50.0, 4)),
    ([1, None, 2], (50.0, 50.0, 50.0, 2)),
    ([1, 2.3, 0.6, 0.4, 2, 1.2], (40.0, 30.550504633038937, 41.66666666666667, 3)),
    ([1.2], (20.0, None, 0.0, 1)),
]


@pytest.mark.parametrize(("preferences", "expected"), PACKAGE)
def test_win_rates_as_the_package_has_them(preferences: list[float | None], expected: tuple[float, ...]) -> None:
    found = win_rates([annotation(preference) for preference in preferences])
    rates = (found["win_rate"], found["standard_error"], found["discrete_win_rate"], found["n_total"])
    assert [value is None for value in rates] == [value is None for value in expected]
    for value, other in zip(rates, expected, strict=True):
        assert value is None or value == pytest.approx(other, abs=1e-9)
    assert found["dropped"] == len(preferences) - expected[3]


def test_alpaca_rows_without_preference_or_output() -> None:
    rows = [annotation(2.0, output_2="xxxx"), annotation(math.nan, output_2="xx"), {"output_2": "xx"}]
    rows += [annotation(1.0, output_2=None), annotation("1.5", output_2="")]
    found = win_rates(rows)
    # Lengths are of all outputs that there are, cut to a whole number.
    assert found["avg_length"] == int((4 + 2 + 2 + 0) / 4) and found["n_total"] == 3 and found["dropped"] == 2
    assert win_rates([{"preference": 1.0, "len_1": 5, "len_2": 7}])["avg_length"] == 7
    with pytest.raises(DataError, match="none of 1 rows has a preference"):
        win_rates([annotation(None)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is empty or of another form"),
        ("{", "is not JSON"),
        ('[{"session_id": "a", "score": null}]', "no row of"),
        ('[{"model_outputs": {"a": "x", "b": "y"}, "winner": "a", "extent": 1}]', "--reference"),
        ('{"m": {"score": 3}}', "neither counts"),
    ],
)
def test_files_of_no_use_are_refused(drift: Drift, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    code, _, err = drift("evaluate", "wildbench", "--rows", path)
    assert code == 2 and message in " ".join(err.split())


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        ("wildbench", ["--against", "b.json", "--out", "out", "--set", "judge.model=x"], "--against, --set, --out"),
        ("wildbench", ["--wildbench", "w", "--pair-judge", "j"], "--wildbench, --pair-judge"),
        ("wildbench", ["--json-schema", "--name", "n", "--cache", "c"], "--json-schema, --name, --cache"),
        ("wildbench", ["model", "--config", "c.yaml"], "MODEL, --config"),
        ("alpaca-eval", ["--annotate", "--df-gamed", "g.csv"], "--annotate, --df-gamed"),
        ("alpaca-eval", ["model", "--reference-outputs", "r"], "MODEL, --reference-outputs"),
        ("alpaca-eval", ["--annotator", "a", "--name", "n"], "--annotator, --name"),
        ("alpaca-eval", ["--config", "c", "--set", "seed=1", "--out", "out"], "--config, --set, --out"),
    ],
)
def test_rows_take_no_option_that_they_would_ignore(
    drift: Drift, tmp_path: Path, command: str, words: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps([score(3) | annotation(1.5)]))
    assert drift("evaluate", command, "--rows", "rows.json")[0] == 0
    code, out, err = drift("evaluate", command, "--rows", "rows.json", *words)
    said = " ".join(err.split())
    assert code == 2 and f"has no use for {named}. Leave them out, or --rows." in said and out == "", said
    assert not Path("out").exists()


def test_rows_have_one_reference(drift: Drift, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([pair("m", 2, "good", "bad")]))
    words = ["--rows", tmp_path / "rows.json", "--reference", "r", "--reference", "other"]
    code, _, err = drift("evaluate", "wildbench", *words)
    assert code == 2 and "--rows takes one --reference" in err


def test_upstream_files_of_pairs(drift: Drift, tmp_path: Path) -> None:
    rows = [pair("m", 2, "good", "bad"), pair("r", 1, "bad", "good")]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    code, out, err = drift("evaluate", "wildbench", "--rows", path, "--reference", "r")
    assert code == 0, err
    found = json.loads(out)
    assert (found["model"], found["reference"], found["reward"], found["K"]) == ("m", "r", 0.25, 500)
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert json.loads(drift("evaluate", "wildbench", "--rows", lines, "--reference", "r")[1]) == found
