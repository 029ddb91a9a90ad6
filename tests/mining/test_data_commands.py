"""`drift data inspect` and `drift data convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from drift_jax.records import Message, Pair, SatRecord, pair_to_row, read_pairs, read_sat, sat_to_row
from tests.cli_runs import Drift, drift  # noqa: F401
from tests.mining.utterances import read_file, write_rows

PROMPT = [{"role": "user", "content": "q"}]
REPLY = [{"role": "assistant", "content": "reply"}]
DSAT = {"id": "d", "prompt": PROMPT, "rejected": REPLY, "user_preference": {"role": "user", "content": "No."}}
SAT = {"id": "s", "prompt": PROMPT, "chosen": REPLY, "user_preference": {"role": "user", "content": "Thanks."}}
PAIR = {"prompt": PROMPT, "chosen": REPLY, "rejected": REPLY, "meta": {"id": "p", "split": "train"}}
COMPLETION = {"id": "c", "sample": 0, "text": "t", "token_ids": [1], "finish_reason": "stop", "request": "r"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (DSAT, ["DSAT records, 1 rows", "rejected: 5 to 5 characters", "user turns of a prompt: 1: 1"]),
        (SAT, ["SAT records, 1 rows", "chosen: 5 to 5 characters"]),
        (PAIR, ["pairs, 1 rows", "keys: meta (1)", "split: train (1)"]),
        (COMPLETION, ["completions, 1 rows", "request (1)"]),
        ({"step": 1, "loss": 0.5}, ["rows, 1 rows", "keys: step (1), loss (1)"]),
    ],
)
def test_inspect_says_what_is_in_a_file(drift: Drift, tmp_path: Path, row: dict[str, Any], said: list[str]) -> None:
    code, out, err = drift("data", "inspect", write_rows(tmp_path / "f.jsonl", [row]))
    assert code == 0, err
    assert [words for words in said if words not in out] == []


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (DSAT | {"rejected": []}, "rejected must be a list of one assistant message"),
        (SAT | {"chosen": [{"role": "user", "content": "x"}]}, "chosen[0].role must be assistant"),
        (SAT | {"user_preference": {"role": "user", "content": " "}}, "user_preference.content is empty"),
        (PAIR | {"prompt": []}, "prompt is an empty list"),
        (COMPLETION | {"token_ids": "1"}, "missing or of another type: token_ids"),
        ({"prompt": PROMPT, "chosen": REPLY}, "the first row has the keys prompt, chosen"),
    ],
)
def test_inspect_refuses_what_breaks_the_format(drift: Drift, tmp_path: Path, row: dict[str, Any], why: str) -> None:
    """Each row is looked at; with `skip` the bad ones are listed and counted."""
    good = next((r for r in (DSAT, SAT, PAIR, COMPLETION) if set(row) == set(r)), None)
    path = write_rows(tmp_path / "f.jsonl", [good, row | {"id": "2"}] if good and "meta" not in row else [row])
    code, _, err = drift("data", "inspect", path)
    assert code == 2 and why in " ".join(err.split())
    if good and "meta" not in row:
        code, out, _ = drift("data", "inspect", path, "--on-bad-row", "skip")
        assert code == 0 and "1 rows, 1 left out" in out and why in out


def test_inspect_reads_json_and_configs(drift: Drift, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"counts": {}}')
    assert "JSON, 1 rows" in drift("data", "inspect", tmp_path / "a.json")[1]
    (tmp_path / "a.json").write_text("{")
    assert drift("data", "inspect", tmp_path / "a.json")[0] == 2
    (tmp_path / "a.yaml").write_text("run_dir: r\nmodel: {path: m}\n")
    assert "config of a run" in drift("data", "inspect", tmp_path / "a.yaml")[1]
    (tmp_path / "a.yaml").write_text("run_dir: r\n")
    assert drift("data", "inspect", tmp_path / "a.yaml")[0] == 2
    assert drift("data", "inspect", tmp_path / "none.jsonl")[0] == 2
    (tmp_path / "empty.jsonl").touch()
    assert drift("data", "inspect", tmp_path / "empty.jsonl")[0] == 2


def test_sat_records_come_back_as_they_went(tmp_path: Path) -> None:
    records = [
        SatRecord("named", (Message("user", "é"),), "ok", "thanks", {"meta": {"a": 1}}),
        SatRecord("", (Message("system", "s"), Message("user", "q")), "ok", "thanks"),
    ]
    write_rows(tmp_path / "sat.jsonl", [sat_to_row(record) for record in records[:1]])
    assert read_sat(tmp_path / "sat.jsonl").records == tuple(records[:1])
    unnamed = {key: value for key, value in sat_to_row(records[1]).items() if key != "id"}
    write_rows(tmp_path / "sat.jsonl", [unnamed])
    (record,) = read_sat(tmp_path / "sat.jsonl").records
    assert len(record.id) == 16 and sat_to_row(record) == unnamed


@pytest.fixture()
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "ours"
    folder.mkdir()
    for split, count in (("train", 5), ("test", 2)):
        rows = [
            Pair(f"{split}{i}", (Message("user", f"q{i}"),), "good", "bad", {"id": f"{split}{i}", "token_ids": [i]})
            for i in range(count)
        ]
        write_rows(folder / f"pairs.{split}.jsonl", map(pair_to_row, rows))
    return folder


def test_pairs_go_to_every_form_and_come_back(drift: Drift, pairs: Path, tmp_path: Path) -> None:
    code, out, err = drift("data", "convert", pairs, "--to", "handbook", "--out", tmp_path / "handbook")
    assert code == 0 and "train: 5 pairs, 0 rows left out" in out, err
    loaded = datasets.load_dataset(str(tmp_path / "handbook"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(table) for split, table in loaded.items()} == {"train": 5, "test": 2}
    assert loaded["test"][1]["prompt"] == [{"role": "user", "content": "q1"}]
    assert drift("data", "convert", tmp_path / "handbook", "--to", "disk", "--out", tmp_path / "disk")[0] == 0
    assert datasets.load_from_disk(str(tmp_path / "disk"))["train"][0]["chosen"][0]["content"] == "good"
    assert drift("data", "convert", tmp_path / "disk", "--to", "drift", "--out", tmp_path / "back")[0] == 0
    for split in ("train", "test"):
        name = f"pairs.{split}.jsonl"
        assert read_pairs(tmp_path / "back" / name) == read_pairs(pairs / name)
        assert (tmp_path / "handbook" / f"{split}.jsonl").read_bytes() == b"".join(
            json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in read_file(pairs / name)
        )


def test_seed_pairs_of_mining_and_whole_dialogues_are_read(drift: Drift, tmp_path: Path) -> None:
    (tmp_path / "mined").mkdir()
    write_rows(tmp_path / "mined/seed.train.jsonl", [PAIR])
    write_rows(tmp_path / "mined/seed.test.jsonl", [])
    assert drift("data", "convert", tmp_path / "mined", "--to", "handbook", "--out", tmp_path / "a")[0] == 0
    assert read_file(tmp_path / "a/train.jsonl") == [PAIR] and not (tmp_path / "a/test.jsonl").exists()
    whole = {"prompt": "q", "chosen": [*PROMPT, *REPLY], "rejected": [*PROMPT, {"role": "assistant", "content": "no"}]}
    path = write_rows(tmp_path / "whole.jsonl", [whole])
    assert drift("data", "convert", path, "--to", "drift", "--out", tmp_path / "b")[0] == 0
    (row,) = read_file(tmp_path / "b/pairs.train.jsonl")
    assert (row["prompt"], row["chosen"]) == (PROMPT, REPLY)


def test_convert_refuses_what_it_cannot_use(drift: Drift, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    code, _, err = drift("data", "convert", tmp_path / "none", "--to", "drift", "--out", tmp_path / "out")
    assert code == 2 and "holds no pairs" in err and not (tmp_path / "out").exists()
    code, _, err = drift("data", "convert", pairs, "--to", "drift", "--out", pairs)
    assert code == 2 and "is there already" in err
    code, _, err = drift("data", "convert", pairs, "--to", "disk", "--out", tmp_path / "none")
    assert code == 0, err
    code, _, err = drift("data", "convert", pairs, "--to", "disk", "--out", tmp_path / "none")
    assert code == 2 and "is there already" in err
    with (pairs / "pairs.train.jsonl").open("a") as file:
        file.write('{"chosen": []}\n{cut')
    code, _, err = drift("data", "convert", pairs, "--to", "handbook", "--out", tmp_path / "out")
    assert code == 2 and "(train):6: missing rejected" in err and "(train):7: not JSON" in err
    options = ("--to", "handbook", "--out", tmp_path / "out", "--on-bad-row", "skip")
    code, out, err = drift("data", "convert", pairs, *options)
    assert code == 0 and "train: 5 pairs, 2 rows left out" in out and "row 7: not JSON" in out, err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("split", ["train", "test"])
def test_convert_keeps_its_source(drift: Drift, pairs: Path, tmp_path: Path, split: str) -> None:
    """Given one file of a folder, it would write that folder's training pairs anew and take its test pairs away."""
    folder = tmp_path / "handbook"
    assert drift("data", "convert", pairs, "--to", "handbook", "--out", folder)[0] == 0
    before = contents(folder)
    code, _, err = drift("data", "convert", folder / f"{split}.jsonl", "--to", "handbook", "--out", folder)
    assert code == 2 and "Give another directory" in err and contents(folder) == before
    (tmp_path / "link.jsonl").symlink_to(folder / f"{split}.jsonl")
    code, _, err = drift("data", "convert", tmp_path / "link.jsonl", "--to", "handbook", "--out", folder)
    assert code == 2 and "Give another directory" in err and contents(folder) == before
    code, _, err = drift("data", "convert", folder / f"{split}.jsonl", "--to", "drift", "--out", pairs)
    assert code == 2 and "pairs.train.jsonl is there already and is not replaced" in " ".join(err.split())


@pytest.mark.parametrize("there", ["train", "test"])
def test_convert_replaces_no_pairs(drift: Drift, tmp_path: Path, there: str) -> None:
    """Nor does it leave them as the other split of its own; a file with nothing in it stops nobody."""
    source = write_rows(tmp_path / "pairs.jsonl", [PAIR])
    (tmp_path / "out").mkdir()
    write_rows(tmp_path / f"out/pairs.{there}.jsonl", [PAIR | {"meta": {"id": "other"}}])
    before = contents(tmp_path / "out")
    code, _, err = drift("data", "convert", source, "--to", "drift", "--out", tmp_path / "out")
    said = " ".join(err.split())
    assert code == 2 and f"pairs.{there}.jsonl is there already" in said and "remove the file" in said
    assert contents(tmp_path / "out") == before
    write_rows(tmp_path / f"out/pairs.{there}.jsonl", [])
    assert drift("data", "convert", source, "--to", "drift", "--out", tmp_path / "out")[0] == 0
    assert read_file(tmp_path / "out/pairs.train.jsonl") == [PAIR]
