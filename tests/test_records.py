"""Records and JSONL files: what is read back, what is refused and in which words, that files are whole."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_jax import files, records, row_problems
from drift_jax.errors import BadRowsError, DataError, StageError
from drift_jax.files import atomic_writer, write_json, write_jsonl
from drift_jax.records import DsatRecord, Message, Pair, dsat_to_row, pair_to_row, read_dsat, read_pairs
from tests.full_disk import full_disk  # noqa: F401

REPO = Path(__file__).parents[1]
REAL = REPO / "../shared/data/dsat_real.jsonl"
SAMPLE = REPO / "data/sample/dsat.jsonl"


def dsat_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": "a",
        "prompt": [{"role": "user", "content": "Sort this list."}],
        "rejected": [{"role": "assistant", "content": "No."}],
        "user_preference": {"role": "user", "content": "That is no help."},
        "license": "CC0-1.0",
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


def pair_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": "Sort this list."}],
        "chosen": [{"role": "assistant", "content": "Here it is, sorted."}],
        "rejected": [{"role": "assistant", "content": "No."}],
        "meta": {"id": "a"},
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


def write_lines(path: Path, *lines: Any) -> Path:
    """One line per argument: bytes as they are, anything else as JSON."""
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


# ------------------------------------------------------------------------------------- what is read


def test_dsat_row_becomes_record(tmp_path: Path) -> None:
    row = dsat_row(
        prompt=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Three?"},
        ]
    )
    (record,) = read_dsat(write_lines(tmp_path / "d.jsonl", row)).records
    assert record == DsatRecord(
        id="a",
        prompt=(
            Message("system", "Be brief."),
            Message("user", "One?"),
            Message("assistant", "Two."),
            Message("user", "Three?"),
        ),
        rejected="No.",
        user_preference="That is no help.",
        extra={"license": "CC0-1.0"},
    )


@pytest.mark.parametrize("path", [REAL, SAMPLE], ids=["shared", "sample"])
def test_real_conversations_load_and_come_back_unchanged(path: Path, tmp_path: Path) -> None:
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = read_dsat(path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows.skipped == ()
    assert len(rows.records) == len(lines) > 0
    if path == REAL:
        assert len(rows.records) == 198
    assert [dsat_to_row(record) for record in rows.records] == lines
    assert all(record.extra["license"] for record in rows.records)


def test_file_from_trl_comes_back_unchanged(tmp_path: Path) -> None:
    """No `meta`, no id, columns of its own: nothing is added, nothing is lost."""
    rows = [
        pair_row(meta=..., score_chosen=8.5, source="x"),
        pair_row(meta=..., id=7, chosen=[{"role": "assistant", "content": "b"}]),
        pair_row(meta={"sampler": "local"}, chosen=[{"role": "assistant", "content": "c"}]),
    ]
    pairs = read_pairs(write_lines(tmp_path / "p.jsonl", *rows)).records
    assert [pair_to_row(pair) for pair in pairs] == rows
    assert pairs[0].extra == {"score_chosen": 8.5, "source": "x"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"meta": {"id": "m"}, "id": "top"}, "m"),
        ({"meta": {}, "id": "top"}, "top"),
        ({"meta": ..., "id": 12}, "12"),
        # A golden value: rows without an id must be known by the same name in every version and process.
        ({"meta": ...}, "4d0f9b2a9f3d1647"),
    ],
)
def test_pair_id(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (pair,) = read_pairs(write_lines(tmp_path / "p.jsonl", pair_row(**changes))).records
    assert pair.id == expected


def test_dsat_id_without_one_is_a_hash_of_the_content(tmp_path: Path) -> None:
    (record,) = read_dsat(write_lines(tmp_path / "d.jsonl", dsat_row(id=...))).records
    assert record.id == "0ee116f75ec22b73"
    assert "id" not in dsat_to_row(record)
    (other,) = read_dsat(write_lines(tmp_path / "d.jsonl", dsat_row(id=..., license="MIT"))).records
    assert other.id == record.id  # columns that are not the dialogue do not count


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    """U+2028 ends a line for `str.splitlines`, not in JSONL; a BOM, CRLF and blank lines are no rows."""
    content = "one\u2028two\u0085three\x0bfour"
    line = json.dumps(dsat_row(rejected=[{"role": "assistant", "content": content}]), ensure_ascii=False)
    path = write_lines(
        tmp_path / "d.jsonl", b"\xef\xbb\xbf" + line.encode() + b"\r\n", b"\n", b"  \r\n", dsat_row(id="b")
    )
    rows = read_dsat(path)
    assert [record.rejected for record in rows.records] == [content, "No."]


text = st.text(min_size=1, max_size=30).filter(lambda s: s.strip())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Message, ...]:
    turns = draw(st.integers(0, 2)) * 2 + 1
    system = [Message("system", draw(text))] if draw(st.booleans()) else []
    return (*system, *(Message(("user", "assistant")[i % 2], draw(text)) for i in range(turns)))


def extras(*taken: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.text().filter(lambda key: key not in taken), json_values, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_records_survive_the_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("records") / "rows.jsonl"
    # Drawn in parts and put together here: the type checks of a record's fields take random samples, which
    # Hypothesis wants to know nothing of.
    parts = data.draw(st.tuples(text, prompts(), text, text))
    dsat = DsatRecord(*parts, data.draw(extras("id", "prompt", "rejected", "user_preference")))
    write_jsonl(path, [dsat_to_row(dsat)])
    assert read_dsat(path).records == (dsat,)

    meta, extra = data.draw(st.tuples(extras("id"), extras("id", "meta", "prompt", "chosen", "rejected")))
    pair = Pair(*parts, meta, extra)
    write_jsonl(path, [pair_to_row(pair)])
    (again,) = read_pairs(path).records
    assert again == Pair(pair.id, pair.prompt, pair.chosen, pair.rejected, again.meta, pair.extra)
    assert {**again.meta, "id": pair.id} == {**pair.meta, "id": pair.id}
    assert pair_to_row(again) == pair_to_row(pair)


# ---------------------------------------------------------------------------------- what is refused

USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}

BAD_LINES: list[tuple[Any, str]] = [
    (b"{broken\n", "not JSON: Expecting property name"),
    (b"\n{}{}\n", "not JSON: Extra data at column 3"),
    (b'"text"\n', "a row must be a JSON object, found a string"),
    (b"[1]\n", "a row must be a JSON object, found a list"),
    (b'{"prompt": "\xff"}\n', "not UTF-8: byte 0xff at column 13"),
    (b'{"x": NaN}\n', "not JSON: NaN is not a JSON number"),
    (b"[" * 100_000 + b"\n", "not JSON: nested too deeply"),
    ({"x": 1}, "missing prompt, rejected, user_preference; a row needs .*, found x"),
    (dsat_row(user_preference=...), "missing user_preference; a row needs"),
    (dsat_row(prompt="Hi"), "prompt must be a list of messages, found a string"),
    (dsat_row(prompt=[]), "prompt is an empty list"),
    (dsat_row(prompt=["Hi"]), r"prompt\[0\] must be an object with role and content, found a string"),
    (dsat_row(prompt=[ASSISTANT, USER]), "prompt roles must be .*; found assistant, user"),
    (dsat_row(prompt=[USER, ASSISTANT]), "prompt roles must be .*; found user, assistant"),
    (dsat_row(prompt=[USER, USER]), "prompt roles must be .*; found user, user"),
    (dsat_row(prompt=[USER, SYSTEM, USER]), "prompt roles must be .*; found user, system, user"),
    (dsat_row(prompt=[SYSTEM]), "prompt roles must be .*; found system"),
    (dsat_row(prompt=[{"role": "human", "content": "u"}]), r"prompt\[0\].role must be .*, found 'human'"),
    (dsat_row(prompt=[{"role": ["user"], "content": "u"}]), r"prompt\[0\].role must be .*, found \['user'\]"),
    (dsat_row(prompt=[{"content": "u"}]), r"prompt\[0\].role must be .*, found None"),
    (dsat_row(prompt=[{"role": "user"}]), r"prompt\[0\].content must be a string, found null"),
    (dsat_row(prompt=[{**USER, "content": 5}]), r"prompt\[0\].content must be a string, found a number"),
    (
        dsat_row(prompt=[{**USER, "name": "x"}]),
        r"prompt\[0\] may hold role and content only, found also name",
    ),
    (dsat_row(prompt=[{**USER, "content": " \n"}]), r"prompt\[0\].content is empty"),
    (dsat_row(rejected="No."), "rejected must be a list of one assistant message, found a string"),
    (dsat_row(rejected=[]), "rejected must be a list of one assistant message, found a list of 0"),
    (dsat_row(rejected=[USER]), r"rejected\[0\].role must be assistant, found 'user'"),
    (dsat_row(rejected=[{**ASSISTANT, "content": ""}]), r"rejected\[0\].content is empty"),
    (dsat_row(user_preference=[USER]), "user_preference must be an object with .*, found a list"),
    (dsat_row(user_preference=ASSISTANT), "user_preference.role must be user, found 'assistant'"),
    (dsat_row(user_preference={**USER, "content": "\t"}), "user_preference.content is empty"),
    (dsat_row(id=""), "id must be a string that is not empty, found ''"),
    (dsat_row(id=None), "id must be a string that is not empty, found None"),
    (dsat_row(id="x", rejected=[{**ASSISTANT, "content": "\ud83d"}]), "'rejected' holds U.D83D, half of a"),
    (dsat_row(id="x", license="\udc00"), "'license' holds U.DC00"),
    (dsat_row(id="first"), "id 'first' is already the id of line 1"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES, ids=[why[:40] for _, why in BAD_LINES])
def test_bad_dsat_rows_are_named(line: Any, why: str, tmp_path: Path) -> None:
    number = 3 if isinstance(line, bytes) and line.startswith(b"\n") else 2
    path = write_lines(tmp_path / "d.jsonl", dsat_row(id="first"), line, dsat_row(id="last"))
    with pytest.raises(BadRowsError, match=f"1 of 3 rows in {re.escape(str(path))}") as caught:
        read_dsat(path)
    assert re.search(f"{re.escape(str(path))}:{number}: {why}", str(caught.value))

    rows = read_dsat(path, on_bad_row="skip")
    assert [record.id for record in rows.records] == ["first", "last"]
    assert {at for at, _ in rows.skipped} == {number} and rows.left_out == 1
    assert re.match(why, rows.skipped[0][1])


def test_a_row_that_breaks_the_format_twice_is_left_out_once(tmp_path: Path) -> None:
    twice = dsat_row(id="twice", rejected=3, user_preference=4)
    rows = read_dsat(write_lines(tmp_path / "d.jsonl", dsat_row(id="first"), twice, "{"), on_bad_row="skip")
    assert [at for at, _ in rows.skipped] == [2, 2, 3] and rows.left_out == 2


@pytest.mark.parametrize(("text", "rows"), [("", 0), ("\n \n", 0), ("{}\n\n[\n", 2), ("{}", 1)])
def test_rows_are_counted_whatever_they_hold(text: str, rows: int, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(text)
    assert records.count_rows(tmp_path / "d.jsonl") == rows


@pytest.mark.parametrize("kind", ["dsat", "pair"])
def test_a_row_that_is_no_dialogue_is_refused_by_its_length(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All messages together count, as all are tokenised together."""
    monkeypatch.setattr(row_problems, "LONGEST_DIALOGUE", 300)
    turns = [{"role": role, "content": "x" * 60} for role in ("user", "assistant", "user")]
    make, read = {"dsat": (dsat_row, read_dsat), "pair": (pair_row, read_pairs)}[kind]
    last = {"dsat": "rejected", "pair": "chosen"}[kind]
    longer = [turns[0], turns[1], {"role": "user", "content": "x" * 200}]
    path = write_lines(tmp_path / "d.jsonl", make(prompt=turns), make(prompt=longer))
    with pytest.raises(BadRowsError, match=r":2: the messages have 3\d\d characters, at most 300 are read"):
        read(path)
    write_lines(path, make(prompt=turns, **{last: [{"role": "assistant", "content": "x" * 290}]}))
    with pytest.raises(BadRowsError, match=r":1: the messages have 4\d\d characters"):
        read(path)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (pair_row(chosen=...), "missing chosen; a row needs prompt, chosen, rejected"),
        (pair_row(chosen=[]), "chosen must be a list of one assistant message, found a list of 0"),
        (pair_row(chosen=[USER, ASSISTANT]), "chosen must be a list of one .*, found a list of 2"),
        (pair_row(chosen="text"), "chosen must be a list of one assistant message, found a string"),
        (pair_row(chosen=[{**ASSISTANT, "content": "  "}]), r"chosen\[0\].content is empty"),
        (pair_row(rejected=[USER]), r"rejected\[0\].role must be assistant"),
        (pair_row(prompt=...), "missing prompt"),
        (pair_row(meta=[]), "meta must be an object, found a list"),
        (pair_row(meta={"id": ""}), "meta.id must be a string that is not empty"),
        (pair_row(meta={}, id=True), "id must be a string that is not empty, found True"),
        (pair_row(meta={"id": "first"}), "id 'first' is already the id of line 1"),
        (pair_row(meta={}, id="first"), "id 'first' is already the id of line 1"),
    ],
)
def test_bad_pair_rows_are_named(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", pair_row(meta={"id": "first"}), row)
    with pytest.raises(BadRowsError) as caught:
        read_pairs(path)
    assert re.search(f"{re.escape(str(path))}:2: {why}", str(caught.value))
    assert len(read_pairs(path, on_bad_row="skip").records) == 1


def test_chosen_equal_to_rejected_is_a_matter_of_filters(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", pair_row(rejected=pair_row()["chosen"]))
    assert len(read_pairs(path).records) == 1


def test_bad_rows_are_reported_together(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "d.jsonl",
        dsat_row(),
        dsat_row(prompt=[], rejected=[]),
        b"nope\n",
        dsat_row(),
    )
    with pytest.raises(BadRowsError) as caught:
        read_dsat(path)
    assert [line for line, _ in caught.value.problems] == [2, 2, 3, 4]
    message = str(caught.value)
    assert "3 of 4 rows" in message and "--on-bad-row skip" in message
    assert all(f"{path}:{line}:" in message for line in (2, 3, 4))


def test_rows_without_id_and_equal_content_are_duplicates(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", dsat_row(id=...), dsat_row(id="b"), dsat_row(id=..., license="MIT"))
    with pytest.raises(BadRowsError, match=":3: id '[0-9a-f]{16}' is already the id of line 1"):
        read_dsat(path)


def test_skip_does_not_go_on_with_nothing(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", b"nope\n")
    with pytest.raises(BadRowsError, match="1 of 1 rows"):
        read_dsat(path, on_bad_row="skip")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "git-LFS pointer.*git lfs pull",
        ),
        (b'[\n{"prompt": []}\n]\n', "holds a JSON array: one object a line is needed.*jq -c"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
    ],
)
def test_files_that_are_no_jsonl(content: bytes, why: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", content)
    for read in (read_dsat, read_pairs):
        with pytest.raises(DataError, match=why) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))}/none.jsonl does not exist"):
        read_dsat(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))} is a directory"):
        read_dsat(tmp_path)
    looped = tmp_path / "loop.jsonl"
    looped.symlink_to(looped)
    with pytest.raises(DataError, match="cannot read .*loop.jsonl"):
        read_pairs(looped)


# -------------------------------------------------------------------------------------- writing


def test_files_are_utf8_with_one_object_a_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"b": "größer\u2028"}, {"a": 1}])
    assert (tmp_path / "x.jsonl").read_bytes() == '{"b": "größer\u2028"}\n{"a": 1}\n'.encode()
    write_json(tmp_path / "x.json", {"a": ["ö"]})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "a": [\n    "ö"\n  ]\n}\n'.encode()
    with atomic_writer(tmp_path / "x.bin", "wb") as file:
        file.write(b"\r\n\x00")
    assert (tmp_path / "x.bin").read_bytes() == b"\r\n\x00"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.json", "x.jsonl"]


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"old": 1}])

    def rows() -> Any:
        yield {"new": 1}
        assert path.read_text() == '{"old": 1}\n'  # not touched before all rows are there
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, rows())
    assert path.read_text() == '{"old": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk(full_disk: Path) -> None:
    path = full_disk / "x.jsonl"
    write_jsonl(path, [{"old": 1}])
    with pytest.raises(StageError, match=f"cannot write {re.escape(str(path))}: No space left on device"):
        write_jsonl(path, ({"text": "x" * 1000} for _ in range(200)))
    assert path.read_text() == '{"old": 1}\n'
    assert list(full_disk.iterdir()) == [path]


def test_disk_that_is_full_when_the_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems report a full disk only here."""

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(StageError, match=r"cannot write .*x\.json: No space left on device"):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"cannot write .*none/x\.jsonl: No such file or directory"):
        write_jsonl(tmp_path / "none" / "x.jsonl", [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_values_that_json_cannot_hold(value: Any, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"cannot write .*x\.jsonl: JSON cannot hold this value"):
        write_jsonl(tmp_path / "x.jsonl", [{"ok": 1}, {"bad": value}])
    assert list(tmp_path.iterdir()) == []


# --- shares of several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_of_a_file_are_the_file(tmp_path: Path, count: int) -> None:
    """Rows, bad rows and ids that are twice, in whichever share they lie; the first of two equal ids stays."""
    path = tmp_path / "pairs.jsonl"
    good = [
        {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
            "meta": {"id": f"p{i % 7}"},
        }
        for i in range(9)
    ]
    lines = [json.dumps(row) for row in good]
    path.write_text("\n".join(["", *lines[:3], "{", *lines[3:6], '{"prompt": []}', "", *lines[6:]]) + "\n")
    expected = records.read_pairs(path, "skip")
    shares = [records.read_pair_share(path, index, count) for index in range(count)]
    assert {share.total for share in shares} == {11}
    found = {line: record for share in shares for line, record in share.records}
    ids = [(line, record.id) for line, record in found.items()]
    kept, skipped = records.settle_rows(path, "skip", ids, [bad for share in shares for bad in share.bad], 11)
    assert tuple(found[line] for line in sorted(kept)) == expected.records
    assert skipped == expected.skipped and len(skipped) == len(expected.skipped) > 3
    with pytest.raises(BadRowsError) as caught:
        records.settle_rows(path, "error", ids, [bad for share in shares for bad in share.bad], 11)
    with pytest.raises(BadRowsError, match="2 rows|4 of 11 rows") as whole:
        records.read_pairs(path)
    assert str(caught.value) == str(whole.value)
