"""How files go wrong: bytes lost, doubled or flipped, and values of other kinds in the places of values."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from drift_jax.data.token_cache import TokenizedRows, write_tokens
from drift_jax.stages.reference import RefLogps, write_ref_logps
from tests.bad_input import odd
from tests.bad_input.corpus import FOLDER
from tests.bad_input.parsers import PAIRS, TOKENS_KEY, tiny_model

_PIECES = (b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'""', b'"\\ud800"', b"9" * 5000, b"\xff", b"\0", b"*a")
_MARKS = b'{}[]",:\n'
_VALUES: tuple[Any, ...] = (None, True, 0, -1, 2**70, 0.5, "", "a", "..", "\U0010ffff", [], [None], {}, {"a": [1]})


def _npz(write: Callable[[Path], Any]) -> Callable[[], bytes]:
    def make() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file.npz"
            write(path)
            return path.read_bytes()

    return make


def _line(row: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(row).encode() + b"\n"


_TURNS = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "One."}]
_PAIR = {"chosen": _TURNS, "rejected": [_TURNS[0], {"role": "assistant", "content": "Two."}]}
_COMPLETION = {"id": "d0", "sample": 0, "text": "One.", "token_ids": [1, 2], "finish_reason": "stop", "mean_logp": -1.0}
_CHOICE = {"key": "k", "model": "m", "prompt": "p", "prompt_hash": "h", "order": [0, 1], "best": 0, "reason": "r"}
_ANNOTATOR = {"mine": {"prompt_template": "p.txt", "completions_kwargs": {"model_name": "m", "max_tokens": 1}}}
_REF = RefLogps(np.full((len(PAIRS), 2), -3.0), np.full((len(PAIRS), 2), -1.0))

# Whole files of kinds that have none in the corpus: because no command is given one, or because it is in no form that
# people read.
WHOLE: dict[str, Callable[[], bytes]] = {
    "tokens": _npz(lambda path: write_tokens(path, TOKENS_KEY, TokenizedRows(PAIRS, ("r",)))),
    "ref_logps": _npz(lambda path: write_ref_logps(path, PAIRS, _REF)),
    "completions": _line(_COMPLETION),
    "ref_journal": _line({"pair": 0, "tokens": "0" * 16, "logps": [[-1.0, -2.0], [-0.5, -0.25]]}),
    "choices": _line(_CHOICE),
    "mixture": _line(_PAIR),
    "annotator": lambda: yaml.safe_dump(_ANNOTATOR).encode(),
    "checksums": _line({"files": {"params/data": {"bytes": 7, "xxh3_128": "0" * 32}}}),
    "disk_dataset": _line({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}),
    "tokenizer": lambda: (tiny_model() / "tokenizer.json").read_bytes(),
    "safetensors": lambda: (tiny_model() / "model.safetensors").read_bytes(),
}


def seeds_of(kind: str, folder: Path) -> list[bytes]:
    """The files of a kind of the corpus, made ones included, valid ones first and again and again; what is no file is
    left out.
    """
    given = [path for path in sorted((FOLDER / kind).glob("*")) if path.name != "cases.yaml"]
    found = {path.name: path.read_bytes() for path in given}
    for name, make in odd.MAKERS.items():
        path = folder / "seed"
        if name.startswith(f"{kind}/"):
            with contextlib.suppress(OSError):  # one that changes a file beside it
                make(path)
            if path.is_file() and not path.is_symlink():
                found[Path(name).name] = path.read_bytes()
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
    good = next((data for name, data in found.items() if name.startswith("good.")), None) or WHOLE[kind]()
    return [good] * max(1, len(found)) + list(found.values())


def damaged(data: bytes, source: random.Random) -> bytes:
    """The bytes after one to three mishaps; `source` may be hypothesis's."""
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        data = source.choice(_MISHAPS)(data, source)
    return data


def _cut_off(data: bytes, source: random.Random) -> bytes:
    return data[: source.randint(0, len(data))]


def _piece(data: bytes, source: random.Random) -> tuple[int, int]:
    at, end = sorted(source.randint(0, len(data)) for _ in range(2))
    return at, end


def _piece_lost(data: bytes, source: random.Random) -> bytes:
    at, end = _piece(data, source)
    return data[:at] + data[end:]


def _piece_doubled(data: bytes, source: random.Random) -> bytes:
    at, end = _piece(data, source)
    return data[:end] + data[at:]


def _piece_repeated(data: bytes, source: random.Random) -> bytes:
    at = source.randint(0, len(data))
    return data[:at] + data[at : at + 20] * source.randint(2, 200) + data[at:]


def _other_byte(data: bytes, source: random.Random) -> bytes:
    at = source.randint(0, max(0, len(data) - 1))
    return data[:at] + bytes([source.randint(0, 255)]) + data[at + 1 :]


def _piece_put_in(data: bytes, source: random.Random) -> bytes:
    at = source.randint(0, len(data))
    return data[:at] + source.choice(_PIECES) + data[at:]


def _other_piece(data: bytes, source: random.Random) -> bytes:
    """Between two marks of JSON or YAML."""
    marks = [i for i, byte in enumerate(data) if byte in _MARKS] or [0]
    first = source.choice(marks)
    last = next((i for i in marks if i > first), len(data))
    return data[: first + 1] + source.choice(_PIECES) + data[last:]


def _other_value(data: bytes, source: random.Random) -> bytes:
    """A whole file of JSON, of JSON lines or of YAML in which one value is of another kind, gone, or has a namesake."""
    for read, write in _LANGUAGES:
        with contextlib.suppress(Exception):  # it is in another language, or in none
            return write(_altered(read(data), source))
    return _other_piece(data, source)


def _altered(value: Any, source: random.Random, left: int = 6) -> Any:
    """A copy in which one place, `left` steps below at most, is another; the deeper ones are as likely as the upper."""
    if left and isinstance(value, dict | list) and value and source.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, copy = source.choice(keys), value.copy()
        copy[key] = _altered(value[key], source, left - 1)
        return copy
    if isinstance(value, dict) and value and source.random() < 0.5:
        key = source.choice(list(value))
        rest = {name: one for name, one in value.items() if name != key}
        return rest if source.random() < 0.5 else rest | {str(key) + "x": value[key]}
    if isinstance(value, list) and value and source.random() < 0.5:
        return value * 2 if source.random() < 0.5 else value[1:]
    return source.choice(_VALUES)


def _read_lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines()]


def _write_lines(rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


_LANGUAGES: tuple[tuple[Callable[[bytes], Any], Callable[[Any], bytes]], ...] = (
    (json.loads, lambda value: json.dumps(value).encode()),
    (_read_lines, _write_lines),
    (yaml.safe_load, lambda value: yaml.safe_dump(value, sort_keys=False).encode()),
)
_MISHAPS = (
    _cut_off, _piece_lost, _piece_doubled, _piece_repeated, _other_byte, _piece_put_in, _other_piece,
    *[_other_value] * 4,  # what gets past the syntax gets furthest
)  # fmt: skip
