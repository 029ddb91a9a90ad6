"""`drift report` and `drift card`: what stands in the page, that no text in it is markup, its size, `--watch`."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drift_jax.errors import ConfigError, DataError
from drift_jax.evaluation.alpaca_eval import build_report, win_rates
from drift_jax.evaluation.report import write_report
from drift_jax.files import write_jsonl
from drift_jax.records import Message, SatRecord, sat_to_row
from drift_jax.report import page
from drift_jax.report.card import code_span, write_card
from drift_jax.report.page import render_page, write_page
from drift_jax.report.pairs import build_browser
from drift_jax.report.runs import load_run, load_runs
from drift_jax.report.watch import watch
from tests.cli_runs import Drift, drift  # noqa: F401
from tests.fake_hub import FakeHub
from tests.report_runs import DROPPED, HELD_OUT, plain, write_run

ROOM = 9_000_000
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<!--<script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload="window.hacked = 1">',
    "{{ 7 * 7 }} {% raw %} ${x} $\\frac{a}{b}$",
    "&lt;b&gt; &amp; \u2028 \u2029 \x00 \ufeff \U0001f600 \u202e",
)


class Elements(HTMLParser):
    """What a page is made of: names and attributes of elements, and the text in each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.handlers: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run", theory=True, warnings=["it went <b>wrong</b>"])


@pytest.fixture(scope="module")
def text(run_dir: Path) -> str:
    return render_page([load_run(run_dir)])


def test_the_page_has_every_section_of_a_run(text: str) -> None:
    for heading in ("Stages", "Curves", "Drops", "Lengths and margins", "Theory", "Margins kept", "Pairs", "Made from"):
        assert re.search(rf"<h[23]>{heading}</h[23]>", text), heading
    for title in ("Loss", "Reward margin", "Log-probs, nats per completion", "Gradient norm", "Learning rate"):
        assert f"<figcaption>{title}</figcaption>" in text
    assert text.count("<svg") == len(page.CURVES) + len(page.THEORY) + 3
    # The resolved config, versions and hashes.
    assert "beta: 0.1" in text and "<td>jax</td>" in text and f"<td>{2:064x}"[:20] in text
    assert "it went &lt;b&gt;wrong&lt;/b&gt;" in text
    assert "+0.800 (80%)" in text
    assert "mathdefault" not in text


def test_what_a_run_has_not_is_left_out(tmp_path: Path) -> None:
    text = render_page([load_run(write_run(tmp_path / "run", theory=False))])
    assert 'id="theory"' not in text and 'id="coverage"' not in text and 'id="curves"' in text


def test_a_page_without_matplotlib_says_what_to_install(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "has_matplotlib", lambda: False)
    text = render_page([load_run(run_dir)])
    assert "<svg" not in text and "drift-jax[analysis]" in text and 'id="pairs"' in text


def test_colours_of_figures_are_the_pages_own(text: str) -> None:
    colours = set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6}|var\(--\w+\))", text[text.index("<svg") :]))
    assert {"var(--c0)", "var(--ink)"} <= colours
    assert not {colour for colour in colours if colour.startswith("#")}


def test_records_have_complaint_replies_margins_and_drops(run_dir: Path) -> None:
    data = build_browser([load_run(run_dir)], ROOM)
    records = {record["id"]: record for record in data["records"]}
    assert [column["name"] for column in data["columns"]] == ["iter_1", "iter_2"]
    held_out, trained, lost = records["r0"], records[f"r{HELD_OUT}"], records["r24"]
    assert held_out["complaint"] == plain(0, "complaint") and held_out["prompt"] == [["user", plain(0, "prompt")]]
    assert [held_out["texts"][stage["chosen"]] for stage in held_out["stages"]] == [
        plain(0, "chosen 1"),
        plain(0, "chosen 2"),
    ]
    assert all(stage["margin"] is not None and stage["split"] == "test" for stage in held_out["stages"])
    assert all(stage["margin"] is None and not stage["drops"] for stage in trained["stages"])
    assert lost["prompt"] == [["user", plain(24, "prompt")]] and lost["stages"][1]["chosen"] is None
    assert lost["texts"] == [plain(24, "drawn 1"), plain(24, "drawn 2")]
    assert lost["stages"][1]["drops"] == [[1, "speaks for another"], [None, "record left out"]]
    assert data["reasons"] == {"record left out": DROPPED, "speaks for another": DROPPED}
    assert data["total"] == len(records) == 24 + DROPPED


def test_a_run_may_hold_nothing_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "iter_1" / "pairs.test.jsonl").write_text("")
    record = next(r for r in build_browser([load_run(run)], ROOM)["records"] if r["id"] == "r0")
    assert [stage["column"] for stage in record["stages"]] == [1]


def test_several_runs_share_records(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "other")
    data = build_browser(load_runs([f"one={run_dir}", f"two={tmp_path / 'other'}"]), ROOM)
    assert [column["name"] for column in data["columns"]] == ["one iter_1", "one iter_2", "two iter_1", "two iter_2"]
    assert [stage["column"] for stage in data["records"][0]["stages"]] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="are both called run"):
        load_runs([str(run_dir), f"run={tmp_path / 'other'}"])


def test_a_missing_file_of_records_is_said_and_costs_only_the_complaints(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "dsat.jsonl").unlink()
    data = build_browser([load_run(run)], ROOM)
    assert "complaints are not shown" in data["missing"][0]
    assert data["records"][0]["complaint"] is None and data["records"][0]["texts"]


def test_records_of_spin_are_the_sat_ones_and_nobody_complained(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    config["recipe"]["method"], config["data"]["sat"] = "spin", str(tmp_path / "sat.jsonl")
    (run / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    sat = [
        SatRecord(f"r{i}", (Message("user", plain(i, "sat prompt")),), plain(i, "liked"), "Thanks.")
        for i in range(24 + DROPPED)
    ]
    write_jsonl(tmp_path / "sat.jsonl", map(sat_to_row, sat))
    records = {record["id"]: record for record in build_browser([load_run(run)], ROOM)["records"]}
    assert records["r24"]["prompt"] == [["user", plain(24, "sat prompt")]]  # only a drop is known of it
    assert all(record["complaint"] is None for record in records.values())
    (tmp_path / "sat.jsonl").unlink()
    assert "prompts are not shown" in build_browser([load_run(run)], ROOM)["missing"][0]


def test_records_beyond_the_limit_are_left_out_and_counted(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_browser([load_run(run_dir)], ROOM)["records"]
    data = build_browser([load_run(run_dir)], len(json.dumps(whole)) // 2)
    assert 0 < len(data["records"]) < len(whole) == data["total"]
    assert [r for r in whole if r in data["records"]] == data["records"]
    monkeypatch.setattr(page, "has_matplotlib", lambda: False)
    monkeypatch.setattr(page, "_MOST_BYTES", page._FRAME_BYTES + len(json.dumps(whole)) // 2)
    assert f"{len(data['records'])} of {len(whole)} records are in this page" in render_page([load_run(run_dir)])


def test_500_pairs_of_full_length_stay_below_10_mb(tmp_path: Path) -> None:
    def long(record: int, what: str) -> str:
        return f"{what} {record} " + " ".join(f"word{(record * 31 + i) % 997}" for i in range(330))

    run = write_run(tmp_path / "run", pairs=500, say=long, steps=200)
    write_page([load_run(run)], run / "report.html")
    assert len(build_browser([load_run(run)], ROOM)["records"]) == 500 + DROPPED
    assert 5e6 < (run / "report.html").stat().st_size < 10e6


def test_maps_of_coverage_in_the_run_are_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "has_matplotlib", lambda: False)
    run = write_run(tmp_path / "run")
    for name, benchmark in (("cov", "coverage"), ("iter_2/cov", "coverage"), ("other", "preference")):
        (run / name).mkdir()
        methods = {"methods": {}, "stages": {}, "pairs_file": "a"}
        (run / name / "report.json").write_text(json.dumps({"benchmark": benchmark, **methods}))
        (run / name / "coverage.png").write_bytes(b"a picture")
    text = render_page([load_run(run)])
    assert re.findall(r"<figcaption>(.*?)</figcaption><img[^>]* src=\"data:image/png;base64,YSBwaWN0dXJl\"", text) == [
        "run/cov",
        "run/iter_2/cov",
    ]


# --- hostile text -------------------------------------------------------------------------------------------

TEXT = st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1, max_size=40)).filter(
    lambda text: bool(text.strip()) and not re.search("[\ud800-\udfff]", text)
)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The elements of the page of a run of the same shape, whose every text is a letter."""
    folder = tmp_path_factory.mktemp("harmless")
    run = write_run(folder, HELD_OUT + 1, 1, lambda i, what: "a", 0, warnings=["a"])
    return Elements(render_page([load_run(run)])).names


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=TEXT, reply=TEXT, complaint=TEXT, reason=TEXT)
def test_no_text_of_a_chat_is_markup(
    prompt: str, reply: str, complaint: str, reason: str, harmless: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    texts = {"prompt": prompt, "complaint": complaint}
    folder = tmp_path_factory.mktemp("hostile")
    run = write_run(folder, HELD_OUT + 1, 1, lambda i, what: texts.get(what, reply), 0, warnings=[reason])
    drops = json.loads((run / "iter_1" / "drops.json").read_text())
    for row in drops["rows"]:
        row["reason"] = reason
    (run / "iter_1" / "drops.json").write_text(json.dumps(drops))
    found = Elements(render_page([load_run(run)]))
    assert found.names == harmless
    assert found.handlers == [] and len(found.scripts) == 2
    record = json.loads(found.scripts[0])["records"][0]
    assert record["prompt"] == [["user", prompt]] and record["complaint"] == complaint
    assert record["texts"] == [reply]


def test_the_check_on_markup_can_fail() -> None:
    bare = f'<script type="application/json">{json.dumps(HOSTILE[0])}</script>'
    assert len(Elements(bare).scripts) == 2
    assert len(Elements(f'<script type="application/json">{page.to_script_json(HOSTILE[0])}</script>').scripts) == 1


def test_names_of_runs_and_prompts_of_the_showcase_are_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", theory=True)
    answers = [{"prompt": HOSTILE[0], "before": HOSTILE[2], "after": HOSTILE[3]}]
    (run / "showcase.json").write_text(json.dumps(answers))
    shutil.copytree(run, tmp_path / "other")
    found = Elements(render_page(load_runs([f"{HOSTILE[1]}$x^2$={run}", f"</title>{HOSTILE[1]}={tmp_path / 'other'}"])))
    assert len(found.scripts) == 2 and found.handlers == [] and "img" not in found.names


# --- the commands -------------------------------------------------------------------------------------------


def test_the_command_writes_into_the_run_and_needs_a_name_for_several(drift: Drift, run_dir: Path) -> None:
    code, out, _ = drift("report", run_dir)
    assert code == 0 and "report.html" in out and (run_dir / "report.html").read_text().startswith("<!doctype html>")
    code, _, err = drift("report", run_dir, f"b={run_dir}")
    assert code == 2 and "--out FILE" in err
    code, _, err = drift("report", run_dir / "iter_1")
    assert code == 2 and "is no run" in err


def test_watch_follows_a_run_until_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "has_matplotlib", lambda: False)
    run, out, told = tmp_path / "run", tmp_path / "page.html", []
    pages: list[str] = []

    def sleep(seconds: float) -> None:
        if out.exists():
            pages.append(out.read_text())
            write_run(run, iterations=1, finished=True)
        else:
            write_run(run, iterations=1, finished=False)

    watch([str(run)], out, 3.0, told.append, sleep)
    assert 'data-refresh="3.0"' in pages[0] and "Not finished: run" in pages[0]
    assert "data-refresh" not in out.read_text() and "Not finished" not in out.read_text()
    assert [line.split(":")[0] for line in told] == ["waiting", str(out), str(out)]


def test_the_card_has_data_recipe_figures_and_licence(drift: Drift, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", warnings=["rewards/chosen fell | <b>"])
    code, _, err = drift("card", run)
    assert code == 2 and "no exported policy" in err
    for name in ("base", "iter_2/hf"):
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text("{}")
    (run / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert drift("card", run)[0] == 0
    text = (run / "iter_2" / "hf" / "README.md").read_text()
    head, body = text.split("---\n")[1:3]
    assert "license: apache-2.0" in head and "| licence of the base | `apache-2.0` |" in body
    assert "| base model | `base` |" in body and str(tmp_path) not in text
    assert "beta `0.1`" in body and "| iter_2 | 16 | 6 | 0.6000 |" in body and f"{HELD_OUT} pairs" in body
    assert "28 rows" in body and "`rewards/chosen fell | <b>`" in body and "| speaks for another | 4 | 4 |" in body
    (run / "base" / "README.md").unlink()
    assert drift("card", run)[0] == 0
    assert "not stated in the base's files" in (run / "iter_2" / "hf" / "README.md").read_text()
    assert drift("card", run, "--license", "mit", "--out", tmp_path / "c.md")[0] == 0
    assert "license: mit" in (tmp_path / "c.md").read_text()


@pytest.mark.parametrize("name, text", [("README.md", "---\nlicense: mit\n---\n"), ("LICENSE", "MIT License\n")])
def test_the_card_knows_the_licence_of_a_base_from_the_hub(
    drift: Drift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    run = write_run(tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(run / "base"), "Some/Base"))
    for folder in (tmp_path / "base", run / "iter_2/hf"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (tmp_path / "base" / name).write_text(text)
    monkeypatch.setattr("huggingface_hub.snapshot_download", FakeHub(tmp_path / "base", tmp_path / "hub").download)
    assert drift("card", run)[0] == 0
    card = (run / "iter_2/hf/README.md").read_text()
    assert "license: mit" in card and "base_model: Some/Base" in card


def test_the_card_has_results_of_alpaca_eval(drift: Drift, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "iter_2/hf").mkdir()
    (run / "iter_2/hf/config.json").write_text("{}")
    for k, preference in ((1, 1.25), (2, 1.75)):
        rates = win_rates([{"preference": preference}] * 20)
        write_report(build_report(rates, f"run-iter_{k}", "judge-1", "a"), run / f"evaluation/{k}")
    code, _, err = drift("card", run)
    assert code == 0, err
    text = (run / "iter_2/hf/README.md").read_text()
    assert "`AlpacaEval 2 win rate, %`: 75" in text and "`AlpacaEval 2 win rate, %`: 25" not in text


@pytest.mark.parametrize(("value", "shown"), [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a\nb", "`a b`")])
def test_code_of_a_card_cannot_be_left(value: str, shown: str) -> None:
    assert code_span(value) == shown


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "iter_1" / "eval.json").write_text("{")
    with pytest.raises(DataError, match=r"iter_1/eval.json"):
        load_run(run)
    with pytest.raises(DataError, match="is no run"):
        write_card(load_run(tmp_path))
