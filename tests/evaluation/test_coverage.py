"""Coverage of the high-reward region: on maps whose answer is known, from files, and the same bytes each time."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from drift_jax.errors import ConfigError, DataError
from drift_jax.evaluation.coverage import find_coverage, reward_weights
from drift_jax.evaluation.coverage_run import draw_map, find_rewards
from drift_jax.evaluation.coverage_settings import CoverageConfig, load_settings
from drift_jax.evaluation.embed import check_packages
from drift_jax.evaluation.replies import Reply, keep_common, name_sources, read_replies
from tests.cli_runs import Drift, drift  # noqa: F401

SUBJECTS = ("sorting lists in Python", "baking bread", "the moons of Jupiter", "verbs in French", "growing tomatoes")


def write_replies(path: Path, texts: list[str], **columns: list[float]) -> Path:
    rows = [
        {"id": f"p{i}", "output": text} | {name: values[i] for name, values in columns.items()}
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def say(subject: str, number: int) -> str:
    return f"Here is step {number} about {subject}: look at {subject} closely, then note {number} things on {subject}."


@pytest.fixture()
def files(tmp_path: Path) -> list[str]:
    """One method speaks of five subjects, the other of one; rewards are equally high."""
    wide = [say(SUBJECTS[i % 5], i) for i in range(40)]
    narrow = [say(SUBJECTS[0], i) for i in range(40)]
    rewards = [float(i % 7) for i in range(40)]
    return [
        f"wide={write_replies(tmp_path / 'a.jsonl', wide, reward=rewards)}",
        f"narrow={write_replies(tmp_path / 'b.jsonl', narrow, reward=rewards)}",
    ]


# --- maps whose answer is known -----------------------------------------------------------------------------


def measure(points: list[np.ndarray], rewards: list[np.ndarray], **settings: object) -> list[tuple[float, float]]:
    methods = np.concatenate([np.full(len(of), i) for i, of in enumerate(points)])
    prompts = np.concatenate([np.arange(len(of)) for of in points])
    chosen = CoverageConfig(**({"resamples": 20, "grid": 60} | settings))  # type: ignore[arg-type]
    found = find_coverage(np.concatenate(points), np.concatenate(rewards), methods, prompts, chosen)
    return [(share.coverage, share.share) for share in found.shares]


def cloud(count: int = 200, seed: int = 0, spread: float = 1.0, at: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(at, spread, (count, 2))


def test_methods_that_are_alike_cover_all_of_it() -> None:
    rewards = np.arange(200.0)
    assert measure([cloud(), cloud()], [rewards, rewards]) == [(1.0, pytest.approx(0.5))] * 2


def test_twice_the_replies_are_not_twice_the_coverage() -> None:
    twice, rewards = np.repeat(cloud(), 2, axis=0), np.arange(200.0)
    found = measure([twice, cloud()], [np.repeat(rewards, 2), rewards])
    assert found == [(1.0, pytest.approx(0.5))] * 2


def test_a_collapse_loses_coverage_and_not_its_share() -> None:
    equal = np.ones(200)
    (wide, wide_share), (narrow, narrow_share) = measure([cloud(), cloud(spread=0.15)], [equal, equal])
    assert wide > 0.95 and narrow < 0.3 and narrow_share < 0.9 and wide_share < 0.9


def test_a_method_that_is_elsewhere_covers_nothing() -> None:
    """The negative twin of likeness; rewards are low there."""
    (here, _), (there, share) = measure([cloud(), cloud(at=9.0, seed=1)], [np.ones(200), np.zeros(200)])
    assert here > 0.95 and there == 0 and share < 0.1


def test_only_the_order_of_rewards_counts_by_rank() -> None:
    rewards = np.array([1.0, 5.0, 5.0, 100.0])
    assert reward_weights(rewards, "rank").tolist() == reward_weights(np.exp(rewards / 9), "rank").tolist()
    assert reward_weights(rewards, "rank").tolist() == [0.125, 0.5, 0.5, 0.875]
    assert reward_weights(rewards, "minmax").tolist() == [0, 4 / 99, 4 / 99, 1]
    assert reward_weights(np.ones(3), "minmax").tolist() == [1, 1, 1]


def test_intervals_of_shares_have_their_nominal_coverage() -> None:
    """Of the share, which is a ratio of means: of clouds with other rewards, against that of many points."""
    rng = np.random.default_rng(0)
    chosen = CoverageConfig(resamples=60, grid=20, bandwidth=0.5, reward_scale="minmax")

    def draw(count: int) -> list[np.ndarray]:
        return [rng.normal(0, 1, (count, 2)), rng.normal(0.5, 1, (count, 2))]

    def find(points: list[np.ndarray]) -> float:
        count = len(points[0])
        which = np.repeat([0, 1], count), np.tile(np.arange(count), 2)
        return find_coverage(np.concatenate(points), np.ones(2 * count), *which, chosen).shares[0]

    truth, held = np.mean([find(draw(3000)).share for _ in range(3)]), 0
    for _ in range(150):
        low, high = find(draw(40)).share_interval
        held += low <= truth <= high
    assert 0.88 < held / 150 < 1  # 95 % give or take 1.8, and the region moves with the draw as well


# --- from files ---------------------------------------------------------------------------------------------


def evaluate(drift: Drift, files: list[str], out: Path, *words: object) -> str:
    code, said, err = drift("evaluate", "coverage", *files, "--out", out, "--set", "resamples=20", *words)
    assert code == 0, err
    return said


@pytest.mark.parametrize("projection", ["svd", pytest.param("umap", marks=pytest.mark.slow)])
def test_the_same_call_writes_the_same_bytes(drift: Drift, files: list[str], tmp_path: Path, projection: str) -> None:
    for package in ("sklearn", "matplotlib") + (("umap",) if projection == "umap" else ()):
        pytest.importorskip(package, reason=f"{package} is in the extra analysis")
    names = ("report.json", "points.csv", "coverage.svg", "coverage.html", "report.md")
    words = ["--set", f"projection={projection}"]
    said = evaluate(drift, files, tmp_path / "1", *words)
    evaluate(drift, files, tmp_path / "2", *words)
    assert "wide" in said and "coverage.html" in said.replace("\n", "")
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    evaluate(drift, files[::-1], tmp_path / "turned", *words)
    assert (tmp_path / "1/points.csv").read_bytes() == (tmp_path / "turned/points.csv").read_bytes()
    methods = json.loads((tmp_path / "1/report.json").read_text())["methods"]
    assert methods["wide"]["coverage"] > methods["narrow"]["coverage"]
    assert (tmp_path / "1/coverage.png").stat().st_size > 10_000
    page = (tmp_path / "1/coverage.html").read_text()
    assert "<script" not in page and "<svg" in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links and all(link.startswith(("#", "data:image/png")) for link in links), "the page must load nothing"


def test_another_seed_or_region_is_another_result(drift: Drift, files: list[str], tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is in the extra analysis")
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra analysis")
    found = []
    for i, words in enumerate(([], ["--set", "region_area=0.9"], ["--set", "seed=1"])):
        evaluate(drift, files, tmp_path / str(i), "--set", "projection=svd", *words)
        methods = json.loads((tmp_path / str(i) / "report.json").read_text())["methods"]
        found.append(json.dumps(methods))
    assert len(set(found)) == 3


def embed_by_letters(texts: list[str]) -> np.ndarray:
    return np.array([[text.lower().count(letter) for letter in "aeiost"] for text in texts], float)


def reward_short(messages: list[dict[str, str]], reply: str, row: dict) -> float:
    return -len(reply)


def test_embedder_and_scorer_may_be_the_users(drift: Drift, tmp_path: Path) -> None:
    """Names are shown as they are: none of them is markup or mathematics."""
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra analysis")
    texts = [say(SUBJECTS[i % 5], i) for i in range(20)]
    file = write_replies(tmp_path / "a.jsonl", texts)
    here = "tests.evaluation.test_coverage"
    words = ["--set", f"embedder={here}:embed_by_letters", "--set", f"reward={here}:reward_short"]
    sources = [f"<script>$x^2$</script>={file}", f"b={file}"]
    evaluate(drift, sources, tmp_path / "out", *words, "--set", "projection=svd")
    methods = json.loads((tmp_path / "out/report.json").read_text())["methods"]
    assert methods["b"]["reward"] == pytest.approx(-np.mean([len(text) for text in texts]))
    for name in ("coverage.html", "coverage.svg"):
        text = (tmp_path / "out" / name).read_text()
        assert "<script>" not in text and "&lt;script&gt;$x^2$" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "rewrad=x"], "rewrad: .*The keys are reward, reward_scale"),
        (["--set", "region_area=1.5"], "region_area: .*less than or equal to 1"),
        (["--set", "min_dist=5"], "min_dist: .*less than or equal to 1, found 5"),
        (["--set", "reward=column:score"], "80 of 80 replies have no reward by column:score.*score of the row must be"),
        (["--set", "reward=nowhere:f"], "nowhere.*Modules are looked for in"),
        (["--set", "reward=implicit"], "--policy and --reference belong to"),
    ],
)
def test_what_can_be_mended_is_said(
    drift: Drift, files: list[str], tmp_path: Path, words: list[str], message: str
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra analysis")
    code, _, err = drift("evaluate", "coverage", *files, "--out", tmp_path / "out", *words)
    assert code == 2 and not (tmp_path / "out").exists()
    assert re.search(f"(?s){message}", err.replace("\n", " ")), err


@pytest.mark.parametrize(("module", "package"), [("umap", "umap-learn"), ("sklearn", "scikit-learn")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found("json"))
    with pytest.raises(ConfigError, match=rf"needs the package {package}: pip install 'drift-jax\[analysis\]'"):
        check_packages(CoverageConfig())
    check_packages(CoverageConfig(embedder="a:b", projection="svd"))


def test_replies_are_found_in_the_files_of_runs(tmp_path: Path) -> None:
    for k in (1, 2, 10):
        (tmp_path / f"run/iter_{k}").mkdir(parents=True)
        row = {"id": "d1", "sample": 0, "text": f"of {k}"}
        (tmp_path / f"run/iter_{k}/completions.jsonl").write_text(json.dumps(row) + "\n")
    pair = {"prompt": [{"role": "user", "content": "Hi"}], "meta": {"id": "d1"}}
    pair |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    given = name_sources([str(tmp_path / "run"), str(tmp_path / "run/iter_2"), str(tmp_path / "pairs.jsonl")])
    read = {name: read_replies(name, path, {})[0][0] for name, path in given.items()}
    assert {name: reply.text for name, reply in read.items()} == {
        "run": "of 10",
        "run-iter_2": "of 2",
        "pairs": "chosen",
    }
    assert {reply.prompt for reply in read.values()} == {"d1"} and read["pairs"].messages[0]["content"] == "Hi"
    with pytest.raises(ConfigError, match="two methods are called run"):
        name_sources([str(tmp_path / "run"), f"run={tmp_path / 'pairs.jsonl'}"])


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    replies = [Reply(m, p, 0, "x", (), {}) for m, p in (("a", "1"), ("a", "2"), ("b", "2"), ("b", "3"))]
    kept, left = keep_common(replies)
    assert [(r.method, r.prompt) for r in kept] == [("a", "2"), ("b", "2")] and left == {"a": 1, "b": 1}
    with pytest.raises(DataError, match="no prompt has replies of all methods"):
        keep_common([replies[0], replies[3]])
    path = write_replies(tmp_path / "a.jsonl", ["x", "  ", "y"])
    found, empty = read_replies("a", path, {})
    assert (len(found), empty) == (2, 1)
    with path.open("a") as file:
        file.write('{"id": "p0", "sample": 0, "output": "again"}\n{"id": "p9"}\n')
    with pytest.raises(DataError, match=r"2 of 5 replies.*(?s:.*)sample 0 is row 1 too(?s:.*)row 5: none of text"):
        read_replies("a", path, {})


def test_too_few_replies_and_rewards_that_are_no_numbers() -> None:
    from rich.console import Console

    replies = [Reply("a", str(i), 0, "x", (), {"reward": float("nan")}) for i in range(9)]
    with pytest.raises(DataError, match="9 replies are too few"):
        draw_map(["a"], replies, CoverageConfig(), None, Console(file=io.StringIO()))
    with pytest.raises(DataError, match="nan is no finite number"):
        find_rewards(replies, "column:reward", None)
    assert load_settings(None, ["bandwidth=0.3"]).bandwidth == 0.3
