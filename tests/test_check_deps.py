"""`make check-deps`: what an audit's answer means, and that what it runs is there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[1]
FINE, UNKNOWN = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found on PyPI"}
BAD = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}


@pytest.fixture(scope="module")
def check_deps() -> Iterator[Any]:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("check_deps", REPO / "scripts" / "check_deps.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_a_vulnerability_is_an_error(check_deps: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_deps.judge_audit([FINE, BAD, UNKNOWN, UNKNOWN], strict=False) == 1
    assert "c 2: PYSEC-1; fixed in: 3" in capsys.readouterr().out


def test_no_answer_is_not_taken_for_a_good_one(check_deps: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A mirror of the index without its vulnerability data makes pip-audit say that there are none."""
    for strict in (False, True):
        assert check_deps.judge_audit([FINE, UNKNOWN, UNKNOWN], strict) == int(strict)
        out, err = capsys.readouterr()
        assert not out and "SKIPPED, nothing is known" in err and "2 of 3 packages" in err
    assert check_deps.judge_audit([FINE, FINE, UNKNOWN], strict=True) == 0
    assert "no known vulnerabilities in 2 packages; not known to the service: b" in capsys.readouterr().out


def test_pip_audit_that_fails_is_told(check_deps: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "pip-audit"
    program.write_text("#!/bin/sh\necho 'no route to host' >&2\nexit 1\n")
    program.chmod(0o755)
    assert check_deps.audit(str(program), strict=False) == 0 and check_deps.audit(str(program), strict=True) == 1
    assert "no route to host" in capsys.readouterr().err


def test_the_tests_of_the_lowest_versions_are_there(check_deps: Any) -> None:
    assert [name for name in check_deps.TESTS if not (REPO / name).is_file()] == []
    assert len(check_deps.test_requirements()) == len(check_deps.TEST_PACKAGES)
