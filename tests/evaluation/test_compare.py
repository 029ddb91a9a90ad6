"""Runs side by side: every number lands at its method and iteration, and the page is safe to open."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from drift_jax.errors import ConfigError, DataError
from drift_jax.evaluation.alpaca_eval import build_report, win_rates
from drift_jax.evaluation.compare import build_series, choose_metrics, collect
from drift_jax.evaluation.preference_report import build_preference_report
from drift_jax.evaluation.report import write_report
from drift_jax.evaluation.results import read_results
from drift_jax.evaluation.wildbench import PairRow, mix_rewards, reward_table
from drift_jax.evaluation.win_rate import Preference
from drift_jax.evaluation.win_rate_judges import Judgement
from drift_jax.evaluation.win_rate_report import build_win_rate_report
from tests.cli_runs import Drift, drift  # noqa: F401
from tests.evaluation.test_preference import preference_numbers, random_logps


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    """A run of a seed and two iterations as the recipe leaves it, with reports of drift evaluate in it."""
    run = tmp_path / "drift"
    for i, stage in enumerate(("seed", "iter_1", "iter_2")):
        (run / stage).mkdir(parents=True)
        held_out = {"reference": "x", **preference_numbers(random_logps(seed=i), 0.1)}
        value = {"step": 2, "pairs": 40, "eval_rewards/margins": 0.5, "preference": held_out}
        (run / stage / "eval.json").write_text(json.dumps(value))
        (run / stage / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.5}\n')
    wins = [Preference(f"p{i}", float(i < 30), 10, 12) for i in range(40)]
    judged = Judgement(tuple(wins), {}, {"kind": "programmatic", "check": "a:b"})
    write_report(build_win_rate_report(str(run / "iter_2/hf"), "<b>base</b>", judged, 0), run / "evaluation/wins")
    stages = {
        name: {"policy": str(run / name / "hf"), "reference": "base", **preference_numbers(random_logps(seed=9), 0.1)}
        for name in ("iter_1", "iter_2")
    }
    write_report(build_preference_report(stages, "fixed.jsonl", {}), run / "evaluation/fixed")
    (run / "evaluation/report.json").write_text("[1]")
    return run


def test_every_number_lands_at_its_iteration(run: Path) -> None:
    measures, passed = read_results("drift", run)
    of = {(m.metric, m.stage): m for m in measures}
    held_out = json.loads((run / "iter_1/eval.json").read_text())["preference"]["metrics"]["rewards/margins"]
    margin = of["held-out margin", "iter_1"]
    assert (margin.value, margin.low, margin.high, margin.iteration) == (*held_out.values(), 1)
    assert of["training loss", "seed"].value == pytest.approx(0.6) and of["training loss", "seed"].iteration == 0
    wins = of["win rate against <b>base</b>, %", "iter_2"]
    assert wins.value == 75 and wins.interval is not None and wins.interval[0] < 75 < wins.interval[1]
    assert {stage for metric, stage in of if metric == "margin on fixed.jsonl against base"} == {"iter_1", "iter_2"}
    assert passed == [f"{run / 'evaluation/report.json'}: no report of drift evaluate"]


def test_an_eval_json_of_before_has_no_interval(run: Path) -> None:
    (run / "seed/eval.json").write_text('{"step": 1, "pairs": 4, "eval_rewards/margins": 0.5}')
    found = {m.metric: m for m in read_results("drift", run)[0] if m.stage == "seed"}
    assert found["held-out margin"][3:6] == (0.5, None, None) and "held-out accuracy" not in found


@pytest.mark.parametrize(
    ("data", "metric", "value", "ends"),
    [
        (
            {"model": "m-iter_3", "templates": {}, "rewards": {}, "mixture": None}
            | {"score": {"adjusted_score": 4.0, "score_interval": [6.8, 7.2], "task_macro_score": None}},
            "WB-Score x10",
            40.0,
            (36.0, 44.0),
        ),
        (
            {"benchmark": "coverage"} | {"methods": {"m-iter_3": {"coverage": 0.5, "coverage_interval": [0.25, 0.75]}}},
            "coverage of the high-reward region, %",
            50.0,
            (25.0, 75.0),
        ),
    ],
)
def test_reports_of_the_benchmarks(
    tmp_path: Path, data: dict[str, Any], metric: str, value: float, ends: tuple[float, float]
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(data))
    (found,) = read_results("m", tmp_path)[0]
    assert (found.method, found.iteration, found.metric) == ("m", 3, metric)
    assert found.value == pytest.approx(value) and found.interval == pytest.approx(ends)


def test_the_mean_of_wildbench_rewards_is_that_of_all_tasks(tmp_path: Path) -> None:
    """The mix has a mean for each group as well, under a name that starts alike."""
    tags = {"s": frozenset({"Coding & Debugging"}), "t": frozenset({"Creative Tasks"})}
    rows = [PairRow("s", "lose_much", 1, 1, True), *[PairRow("t", "win_much", 1, 1, True)] * 2]
    table = reward_table("m-iter_3", rows, tags)
    mix = mix_rewards({"gpt4t": {"m-iter_3": table}, "haiku": {}}, 500)["m-iter_3"]
    data = {"model": "m-iter_3", "templates": {}, "rewards": {"gpt-4-turbo-2024-04-09": table}, "mixture": mix}
    data["score"] = {"adjusted_score": None, "score_interval": None, "task_macro_score": None}
    (tmp_path / "report.json").write_text(json.dumps(data))
    means = [m.value for m in read_results("m", tmp_path)[0] if m.metric == "WB-Reward x100, mean"]
    assert means == [pytest.approx(100 / 3 / 2)]


def test_reports_of_alpaca_eval_say_their_model(tmp_path: Path) -> None:
    """As they are written: two iterations of a run stay two, and a number is at its own."""
    for k, preference in ((1, 1.25), (2, 1.75)):
        rates = win_rates([{"preference": preference}] * 20)
        write_report(build_report(rates, f"drift-iter_{k}", "judge-1", "a"), tmp_path / f"evaluation/{k}")
    measures, passed = read_results("drift", tmp_path)
    assert passed == [] and {m.metric for m in measures} == {"AlpacaEval 2 win rate, %"}
    assert {m.stage: m.value for m in measures} == {"iter_1": 25, "iter_2": 75}
    (text,) = [path.read_text() for path in tmp_path.glob("evaluation/2/report.md")]
    assert "# AlpacaEval 2: drift-iter_2\n" in text and "| drift-iter_2 | 75.00" in text and "Judge: judge-1," in text


def test_table_plot_and_page(drift: Drift, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra analysis")
    words = ["evaluate", "compare", run, f"</title><script>alert(1)</script>={run}", "--out"]
    code, said, err = drift(*words, tmp_path / "out")
    assert code == 0, err
    assert "training loss" in said and "iter_2" in said
    page = (tmp_path / "out/compare.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "<b>base" not in page and "<svg" in page
    assert "<script" not in (tmp_path / "out/compare.md").read_text()
    with (tmp_path / "out/compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    methods = {row["method"] for row in rows}
    assert methods == {"drift", "</title><script>alert(1)</script>"}
    margin = next(r for r in rows if r["metric"] == "held-out margin" and r["iteration"] == "2")
    assert float(margin["low"]) < float(margin["value"]) < float(margin["high"])
    drift(*words, tmp_path / "again")
    for name in ("compare.svg", "compare.csv", "compare.html", "compare.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_metrics_are_chosen_by_their_name(run: Path) -> None:
    measures, _ = collect([str(run)])
    assert choose_metrics(measures, ["LOSS"]) == ["training loss"]
    assert not any("tokens" in metric for metric in choose_metrics(measures, []))
    shown, ticks = build_series(measures, ["training loss"])
    assert ticks == {0: "seed", 1: "1", 2: "2"}
    assert shown["training loss"]["drift"][2] == (2, pytest.approx(0.6), None)
    with pytest.raises(ConfigError, match="no metric contains 'elo'; there are: held-out accuracy;"):
        choose_metrics(measures, ["elo"])


def test_what_has_no_results_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both called drift"):
        collect([str(run), f"drift={tmp_path}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no results"):
        collect([str(tmp_path / "empty")])
    (run / "seed/eval.json").write_text("{")
    with pytest.raises(DataError, match=r"eval.json is not JSON"):
        read_results("drift", run)
