"""Answers to the prompts of an evaluation, by several processes: nothing is drawn twice, and all stop together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drift_jax.stages.journal import read_completions
from tests.answers import PROMPTS
from tests.processes import run_together
from tests.tiny_pairs import build_tiny_policy


@pytest.mark.slow
def test_several_processes_know_what_each_of_them_has_drawn(tmp_path: Path) -> None:
    """Also once it is merged, which process 0 alone has read; with a share of its own each, and all together."""
    model = build_tiny_policy(tmp_path / "model")
    ends = run_together("tests.answers", 2, model, tmp_path / "out", devices=1)
    assert [code for code, _ in ends] == [0, 0], ends
    found = [json.loads(output.splitlines()[-1]) for _, output in ends]
    every = [f"p{i}" for i in range(6)]
    for me, own in enumerate(found):
        first, again = own["apart"]
        assert first == {"asked": every[me::2], "answers": 6} and again == {"asked": [], "answers": 6}
        first, again = own["together"]
        assert first == {"asked": every, "answers": 6} and again == {"asked": [], "answers": 6}
        first, again = own["stopped"]
        assert first["answers"] is None and len(first["asked"]) == again["answers"] == PROMPTS
        assert 0 < len(again["asked"]) < PROMPTS - 3 and again == found[0]["stopped"][1]
    assert len(read_completions(tmp_path / "out" / "stopped" / "completions.jsonl")) == PROMPTS
