"""Files of outputs: every row is of one prompt, or it is said of which rows that cannot be told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from drift_jax.errors import DataError
from drift_jax.evaluation.prompts import Prompt, read_outputs
from drift_jax.records import Message
from tests.cli_runs import Drift, drift  # noqa: F401


def dialogue(name: str, *turns: str) -> Prompt:
    roles = ("user", "assistant") * len(turns)
    return Prompt(name, tuple(map(Message, roles, turns)), {})


# The last two end alike.
PROMPTS = [
    dialogue("p0", "Who?"),
    dialogue("p1", "Tell me of cats.", "Cats sleep.", "continue"),
    dialogue("p2", "Tell me of dogs.", "Dogs bark.", "continue"),
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"id": "p1", "output": "b"}, {"meta": {"id": "p0"}, "text": ["a"]}], {"p0": "a", "p1": "b"}),
        ([{"instruction": "Who?", "output": "a"}], {"p0": "a"}),
        ([{"output": "a"}, {"output": "b"}, {"output": "c"}], {"p0": "a", "p1": "b", "p2": "c"}),
    ],
)
def test_rows_belong_by_id_by_instruction_or_by_place(
    rows: list[dict[str, Any]], expected: dict[str, str], tmp_path: Path
) -> None:
    assert read_outputs(write(tmp_path / "a.jsonl", rows), PROMPTS) == (expected, None)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        # As completions.jsonl of a run with sampling.n 2: it is not the file's order that chooses.
        (
            [{"id": "p0", "sample": i, "text": text} for i, text in enumerate("ab")] + [{"id": "p1", "text": "c"}],
            "1 of 3 outputs cannot be used:\n  {path}, row 2: id 'p0' is that of row 1 too\nKeep one row for each",
        ),
        (
            [{"instruction": "Who?", "output": "a"}, {"instruction": "Who?", "output": "b"}],
            "row 2: instruction 'Who?' is that of row 1 too",
        ),
        (
            [{"instruction": "Who?", "output": "a"}, {"instruction": "continue", "output": "b"}],
            "1 of 2 outputs cannot be used:\n  {path}, row 2: instruction 'continue' ends 2 prompts, such as 'p1'\n",
        ),
        # By their place all of them would go to the wrong prompts.
        (
            [{"id": "p2", "output": "c"}, {"id": "p0", "output": "a"}, {"output": "b"}],
            "1 of 3 rows of {path} have no id, and the others have one: row 3. It cannot be told",
        ),
        (
            [{"output": "b"}, {"instruction": "Who?", "output": "a"}, {"output": "c"}],
            "2 of 3 rows of {path} have no instruction, and the others have one: row 1, 3.",
        ),
        ([{"id": "p0", "output": ["a", "b"]}], "row 1: output or text or response or completion must be a text, or a"),
        ([{"id": "x", "output": "a"}], "none of the 1 rows of {path} belongs to one of the 3 prompts by its id"),
        ([{"output": "a"}], "1 outputs without ids and there are 3 prompts"),
    ],
)
def test_rows_whose_prompt_cannot_be_told_are_refused(rows: list[dict[str, Any]], says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=re.escape(says.format(path=path))) as caught:
        read_outputs(path, PROMPTS)
    assert re.search("[Gg]ive (it|each|every)|must be", str(caught.value)), "no remedy"


def test_rows_of_no_prompt_are_counted_in_the_report(tmp_path: Path, drift: Drift) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"id": "p0", "prompt": "Who?"}])
    rows = [{"id": f"p{i}", "output": "x" * (i + 1)} for i in range(3)]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:1])
    words = ["--prompts", prompts, "--judge", "programmatic", "--check", "drift_jax.evaluation.checks:shorter"]
    code, _, err = drift("evaluate", "win-rate", a, b, *words, "--out", tmp_path / "out")
    assert code == 0, err
    said = f"2 of 3 rows of {a} belong to no prompt"
    assert json.loads((tmp_path / "out/report.json").read_text())["note"] == said
    assert said in (tmp_path / "out/report.md").read_text()
