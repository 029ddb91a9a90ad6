"""Files of every kind: the same rows come out, numbered, and what is broken is refused and not guessed at."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from drift_jax.data.mining import sources, text_rows
from drift_jax.data.mining.sources import BadRow, BadRows, SourceReader, find_sources
from drift_jax.errors import BadRowsError, DataError

ROWS = [{"Content": f"é\n{i} \u2028 😀", "UtteranceId": i} for i in range(5)]
ARRAY = json.dumps(ROWS, indent=1).encode()
LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)


def read(path: Path, columns: tuple[str, ...] = ("Content", "UtteranceId")) -> list[tuple[int, Any]]:
    return [
        numbered for source in find_sources([str(path)]) for numbered in SourceReader(source, columns, lambda _: None)
    ]


def good(found: list[tuple[int, Any]]) -> list[Any]:
    return [row for _, row in found if not isinstance(row, BadRow)]


def bad(found: list[tuple[int, Any]]) -> list[tuple[int, str]]:
    return [(number, row.why) for number, row in found if isinstance(row, BadRow)]


def write_all(directory: Path) -> None:
    (directory / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES)
    (directory / "b.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0))
    (directory / "c.json").write_bytes(ARRAY)
    (directory / "d.json").write_bytes(LINES)
    (directory / "e.json.gz").write_bytes(gzip.compress(ARRAY, mtime=0))
    with (directory / "f.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["Content", "UtteranceId"])
        writer.writeheader()
        writer.writerows(ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(str(directory / "g.parquet"))
    datasets.Dataset.from_list(ROWS).save_to_disk(str(directory / "disk"))


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    write_all(tmp_path)
    for path in [*sorted(tmp_path.glob("*.*")), tmp_path / "disk"]:
        rows = [(number, row | {"UtteranceId": int(row["UtteranceId"])}) for number, row in read(path)]
        assert rows == list(enumerate(ROWS, start=1)), path.name


def test_a_directory_is_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/a.jsonl", ".hidden.jsonl", "notes.txt"):
        (tmp_path / name).write_bytes(LINES)
    found = find_sources([str(tmp_path), str(tmp_path / "a.jsonl")])
    assert [(s.name, s.group) for s in found] == [
        ("1/a.jsonl", 0), ("b.jsonl", 0), ("sub/a.jsonl", 0), ("2/a.jsonl", 1),
    ]  # fmt: skip
    (tmp_path / "none").mkdir()
    for name, message in (("none", "holds no file to read"), ("notes.txt", "files of these kinds"), ("x", "not exist")):
        with pytest.raises(DataError, match=message):
            find_sources([str(tmp_path / name)])


def test_bytes_are_counted_and_hashed(tmp_path: Path) -> None:
    import hashlib

    write_all(tmp_path)
    for path in tmp_path.glob("*.*"):
        counted: list[int] = []
        (source,) = find_sources([str(path)])
        reader = SourceReader(source, ("Content",), counted.append)
        list(reader)
        assert (sum(counted), reader.rows) == (path.stat().st_size, 5), path.name
        assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "data", "rows", "number", "why"),
    [
        ("a.jsonl", LINES[:-20], 4, 5, "the file ends within this row: it was cut off"),
        ("a.jsonl", LINES + b'{"Content": "x"', 5, 6, "the file ends within this row"),
        ("a.jsonl", b'{"a": NaN}\n' + LINES, 5, 1, "not JSON"),
        ("a.jsonl", b'{"a": "\\ud800"}\n' + LINES, 5, 1, "not JSON"),
        ("a.jsonl", b'{"a": "\xff"}\n' + LINES, 5, 1, "not JSON"),
        ("a.jsonl", LINES + b"{} {}\n", 5, 6, "not JSON"),
        ("a.jsonl", LINES + b'"text"\n', 5, 6, "a row must be a JSON object, found a string"),
        ("a.json", ARRAY[:-30], 4, 5, "the file ends within this row"),
        ("a.json", ARRAY[:-1], 5, 5, "the file ends within this row"),
        ("a.json", ARRAY + b" x", 5, 6, "'x' after the end of the array"),
        ("a.json", b'[{"a": NaN}]', 0, 1, "not JSON"),
        ("a.json", b'[{"a": "\\ud800"}]', 0, 1, "not JSON"),
        ("a.json", b'[{"a": 1} {"a": 2}]', 1, 1, "',' expected, found '{'"),
        ("a.json", b'[{"a": 1}, ]', 1, 2, "not JSON"),
        ("a.json", b'[{"a": "\xff"}]', 0, 1, "not JSON"),
        ("a.json", b"[1, 2]", 0, 1, "a row must be a JSON object, found a number"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], 4, 5, "cannot be unpacked"),
        ("a.json.gz", gzip.compress(ARRAY, mtime=0)[:-12], 4, 5, "cannot be unpacked"),
        ("a.csv", b"a,b\n1,2\n3\n", 1, 2, "1 cells where the header has 2"),
        ("a.csv", b'a,b\n1,2\n3,"x', 1, 2, "it was cut off"),
        ("a.csv", b"a,b\n1,2\n3,\xff\n", 0, 1, "not CSV"),
    ],
)
def test_what_is_broken_is_refused_in_its_place(
    tmp_path: Path, name: str, data: bytes, rows: int, number: int, why: str
) -> None:
    """All rows before it are kept; where rows can be told apart, those behind it too."""
    (tmp_path / name).write_bytes(data)
    found = read(tmp_path / name)
    assert len(good(found)) == rows
    assert bad(found)[0][0] == number and why in bad(found)[0][1], bad(found)


def test_elements_of_an_array_may_lie_across_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": 12345, "b": "x" * size, "c": [{"d": "]}"}]} for size in range(40)] + [{}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for size in (1, 7, 64):
        monkeypatch.setattr(text_rows, "BUFFER", size)
        assert good(read(tmp_path / "a.json")) == rows


def test_a_row_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "LONGEST_ROW", 1000)
    monkeypatch.setattr(text_rows, "BUFFER", 100)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "' + b"x" * 5000 + b'"}\n' + b'{"a": 1}\n')
    found = read(tmp_path / "a.jsonl")
    assert good(found) == [{"a": 1}] and "longer than" in bad(found)[0][1]
    (tmp_path / "a.json").write_bytes(b'[{"a": "' + b"x" * 5000 + b'"}]')
    assert "longer than" in bad(read(tmp_path / "a.json"))[0][1]


def test_columns_that_are_not_asked_for_are_not_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"Content": "a", "hashed_ip": "1.2.3.4"}]).to_parquet(str(tmp_path / "a.parquet"))
    assert good(read(tmp_path / "a.parquet")) == [{"Content": "a"}]


def test_no_data_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataError, match="git lfs pull"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not a Parquet file"):
        read(tmp_path / "a.parquet")


def test_a_dataset_of_the_hub_is_streamed(tmp_path: Path) -> None:
    """`datasets` reads a directory by the same call as an id of the hub."""
    (tmp_path / "train.jsonl").write_bytes(LINES)
    source = sources.Source("me/data", str(tmp_path), "hub")
    counted: list[int] = []
    assert good(list(SourceReader(source, (), counted.append))) == ROWS and sum(counted) == 5
    gone = sources.Source("me/data", str(tmp_path), "hub", split="validation")
    with pytest.raises(DataError, match="split validation"):
        list(SourceReader(gone, (), counted.append))
    (found,) = find_sources(["microsoft/WildFeedback"], "sat_dsat_annotation", "train", "main")
    assert (found.kind, found.subset, found.revision, found.bytes) == ("hub", "sat_dsat_annotation", "main", None)


def test_bad_rows_are_listed_together_or_counted() -> None:
    rows = BadRows("stop")
    rows.add("f", 3, "why")
    rows.add("f", 7, "other")
    with pytest.raises(BadRowsError, match=r"2 of 9 rows in f cannot be used:\n  f:3: why\n  f:7: other"):
        rows.settle("f", 9)
    rows = BadRows("skip")
    for row in range(200):
        rows.add("f", row, "why")
    rows.settle("f", 200)
    assert (rows.count, len(rows.shown)) == (200, 100)
    another = BadRows("stop")
    with pytest.raises(BadRowsError):  # another file altogether: its end is not waited for
        for row in range(100):
            another.add("f", row, "why")
    assert another.count == BadRowsError.SHOWN + 1


def test_rows_of_another_format_are_asked_about() -> None:
    """Reading stops at the 21st: of how many rows they are is not known, and the file has the name that was given."""
    rows = BadRows("stop", "messages", {"f": "logs/f"})
    with pytest.raises(BadRowsError) as error:
        for row in range(1, 65):
            rows.add("f", row, f"messages must be a list of turns{text_rows.name_keys({'prompt': 1})}")
    said = str(error.value)
    assert "21 of the first 21 rows in logs/f cannot be used" in said and "logs/f:1: messages must be" in said
    assert "No row has the fields of --format messages: is that the right one?" in said
    rows = BadRows("stop", "messages", {"f": "logs/f"})
    with pytest.raises(BadRowsError) as error:
        for row in range(1, 65):
            rows.add("f", row, "messages[0].content must be text, found 7")
    assert "--format" not in str(error.value)
