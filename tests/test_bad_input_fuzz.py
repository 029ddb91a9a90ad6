"""Every parser of files, on files that are almost right: an error of ours or a value, soon, and in little memory.

The mutations are those that damage files: bytes lost, doubled or flipped, values of other types, cuts. More of them,
for hours: `python scripts/fuzz.py`.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from pathlib import Path

import pytest

from drift_jax.errors import DriftError
from tests.bad_input import odd
from tests.bad_input.parsers import PARSERS, damaged, seeds_of

_ROUNDS = 40  # files of a parser
_LONGEST_S = 10
_MEMORY = 10  # times the bytes of a file, and
_SPARE = 4 << 20  # what Python takes whatever it reads


@pytest.mark.parametrize("kind", PARSERS)
def test_a_damaged_file_is_a_value_or_an_error_of_ours(kind: str, tmp_path: Path) -> None:
    suffix, parse = PARSERS[kind]
    seeds, source, path = seeds_of(kind, tmp_path), random.Random(kind), tmp_path / f"file{suffix}"
    for number in range(_ROUNDS):
        data = damaged(source.choice(seeds), source) if number else seeds[0]
        path.write_bytes(data)
        begun = time.monotonic()
        try:
            parse(path)
        except DriftError as error:
            assert len(str(error)) < 10_000, "a message that nobody reads"
        assert time.monotonic() - begun < _LONGEST_S, data


@pytest.mark.parametrize("kind", PARSERS)
def test_memory_is_a_small_multiple_of_the_file(kind: str, tmp_path: Path) -> None:
    """One long line or value, as a file of another kind has it."""
    suffix, parse = PARSERS[kind]
    path = tmp_path / f"file{suffix}"
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
