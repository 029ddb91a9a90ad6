"""Every parser of files, on files that are almost right: an error of ours or a value, soon, and in little memory.

hypothesis chooses the damage and makes it small when it has found some. More of it, for hours, or guided by coverage:
`python scripts/fuzz.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drift_jax.errors import DriftError
from tests.bad_input import odd
from tests.bad_input.corpus import FOLDER
from tests.bad_input.damage import damaged, seeds_of
from tests.bad_input.parsers import PARSERS

_LONGEST_S = 10  # of the processor: a busy machine is no reason to fail
_MEMORY = 10  # times the bytes of a file, and
_SPARE = 4 << 20  # what Python takes whatever it reads

# The same files in every run, so that a change is judged by itself; others with FUZZ_ANEW=1 and by scripts/fuzz.py.
_SETTINGS = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize="FUZZ_ANEW" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@contextmanager
def refusals_are_ours(data: bytes) -> Iterator[None]:
    begun = time.process_time()
    try:
        yield
    except DriftError as error:
        assert len(str(error)) < 10_000, "a message that nobody reads"
    assert time.process_time() - begun < _LONGEST_S, data


@pytest.mark.parametrize("kind", PARSERS)
def test_a_whole_file_is_a_value(kind: str, tmp_path: Path) -> None:
    """Else the damage below would never get past the door."""
    suffix, parse = PARSERS[kind]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(seeds_of(kind, tmp_path)[0])
    parse(path)


def try_files(kind: str, folder: Path, files: st.SearchStrategy[bytes]) -> None:
    """A whole file first: what is made once, such as a model, is in no time after that."""
    suffix, parse = PARSERS[kind]
    path = folder / f"file{suffix}"
    path.write_bytes(seeds_of(kind, folder)[0])
    parse(path)

    @_SETTINGS
    @given(data=files)
    def is_read_or_refused(data: bytes) -> None:
        path.write_bytes(data)
        with refusals_are_ours(data):
            parse(path)

    is_read_or_refused()


@pytest.mark.parametrize("kind", PARSERS)
def test_a_damaged_file_is_a_value_or_an_error_of_ours(kind: str, tmp_path: Path) -> None:
    seeds = seeds_of(kind, tmp_path)
    sources = st.randoms(use_true_random=False)
    try_files(kind, tmp_path, sources.map(lambda source: damaged(source.choice(seeds), source)))


@pytest.mark.parametrize("kind", PARSERS)
def test_a_file_of_anything_is_a_value_or_an_error_of_ours(kind: str, tmp_path: Path) -> None:
    """JSON of any form, which is YAML as well, once or on every line, and bytes of no form."""
    documents = _ANYTHING.map(lambda value: json.dumps(value).encode())
    lines = st.lists(documents, max_size=3).map(b"\n".join)
    try_files(kind, tmp_path, documents | lines | st.binary(max_size=64))


@pytest.mark.parametrize("kind", PARSERS)
def test_memory_is_a_small_multiple_of_the_file(kind: str, tmp_path: Path) -> None:
    """One long line or value, as a file of another kind has it."""
    suffix, parse = PARSERS[kind]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(b"{}\n")
    with contextlib.suppress(DriftError):  # what is imported at the first call is no part of a file
        parse(path)
    for data in (b"\0" * (1 << 20), b'"' + b"x" * (1 << 20) + b'"\n', b'{"a": "' + b"y" * (1 << 20)):
        path.write_bytes(data)
        tracemalloc.start()
        try:
            parse(path)
        except DriftError:
            pass
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < _MEMORY * len(data) + _SPARE, (data[:10], peak)


def test_the_makers_of_odd_files_make_them(tmp_path: Path) -> None:
    """Those that need nothing beside them."""
    for name in ("dsat/directory.jsonl", "dsat/pipe.jsonl", "dsat/endless.jsonl", "dsat/loop.jsonl"):
        path = tmp_path / name.replace("/", "_")
        odd.MAKERS[name](path)
        assert path.is_symlink() or path.exists()


def test_every_kind_of_the_corpus_that_is_a_file_has_a_parser() -> None:
    """The others are read by commands only, which tests/test_bad_input.py runs."""
    kinds = {path.parent.name for path in FOLDER.glob("*/cases.yaml")}
    assert kinds - set(PARSERS) == {"card", "checkpoint", "completions_partial", "drawn", "judge_config", "plan"}
