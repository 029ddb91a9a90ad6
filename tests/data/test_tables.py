"""Datasets on a disk may not name files of other folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from drift_jax.data.exchange import convert_pairs
from drift_jax.data.mining.sources import SourceReader, find_sources
from drift_jax.data.tables import check_table
from drift_jax.errors import DataError

ROWS = [{"a": 1}, {"a": 2}]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "name", ["../other/data-00000-of-00001.arrow", "/etc/passwd", "..", 3, "link.arrow", ".", "sub/data.arrow"]
)
def test_a_table_outside_is_not_opened(tmp_path: Path, name: object) -> None:
    for folder in ("table", "other"):
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / folder))
    table = tmp_path / "table"
    check_table(table)
    (table / "link.arrow").symlink_to(tmp_path / "other" / "data-00000-of-00001.arrow")
    edit(table / "state.json", _data_files=[{"filename": name}])
    with pytest.raises(DataError, match="state.json names .* not in that folder"):
        list(SourceReader(find_sources([str(table)])[0], ["a"], lambda _: None))
    with pytest.raises(DataError, match="not in that folder"):
        convert_pairs(table, tmp_path / "out", "drift")


def test_nor_a_split_outside(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "d"))
    check_table(tmp_path / "d")
    edit(tmp_path / "d" / "dataset_dict.json", splits=["../elsewhere"])
    with pytest.raises(DataError, match="dataset_dict.json names '../elsewhere'"):
        check_table(tmp_path / "d")


def test_what_is_broken_otherwise_is_told_by_its_reader(tmp_path: Path) -> None:
    check_table(tmp_path)
    (tmp_path / "state.json").write_text("[" * 100_000)
    check_table(tmp_path)
