"""`drift mine` as a person runs it: files, counts that add up, nothing private, the same bytes again."""

from __future__ import annotations

import hashlib
import html.parser
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from drift_jax.config import build_config
from drift_jax.data.mining import text_rows
from drift_jax.data.mining.config import MiningConfig, SplitRules
from drift_jax.data.mining.sources import find_sources
from drift_jax.errors import DataError
from drift_jax.records import read_dsat, read_pairs, read_sat
from drift_jax.stages.inputs import load_split, refuse_held_out
from drift_jax.stages.mine import MineJob, mine_stage
from tests.cli_runs import Drift, drift  # noqa: F401
from tests.mining.utterances import StubDetector, agent, read_file, stub_detector, user, write_rows  # noqa: F401

HOSTILE = '</div><script>alert("x")</script> & <img src=x onerror=alert(1)> {{ 7 * 7 }}'
FILES = ("dsat.jsonl", "sat.jsonl", "seed.train.jsonl", "seed.test.jsonl", "stats.json", "mined.html", "README.md")


def conversation(i: int, complaint: str = "No, that is wrong") -> list[dict[str, Any]]:
    """A complaint and a revised reply, unlike those of any other i."""
    mark = hashlib.sha256(str(i).encode()).hexdigest()
    return [
        user(0, f"question {mark[:20]}"), agent(1, f"answer {mark[20:40]}"),
        user(2, f"{complaint} {mark[40:50]}", dsat=True), agent(3, f"better answer {mark[50:60]}"),
        user(4, f"thanks {mark[60:]}", sat=True),
    ]  # fmt: skip


@pytest.fixture()
def labelled(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "wf.jsonl", [row for i in range(60) for row in conversation(i)])


def digests(directory: Path) -> dict[str, str]:
    paths = [path for path in directory.iterdir() if path.name != ".lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def mine(drift: Drift, *words: object, log_format: str = "wildfeedback") -> dict[str, Any]:
    code, _, err = drift("mine", *words, "--format", log_format)
    assert code == 0, err
    out = Path(str(words[words.index("--out") + 1]))
    return json.loads((out / "stats.json").read_text())


def test_labelled_conversations_become_records(drift: Drift, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stats = mine(drift, labelled, "--out", out, "--set", "split.test_share=0.2")
    assert sorted(digests(out)) == sorted(FILES)
    assert stats["records"]["dsat"] == stats["records"]["sat"] == stats["records"]["seed"]
    assert sum(stats["records"]["dsat"].values()) == 60 and 4 < stats["test_rows"] < 25
    assert {name: file["sha256"] for name, file in stats["files"].items()}.items() <= digests(out).items()
    dsat, sat = read_dsat(out / "dsat.jsonl").records, read_sat(out / "sat.jsonl").records
    seed = {side: read_pairs(out / f"seed.{side}.jsonl").records for side in ("train", "test")}
    assert [len(seed["test"]), len(seed["train"])] == [stats["test_rows"], 60 - stats["test_rows"]]
    sides = [record.extra["meta"]["split"] for record in dsat]
    assert sides == ["test"] * stats["test_rows"] + ["train"] * (60 - stats["test_rows"])
    openings = {
        side: {r.prompt[0].content for r in (*dsat, *sat) if r.extra["meta"]["split"] == side}
        | {pair.prompt[0].content for pair in seed[side]}
        for side in ("train", "test")
    }
    assert openings["train"] and openings["test"] and not openings["train"] & openings["test"]


def test_a_run_reads_the_records_as_they_are(drift: Drift, labelled: Path, tmp_path: Path) -> None:
    """The loader of `drift run` and `drift sample` holds exactly the test side out."""
    stats = mine(drift, labelled, "--out", tmp_path / "out")
    config = build_config({"run_dir": "r", "model": {"path": "m"}, "data": {"test_rows": stats["test_rows"]}})
    split = load_split(config, str(tmp_path / "out/dsat.jsonl"))
    assert {record.extra["meta"]["split"] for record in split.train} == {"train"}
    assert {record.extra["meta"]["split"] for record in split.test} == {"test"}
    record = split.train[0]
    assert record.id == "wf.jsonl:3" and record.extra["meta"]["evidence"] == {"by": "label", "label": "Disatisfaction"}


def test_the_same_input_gives_the_same_bytes(drift: Drift, labelled: Path, tmp_path: Path) -> None:
    mine(drift, labelled, "--out", tmp_path / "one")
    before = digests(tmp_path / "one")
    mine(drift, labelled, "--out", tmp_path / "one")
    mine(drift, labelled, "--out", tmp_path / "two")
    assert before == digests(tmp_path / "one") == digests(tmp_path / "two")


def test_every_record_is_a_row_or_counted(drift: Drift, tmp_path: Path) -> None:
    """Found = written + left out by hygiene, for each kind; each duplicate under its reason."""
    rows = [row for i in range(20) for row in conversation(i)]
    rows += conversation(3)  # letter by letter
    near = conversation(4)
    near[1] = near[1] | {"Content": near[1]["Content"] + "!"}
    near[3] = near[3] | {"Content": near[3]["Content"] + "!"}
    rows += [*near, *conversation(99, complaint="x" * 9000)]
    stats = mine(drift, write_rows(tmp_path / "wf.jsonl", rows), "--out", tmp_path / "out")
    left = stats["left_out"]["hygiene"]
    assert left == {
        **{f"{kind}: exact duplicate": 1 for kind in ("dsat", "sat", "seed")},
        **{f"{kind}: near-duplicate": 1 for kind in ("dsat", "seed")},
        **{f"{kind}: complaint too long": 1 for kind in ("dsat", "seed")},
        "sat: near-duplicate": 1,
    }
    for kind, found in stats["found"].items():
        lost = sum(count for reason, count in left.items() if reason.startswith(f"{kind}:"))
        assert found == sum(stats["records"][kind].values()) + lost == 23


def test_a_row_that_was_cut_off(drift: Drift, labelled: Path, tmp_path: Path) -> None:
    """Refused with its number and a way out; with `skip`, all that stands before it is kept."""
    whole = labelled.read_bytes()
    labelled.write_bytes(whole[:-30])
    code, _, err = drift("mine", labelled, "--format", "wildfeedback", "--out", tmp_path / "out")
    said = " ".join(err.split())
    assert code == 2 and "wf.jsonl:300: not JSON" in said and "it was cut off" in said
    assert "--on-bad-row skip" in said and not (tmp_path / "out").exists()
    stats = mine(drift, labelled, "--out", tmp_path / "out", "--on-bad-row", "skip")
    assert stats["rows"] == {"read": 300, "bad": 1} and stats["bad_rows"][0]["row"] == 300
    assert {kind: sum(counts.values()) for kind, counts in stats["records"].items()} == {
        "dsat": 60,
        "sat": 59,
        "seed": 59,
    }


def wildchat(i: int, **flags: Any) -> dict[str, Any]:
    private = {"hashed_ip": f"PRIVATE-ip{i}", "header": {"accept-language": "PRIVATE-header"}}
    private |= {"country": "PRIVATE-country", "state": "PRIVATE-state"}
    texts = (f"question {i} {HOSTILE}", f"answer {i}", f"No, {i} {HOSTILE}", "sorry")
    turns = [
        {"role": ("user", "assistant")[k % 2], "content": text, "toxic": False, "redacted": False, **private}
        for k, text in enumerate(texts)
    ]
    return {"conversation_hash": f"h{i}", "conversation": turns, "openai_moderation": [], **private, **flags}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_nothing_private_is_in_any_file(drift: Drift, tmp_path: Path, stub_detector: None, suffix: str) -> None:
    rows = [wildchat(i) for i in range(8)] + [wildchat(8, toxic=True), wildchat(9, redacted=True)]
    path = write_rows(
        tmp_path / "wc.jsonl", [*rows, {"conversation": [{"hashed_ip": "PRIVATE"}], "country": "PRIVATE"}]
    )
    if suffix == "parquet":
        import datasets

        path = tmp_path / "wc.parquet"
        datasets.Dataset.from_list([{"toxic": False, "redacted": False} | row for row in rows]).to_parquet(str(path))
    elif suffix == "csv":
        import csv

        path = tmp_path / "wc.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["conversation", "country", "toxic", "redacted"])
            writer.writerows(
                [json.dumps(r["conversation"]), r["country"], r.get("toxic"), r.get("redacted")] for r in rows
            )
    options = ("--set", "hygiene.max_similarity=1.0", "--on-bad-row", "skip")
    stats = mine(drift, path, "--out", tmp_path / "out", *options, log_format="wildchat")
    assert stats["records"]["dsat"]["train"] + stats["records"]["dsat"]["test"] == 8
    assert stats["left_out"]["input"] == {"redacted": 1, "toxic": 1}
    for name in FILES:
        assert "PRIVATE" not in (tmp_path / "out" / name).read_text(), name


def test_a_message_in_csv_may_look_like_json(drift: Drift, tmp_path: Path) -> None:
    import csv

    rows = [user(0, "Give me a list."), agent(1, "[1, 2]"), user(2, '{"not": "what I asked for"}', dsat=True)]
    path = tmp_path / "wf.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    mine(drift, path, "--out", tmp_path / "out", log_format="wildfeedback")
    (row,) = read_file(tmp_path / "out/dsat.jsonl")
    assert row["rejected"][0]["content"] == "[1, 2]"
    assert row["user_preference"]["content"] == '{"not": "what I asked for"}'


def test_records_keep_the_evidence_of_the_detector(drift: Drift, tmp_path: Path, stub_detector: None) -> None:
    path = write_rows(tmp_path / "m.jsonl", [{"messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "No, c"}, {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"},
    ]}])  # fmt: skip
    stats = mine(drift, path, "--out", tmp_path / "out", "--detector", "rules", log_format="messages")
    (row,) = read_file(tmp_path / "out/dsat.jsonl")
    assert row["id"] == "m.jsonl:1#3" and [m["content"] for m in row["prompt"]] == ["S", "a"]
    assert (row["rejected"][0]["content"], row["user_preference"]["content"]) == ("b", "No, c")
    assert row["meta"]["evidence"] == {"detector": "stub", "rules": ["no@1"]}
    assert stats["detector"] == {"complaints": 1} and "no SAT records" in stats["notes"][0]
    assert (tmp_path / "out/sat.jsonl").read_bytes() == b""


class Page(html.parser.HTMLParser):
    """Elements that are opened and closed, and the text of those that hold chat text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.marked = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["mark"]:
            self.marked += data


def test_the_page_shows_hostile_text_as_text(drift: Drift, tmp_path: Path, stub_detector: None) -> None:
    path = write_rows(tmp_path / "<b>wc.jsonl", [wildchat(i) for i in range(3)])
    mine(drift, path, "--out", tmp_path / "out", "--set", "hygiene.max_similarity=1.0", log_format="wildchat")
    page = Page()
    page.feed((tmp_path / "out/mined.html").read_text())
    page.close()
    assert page.open == [] and page.marked.count(HOSTILE) == 3
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "img", "a", "iframe", "link", "b"} - {"b"}
    assert not [attrs for _, attrs in page.seen if any(key.startswith("on") or key in ("src", "href") for key in attrs)]
    assert [attrs["content"] for tag, attrs in page.seen if tag == "meta" and "http-equiv" in attrs] == [
        "default-src 'none'; style-src 'unsafe-inline'"
    ]
    assert page.seen.count(("b", {})) == 3  # ids of the examples; none of the file's name


def test_the_data_card(drift: Drift, labelled: Path, tmp_path: Path) -> None:
    stats = mine(drift, labelled, "--out", tmp_path / "out", "--set", "split.test_share=0.2", "--license", "cc0-1.0")
    card = (tmp_path / "out/README.md").read_text()
    _, head, body = card.split("---\n", 2)
    meta = yaml.safe_load(head)
    assert meta["license"] == "cc0-1.0" and [c["config_name"] for c in meta["configs"]] == ["dsat", "sat", "seed"]
    assert {"split": "test", "path": "seed.test.jsonl"} in meta["configs"][2]["data_files"]
    for file in stats["files"].values():
        assert file["sha256"] in body
    assert stats["sources"][0]["sha256"] == hashlib.sha256(labelled.read_bytes()).hexdigest() and "wf.jsonl" in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == json.loads(json.dumps(stats["rules"]))
    assert str(tmp_path) not in card + json.dumps(stats) + (tmp_path / "out/mined.html").read_text()


def test_the_card_gives_each_file_its_own_number(drift: Drift, labelled: Path, tmp_path: Path) -> None:
    """What is held out of one file is in training where the number of the other one, a smaller one, is taken."""
    rows = [row for i in range(60) for row in conversation(i)]
    happy = [[*conversation(i)[:2], user(2, f"thanks {i}", sat=True)] for i in range(100, 140)]
    path = write_rows(labelled, [*rows, *(row for one in happy for row in one)])
    stats = mine(drift, path, "--out", tmp_path / "out", "--set", "split.test_share=0.2")
    card = (tmp_path / "out/README.md").read_text()
    given = {
        name: int(re.search(rf"`data\.{name}: {name}\.jsonl` .*`data\.test_rows: (\d+)`", card)[1])
        for name in ("dsat", "sat")
    }
    assert given["sat"] > given["dsat"] == stats["test_rows"]
    for name, method in (("dsat", "drift"), ("sat", "spin")):
        raw = {"run_dir": "r", "model": {"path": "m"}, "recipe": {"method": method}}
        split = load_split(
            build_config(raw | {"data": {"test_rows": given[name]}}), str(tmp_path / f"out/{name}.jsonl")
        )
        assert {record.extra["meta"]["split"] for record in split.train} == {"train"}
        assert {record.extra["meta"]["split"] for record in split.test} == {"test"}
    raw = {"run_dir": "r", "model": {"path": "m"}, "recipe": {"method": "spin"}, "data": {"test_rows": given["dsat"]}}
    split = load_split(build_config(raw), str(tmp_path / "out/sat.jsonl"))
    with pytest.raises(DataError, match=rf"held out when they were mined .*Set it to {given['sat']}, or remove"):
        refuse_held_out(split, tmp_path / "out/sat.jsonl")


def test_the_card_of_logs_without_labels_speaks_of_no_sat_records(
    drift: Drift, tmp_path: Path, stub_detector: None
) -> None:
    path = write_rows(tmp_path / "wc.jsonl", [wildchat(i) for i in range(3)])
    mine(drift, path, "--out", tmp_path / "out", "--set", "hygiene.max_similarity=1.0", log_format="wildchat")
    card = (tmp_path / "out/README.md").read_text()
    assert "`data.dsat: dsat.jsonl`" in card and "`data.sat: sat.jsonl`" not in card


def test_masking_is_for_all_files(drift: Drift, tmp_path: Path, stub_detector: None) -> None:
    secret = "jane@example.org"
    rows = conversation(1)
    rows[2] |= {"Content": f"No, {secret} is wrong", "Dissatisfaction-Justificiation": f"{secret} was asked for"}
    path = write_rows(tmp_path / "wf.jsonl", rows)
    assert mine(drift, path, "--out", tmp_path / "plain")["masked"] == {}
    assert secret in (tmp_path / "plain/dsat.jsonl").read_text()
    stats = mine(drift, path, "--out", tmp_path / "masked", "--mask-pii")
    assert stats["masked"]["EMAIL"] > 1
    chats = write_rows(tmp_path / "m.jsonl", [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": f"No, {secret}"} for i in range(4)]}
    ])  # fmt: skip
    stats = mine(drift, chats, "--out", tmp_path / "chats", "--mask-pii", log_format="messages")
    assert stats["masked"] == {"EMAIL": 4} and stats["records"]["dsat"]["train"] == 1
    for name in FILES:
        for directory in ("masked", "chats"):
            assert secret not in (tmp_path / directory / name).read_text(), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "messages", "--detector", "judge", "--set", "detector.speed=1"], "speed: unknown key"),
        (["--format", "wildfeedback", "--detector", "rules"], "which has labels of its own"),
        (["--format", "wildfeedback", "--judge-config", "nowhere.yaml"], "nowhere.yaml"),
        (["--format", "wildfeedback", "--set", "hygiene.max=1"], "hygiene.max"),
        (["--format", "sharegpt"], "conversations must be a list of turns"),
    ],
)
def test_what_cannot_work_is_said(
    drift: Drift, labelled: Path, tmp_path: Path, stub_detector: None, words: list[str], message: str
) -> None:
    code, _, err = drift("mine", labelled, "--out", tmp_path / "out", *words)
    assert code == 2 and message in " ".join(err.split()), err
    assert not (tmp_path / "out/stats.json").exists()


def test_the_settings_of_a_judge_reach_the_detector(
    drift: Drift, tmp_path: Path, stub_detector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    seen: list[Any] = []
    module = sys.modules["drift_jax.data.mining.detect"]
    monkeypatch.setattr(
        module, "build_detector", lambda config, journal: seen.extend((config, journal)) or StubDetector()
    )
    (tmp_path / "judge.yaml").write_text("judge: {base_url: 'http://127.0.0.1:1/v1', model: a, concurrency: 3}\n")
    path = write_rows(tmp_path / "m.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    options = ("--detector", "both", "--judge-config", tmp_path / "judge.yaml", "--judge-model", "b")
    options += ("--rules", "x", "--rules", "y.yaml", "--requests-per-minute", 30)
    stats = mine(drift, path, "--out", tmp_path / "out", *options, log_format="messages")
    config, journal = seen
    assert (config.rules, config.requests_per_minute) == (("x", "y.yaml"), 30.0)
    assert (config.kind, config.judge.base_url, config.judge.model) == ("both", "http://127.0.0.1:1/v1", "b")
    assert config.judge.concurrency == 3 and journal == tmp_path / "out/judge.jsonl"
    assert stats["notes"][-1].startswith("No DSAT record was found")
    assert stats["rules"]["detector"] == {"kind": "both", "rules": ["x", "y.yaml"], "judge": {"model": "b"}}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--requests-per-minute", "0"], "requests_per_minute: Input should be greater than 0, found 0.0."),
        (["--requests-per-minute", "-3"], "requests_per_minute: Input should be greater than 0, found -3.0."),
        (["--judge-config", "{concurrency: 0}"], "judge.concurrency: Input should be greater than or equal to 1"),
        (["--judge-config", "{max_tokens: 0}"], "judge.max_tokens: Input should be greater than or equal to 1"),
        (["--judge-url", ""], "judge.base_url must say which"),
    ],
)
def test_a_nought_is_not_taken_for_what_was_left_out(drift: Drift, tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "judge.yaml").write_text(f"judge: {words[1]}\n")
    path = write_rows(tmp_path / "m.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    given = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", words[0]]
    given.append(str(tmp_path / "judge.yaml") if words[0] == "--judge-config" else words[1])
    more = ["--format", "messages", "--detector", "judge", *given, "--out", tmp_path / "out"]
    code, _, err = drift("mine", path, *more)
    assert code == 2 and says in " ".join(err.split()), err


def test_progress_has_rate_and_time_left(labelled: Path, tmp_path: Path) -> None:
    console = Console(file=(tmp_path / "log").open("w"), width=200)
    job = MineJob(tuple(find_sources([str(labelled)])), "wildfeedback", tmp_path / "out")
    mine_stage(job, MiningConfig(), console)
    console.file.close()
    assert "mining: 1/1 MB" in (tmp_path / "log").read_text() and "/s, done in" in (tmp_path / "log").read_text()


def peak_memory(directory: Path, conversations: int) -> int:
    """Bytes that Python has allocated at most, while conversations of some 4 kB each are mined."""
    said = [{"from": ("human", "gpt")[i % 2], "value": f"No, {'x' * 1000}"} for i in range(4)]
    rows = (
        {"id": f"c{i}", "conversations": [*said[:2], {**said[2], "value": f"No, {i}"}]} for i in range(conversations)
    )
    path = write_rows(directory / f"{conversations}.jsonl", rows)
    job = MineJob(tuple(find_sources([str(path)])), "sharegpt", directory / f"out{conversations}")
    tracemalloc.start()
    mine_stage(job, MiningConfig(split=SplitRules(test_share=0.5)), Console(quiet=True), StubDetector())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each conversation is a complaint: the worst case. What grows are hashes, not texts (2 kB a conversation here)."""
    monkeypatch.setattr(text_rows, "BUFFER", 1 << 14)  # full from the beginning, in all of them
    peak_memory(tmp_path, 20)  # what is imported and compiled once
    few, many = peak_memory(tmp_path, 60), peak_memory(tmp_path, 260)
    assert (many - few) / 200 < 800
