"""What users may hand us broken: exit code 2, one message that names file and remedy, nothing written, no hang."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bad_input import beside, odd
from tests.bad_input.corpus import AS_IT_IS, FOLDER, Case, cases, picture
from tests.cli_runs import Drift, drift  # noqa: F401

CASES = list(cases())
BROKEN = [case for case in CASES if case.says is not None]
_LONGEST_S = 60  # for one command on a machine that has other work; most take less than a tenth of a second


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory that a function of `beside` fills, once for all cases that name it."""

    @functools.cache
    def fill(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "work"
        folder.mkdir()
        beside.FILLERS[name](folder)
        return folder

    return fill


class StuckError(BaseException):
    """Nobody's `except Exception` may keep it."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """A command that hangs fails instead of keeping everybody."""

    def stop(*_: object) -> None:
        raise StuckError(f"the command took more than {_LONGEST_S} s")

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_file_is_one_error_and_its_valid_twin_is_none(
    case: Case, drift: Drift, shared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with (
        beside.judge_server(beside.answer_of(case)) if "{judge}" in case.command else contextlib.nullcontext("") as url
    ):
        words = case.lay(work, shared, url)
        monkeypatch.chdir(work)
        before = picture(work)
        with in_time():
            code, out, err = drift(*words)
    said = f"{' '.join(words)}\n{out}\n{err}"
    if case.says is None:
        assert code == 0, said
        return
    expected = case.expects(work)
    lines = [line.removeprefix("error: ").strip() for line in err.splitlines()]
    begins = expected.removesuffix("...")
    assert code == 2, said
    assert any(line == expected or (expected != begins and line.startswith(begins)) for line in lines), said
    assert "Traceback" not in out + err
    after = picture(work)
    assert after == before, f"something was written: {sorted(dict(after.items() ^ before.items()))}"


def test_every_file_is_a_case_and_every_case_has_a_file() -> None:
    """And there are as many as the corpus is to have."""
    listed = {case.name for case in CASES if case.file != AS_IT_IS}
    there = {
        f"{path.parent.name}/{path.name}" for path in FOLDER.glob("*/*") if path.is_file() and path.suffix != ".py"
    }
    there = {name for name in there if not name.endswith("/cases.yaml") and "__pycache__" not in name}
    assert listed == there | set(odd.MAKERS)
    assert len(BROKEN) >= 150
