"""Modules of the user's that cannot be imported: the line and the reason are said, by every command that takes one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drift_jax.errors import ConfigError
from drift_jax.evaluation.entry_points import load_function
from drift_jax.stages.rank import load_score
from tests.cli_runs import Drift, drift  # noqa: F401

BROKEN = {
    "bad_syntax": ("def f(\n", "bad_syntax.py, line 1: SyntaxError: '(' was never closed."),
    "bad_name": ("x = 1\ny = z\n", "bad_name.py, line 2: NameError: name 'z' is not defined."),
    "bad_import": ("\nimport no_such_library\n", "line 2: ModuleNotFoundError: No module named 'no_such_library'."),
    "bad_exit": ("import sys\nsys.exit('usage')\n", "bad_exit.py, line 2: SystemExit: usage."),
    "bad_library": ("import json\njson.loads('')\n", "bad_library.py, line 2: JSONDecodeError: Expecting value"),
    "bad_helper": ("import bad_name\n", "bad_name.py, line 2: NameError: name 'z' is not defined."),
    "bad_attribute": ("import json\njson.nothing\n", "bad_attribute.py, line 2: AttributeError: module 'json' has no"),
}


@pytest.fixture()
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, (text, _) in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_the_line_and_the_reason_are_said(modules: Path, name: str) -> None:
    for load, what in ((lambda of: load_function(of, "reward"), "reward"), (load_score, "recipe.ranker")):
        with pytest.raises(ConfigError) as caught:
            load(f"{name}:f")
        said = str(caught.value)
        assert said.startswith(f"{what} {name}:f: the module {name} cannot be imported: {modules}"), said
        assert BROKEN[name][1] in said


def test_the_command_ends_with_a_message(modules: Path, drift: Drift) -> None:
    (modules / "p.json").write_text(json.dumps([{"id": "1", "instruction": "Hi.", "output": "x"}]))
    words = ["p.json", "p.json", "--prompts", "p.json", "--judge", "programmatic", "--out", "out"]
    code, _, err = drift("evaluate", "win-rate", *words, "--check", "bad_syntax:f")
    assert code == 2 and BROKEN["bad_syntax"][1] in " ".join(err.split()) and "Traceback" not in err
