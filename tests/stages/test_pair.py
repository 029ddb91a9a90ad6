"""From completions to pairs: what is dropped and counted, which one is chosen, and a judge that is a real server."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drift_jax.config import RunConfig, build_config
from drift_jax.data.pairs import tokenize_pair
from drift_jax.data.tokenizer import load_tokenizer
from drift_jax.endpoint import Retry
from drift_jax.errors import ConfigError, DataError, StageError
from drift_jax.records import Pair, read_pairs
from drift_jax.stages import choose
from drift_jax.stages.pair import check_choosing, pair_stage
from tests.http_servers import answering
from tests.tiny import build_tiny_tokenizer
from tests.tiny_pairs import write_dsat

WORDS = ["One good reply", "A second, longer reply", "The third of the replies is the longest of all."]


def config_of(**sections: Any) -> RunConfig:
    raw = {"run_dir": "r", "model": {"path": "m"}, "data": {"test_rows": 1}}
    return build_config(raw | sections)


def row(name: str, sample: int = 0, text: str = WORDS[0], finish: str = "stop", **more: Any) -> dict[str, Any]:
    ids = list(range(len(text.split())))
    return {"id": name, "sample": sample, "text": text, "token_ids": ids, "finish_reason": finish} | more


class Job:
    """A directory with DSAT records d0 .. and completions."""

    def __init__(self, path: Path, records: int, rows: list[dict[str, Any]]) -> None:
        self.out = path / "out"
        self.out.mkdir(exist_ok=True)
        self.dsat = write_dsat(path / "dsat.jsonl", records)
        (self.out / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.text = io.StringIO()
        self.console = Console(file=self.text, width=300)

    def pair(self, config: RunConfig) -> dict[str, Any]:
        return pair_stage(config, "hash", str(self.dsat), self.out, self.console)

    def said(self) -> list[str]:
        return self.text.getvalue().splitlines()

    def chosen(self) -> dict[str, Pair]:
        files = [self.out / f"pairs.{name}.jsonl" for name in ("test", "train")]
        return {pair.id: pair for file in files if file.read_text() for pair in read_pairs(file).records}


# --- drops --------------------------------------------------------------------------------------------------


def test_every_dropped_completion_is_counted_with_its_reason(tmp_path: Path) -> None:
    """Of records with two completions: one dropped is no record lost, both dropped are one."""
    logged = "Number 2 was the best of all numbers."
    rows = [row("d0"), row("d0", 1), row("d1", text=" "), row("d1", 1), row("d2", text=logged), row("d2", 1, text="")]
    rows += [row("d4"), row("d4", 1, text="Good.\nUser: Thanks!")]
    job = Job(tmp_path, 5, rows)
    summary = job.pair(config_of(sampling={"n": 2}))
    expected = {"bad row": 0, "not encodable": 1, "empty": 2, "same as rejected": 1, "speaks for another": 1}
    assert summary["drops"] == expected | {"record left out": 1}
    assert (summary["pairs"], summary["held_out"]) == (2, 1)
    drops = json.loads((job.out / "drops.json").read_text())
    assert drops["counts"] == summary["drops"]
    assert [(r["id"], r["split"], r["sample"], r["reason"]) for r in drops["rows"]] == [
        ("d1", "train", 0, "empty"),
        ("d2", "train", 0, "same as rejected"),
        ("d2", "train", 1, "empty"),
        ("d4", "train", 1, "speaks for another"),
    ]
    assert [(r["id"], r["reason"]) for r in drops["records"]] == [("d2", "no completion left"), ("d3", "not encodable")]
    assert {name: pair.meta["sample"] for name, pair in job.chosen().items()} == {"d0": 0, "d1": 1, "d4": 0}


def test_what_was_cut_twice_is_dropped_and_once_is_drawn_again(tmp_path: Path) -> None:
    """Sample i has its second draw as sample n + i."""
    rows = [
        row("d0"),
        row("d1", finish="length"),
        row("d1", 1),
        row("d2", finish="length"),
        row("d2", 1, finish="length"),
    ]
    job = Job(tmp_path, 3, rows)
    summary = job.pair(config_of(sampling={"on_cut": "resample"}))
    assert summary["drops"] == {
        "bad row": 0,
        "not encodable": 0,
        "cut by length, drawn again": 2,
        "cut by length": 1,
        "record left out": 1,
    }
    assert {name: pair.meta["sample"] for name, pair in job.chosen().items()} == {"d0": 0, "d1": 1}
    for on_cut, pairs in (("drop", 1), ("keep", 2)):
        rows = [row("d0"), row("d1", finish="length"), row("d2")]
        assert Job(tmp_path, 3, rows).pair(config_of(sampling={"on_cut": on_cut}))["pairs"] == pairs


def test_no_held_out_pair_is_said_once(tmp_path: Path) -> None:
    """Because none was to be, or because no held-out record made one: an empty file either way."""
    job = Job(tmp_path, 2, [row("d0", text=""), row("d1")])
    summary = job.pair(config_of())
    assert (summary["pairs"], summary["held_out"]) == (1, 0)
    (line,) = job.said()
    assert line.startswith("warning: none of the 1 held-out records has made a pair") and "drops.json says why" in line
    assert (job.out / "pairs.test.jsonl").read_bytes() == b""
    job = Job(tmp_path, 2, [row("d0"), row("d1")])
    assert job.pair(config_of(data={"test_rows": 0}))["held_out"] == 0
    assert job.said() == ["data.test_rows is 0: no pair is held out, and training evaluates nothing"]
    job = Job(tmp_path, 2, [row("d0"), row("d1")])
    assert job.pair(config_of())["held_out"] == 1 and job.said() == []


def test_a_bad_record_is_counted_once(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, [row("d0"), row("d1"), row("d2")])
    lines = job.dsat.read_text().splitlines()
    twice = json.dumps({"prompt": 1, "rejected": 2, "user_preference": 3})
    job.dsat.write_text("\n".join([*lines, twice, "[]"]) + "\n")
    summary = job.pair(config_of(data={"test_rows": 1, "on_bad_row": "skip"}))
    assert summary["drops"]["bad row"] == 2 and summary["pairs"] == 2


def test_nothing_left_says_what_was_dropped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pair is left to train on: 1 empty, 1 record left out\..*drops\.json"):
        Job(tmp_path, 2, [row("d0"), row("d1", text="")]).pair(config_of())


def test_a_kept_cut_completion_gets_no_end_in_training(tmp_path: Path) -> None:
    """Through the files, as a run does it: ids as sampled, and an end only where the policy wrote one."""
    tokenizer = load_tokenizer_of(tmp_path)
    ids, end = tokenizer.encode_text("the answer is"), tokenizer.turn_end_id
    rows = [row("d0"), row("d1", finish="length") | {"token_ids": ids}, row("d2") | {"token_ids": [*ids, end]}]
    job = Job(tmp_path, 3, rows)
    job.pair(config_of(sampling={"on_cut": "keep"}))
    made = job.chosen()
    assert tokenize_pair(made["d1"], tokenizer, 64, 128).chosen_ids.tolist() == ids
    assert tokenize_pair(made["d2"], tokenizer, 64, 128).chosen_ids.tolist() == [*ids, end]


def load_tokenizer_of(tmp_path: Path) -> Any:
    build_tiny_tokenizer(tmp_path / "model")
    return load_tokenizer(tmp_path / "model")


# --- choosers -----------------------------------------------------------------------------------------------

THREE = [row("d0"), *(row("d1", i, text, mean_logp=[-2.0, -0.5, -1.0][i]) for i, text in enumerate(WORDS))]


@pytest.mark.parametrize(
    ("sampling", "sample", "evidence"),
    [
        ({}, 0, {}),
        ({"chooser": "longest_within", "longest_within": 5}, 1, {"tokens": [3, 4, 10]}),
        ({"chooser": "longest_within", "longest_within": 10}, 2, {"tokens": [3, 4, 10]}),
        ({"chooser": "longest_within", "longest_within": 1}, 0, {"tokens": [3, 4, 10]}),
        ({"chooser": "logprob"}, 1, {"mean_logp": [-2.0, -0.5, -1.0]}),
    ],
)
def test_a_chooser_says_which_and_why(
    tmp_path: Path, sampling: dict[str, Any], sample: int, evidence: dict[str, Any]
) -> None:
    rows = [{"mean_logp": -1.0} | row for row in THREE]
    job = Job(tmp_path, 2, rows)
    job.pair(config_of(sampling={"n": 3} | sampling))
    pair = job.chosen()["d1"]
    assert (pair.meta["sample"], pair.chosen) == (sample, WORDS[sample])
    name = sampling.get("chooser", "first")
    assert pair.meta["chooser"] == {"name": name, "candidates": [0, 1, 2]} | evidence


def test_the_table_has_every_name_of_the_config() -> None:
    for name in choose.CHOOSERS:
        judge = {"base_url": "http://127.0.0.1:1/v1", "model": "j"}
        assert config_of(sampling={"chooser": name, "n": 2}, judge=judge).sampling.chooser == name
    with pytest.raises(ConfigError, match=", ".join(f"'{name}'" for name in list(choose.CHOOSERS)[:-1])):
        config_of(sampling={"chooser": "none"})


# --- the judge ----------------------------------------------------------------------------------------------

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class JudgeServer(ThreadingHTTPServer):
    """Answers chat completions with what `answer` makes of the request."""

    answer: Answer
    seen: list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        status, said = self.server.answer(body)
        text = json.dumps({"choices": [{"message": {"content": said}}]} if status == 200 else {"error": said}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture()
def server() -> Iterator[JudgeServer]:
    server = JudgeServer(("127.0.0.1", 0), Handler)
    server.seen = []
    server.answer = lambda body: (200, json.dumps({"reason": "It is the third.", "best": best_of(body)}))
    with answering(server):
        yield server


def best_of(body: dict[str, Any], text: str = WORDS[2]) -> int:
    """The number under which a reply is shown."""
    prompt = body["messages"][0]["content"]
    return int(prompt[: prompt.index(text)].rpartition("<reply_")[2].split(">")[0])


def judged(server: JudgeServer, **judge: Any) -> RunConfig:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return config_of(sampling={"n": 3, "chooser": "judge"}, judge={"base_url": url, "model": "j"} | judge)


def many(tmp_path: Path, count: int = 12) -> Job:
    return Job(tmp_path, count, [row(f"d{i}", k, text) for i in range(count) for k, text in enumerate(WORDS)])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = choose.Judge
    monkeypatch.setattr(choose, "Judge", lambda config: judge(config, Retry(attempts=2), sleep=lambda _: None))


def test_the_judge_finds_the_best_in_whatever_place_it_is_shown(tmp_path: Path, server: JudgeServer) -> None:
    job = many(tmp_path)
    job.pair(judged(server))
    pairs = job.chosen()
    assert len(pairs) == 12 and {pair.chosen for pair in pairs.values()} == {WORDS[2]}
    orders = {name: pair.meta["chooser"]["order"] for name, pair in pairs.items()}
    assert len({tuple(order) for order in orders.values()}) > 2 and len({best_of(body) for body in server.seen}) == 3
    evidence = pairs["d3"].meta["chooser"]
    assert (evidence["name"], evidence["model"], evidence["prompt"]) == ("judge", "j", "choose_v1")
    assert evidence["reason"] == "It is the third." and len(evidence["prompt_hash"]) == 16
    body = server.seen[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("j", 0.0, 512)
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["best"]["enum"] == [1, 2, 3]
    assert "That is too short, say more." in body["messages"][0]["content"]


def test_no_verdict_is_asked_for_twice(tmp_path: Path, server: JudgeServer) -> None:
    """Stopped after some verdicts, one of them torn; then asked about the rest, and the pairs are the same."""
    job = many(tmp_path)
    job.pair(judged(server))
    files = {name: (job.out / name).read_bytes() for name in ("pairs.train.jsonl", "pairs.test.jsonl")}
    verdicts = (job.out / "verdicts.jsonl").read_bytes().splitlines(keepends=True)
    (job.out / "verdicts.jsonl").write_bytes(b"".join(verdicts[:5]) + verdicts[5][:40])
    server.seen.clear()
    job.pair(judged(server, concurrency=2, timeout_s=5.0))
    assert len(server.seen) == 7
    job.pair(judged(server))
    assert len(server.seen) == 7
    assert {name: (job.out / name).read_bytes() for name in files} == files
    job.pair(judged(server, model="another"))
    assert len(server.seen) == 7 + 12


def test_one_usable_completion_needs_no_judge(tmp_path: Path, server: JudgeServer) -> None:
    job = Job(tmp_path, 2, [row("d0"), row("d1"), row("d1", 1, text="")])
    job.pair(judged(server))
    assert not server.seen and job.chosen()["d1"].meta["chooser"]["only"] is True


@pytest.mark.parametrize(
    "said",
    [
        'I think {so}.\n```json\n{"reason": "x", "best": %d}\n```',
        '{"best": %d}',
        '<think>{"best": 0}</think>{"best": %d}',
    ],
)
def test_an_object_is_found_in_what_is_said_around_it(tmp_path: Path, server: JudgeServer, said: str) -> None:
    server.answer = lambda body: (200, said % best_of(body))
    job = many(tmp_path, 3)
    assert job.pair(judged(server))["judge_failures"] == 0
    assert {pair.chosen for pair in job.chosen().values()} == {WORDS[2]}


def test_a_server_without_schemas_is_asked_without(tmp_path: Path, server: JudgeServer) -> None:
    right = server.answer
    server.answer = lambda body: (400, "response_format?") if "response_format" in body else right(body)
    job = many(tmp_path, 3)
    assert job.pair(judged(server, concurrency=1))["judge_failures"] == 0
    assert ["response_format" in body for body in server.seen] == [True, False, False, False]


@pytest.mark.parametrize(
    "wrong", ['{"best": 4}', '{"best": "2"}', "The second.", None, '{"best": 0}', "[1]", '{"best": true}']
)
def test_where_the_judge_fails_the_first_is_taken_and_counted(
    tmp_path: Path, server: JudgeServer, wrong: str | None
) -> None:
    right = server.answer
    server.answer = lambda body: (200, wrong) if "number 2." in body["messages"][0]["content"] else right(body)
    job = many(tmp_path, 4)
    assert job.pair(judged(server))["judge_failures"] == 1
    pairs = job.chosen()
    assert [pairs[f"d{i}"].meta["sample"] for i in range(4)] == [2, 2, 0, 2]
    assert "3 answers" in pairs["d2"].meta["chooser"]["failed"]
    assert isinstance(job.console.file, io.StringIO)
    assert "the judge failed on 1 of 4 records; their first completion was taken" in job.console.file.getvalue()


def test_a_judge_that_always_fails_stops_the_stage(tmp_path: Path, server: JudgeServer) -> None:
    server.answer = lambda body: (500, "out of order")
    job = many(tmp_path, 40)
    with pytest.raises(StageError, match=r"judge j failed on all 16 records .*500.*out of order.*run again"):
        job.pair(judged(server, concurrency=1))
    assert not (job.out / "pairs.train.jsonl").exists() and len(server.seen) < 2 * 2 * 20


@pytest.mark.parametrize("answered", [1, 0], ids=["it dies", "it is dead when the run goes on"])
def test_a_judge_that_dies_stops_the_stage_and_a_rerun_goes_on(
    tmp_path: Path, server: JudgeServer, answered: int
) -> None:
    """It never turns into a choice of first completions."""
    right, job = server.answer, many(tmp_path, 40)
    if not answered:
        job.pair(judged(server))
        verdicts = job.out / "verdicts.jsonl"
        verdicts.write_bytes(verdicts.read_bytes().splitlines(keepends=True)[0])
        (job.out / "pairs.train.jsonl").unlink()
        server.seen.clear()
    server.answer = lambda body: right(body) if len(server.seen) <= answered else (401, "expired")
    with pytest.raises(
        StageError, match=r"judge j gave no answer to 16 questions in a row: .*expired.*verdicts\.jsonl"
    ):
        job.pair(judged(server, concurrency=1))
    assert not (job.out / "pairs.train.jsonl").exists() and len(server.seen) <= answered + 17
    server.answer = right
    server.seen.clear()
    assert job.pair(judged(server))["judge_failures"] == 0 and len(server.seen) == 39
    assert {pair.chosen for pair in job.chosen().values()} == {WORDS[2]}


def test_a_judge_that_answers_nonsense_after_a_verdict_is_still_there(tmp_path: Path, server: JudgeServer) -> None:
    right = server.answer
    server.answer = lambda body: right(body) if len(server.seen) == 1 else (200, "The second.")
    assert many(tmp_path, 20).pair(judged(server, concurrency=1))["judge_failures"] == 19


def test_a_reason_that_no_file_can_hold_is_mended(tmp_path: Path, server: JudgeServer) -> None:
    server.answer = lambda body: (200, json.dumps({"reason": "good \ud83d", "best": best_of(body)}))
    job = many(tmp_path, 3)
    assert job.pair(judged(server))["judge_failures"] == 0
    assert {pair.meta["chooser"]["reason"] for pair in job.chosen().values()} == {"good ?"}


def test_a_key_that_is_not_set_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch, server: JudgeServer) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="JUDGE_KEY"):
        check_choosing(judged(server, api_key_env="JUDGE_KEY"))
    check_choosing(judged(server))
    check_choosing(config_of(judge={"api_key_env": "JUDGE_KEY"}))
