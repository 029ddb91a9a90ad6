"""Tokenised pairs on disk: `KIND.KEY.npz`, the key being a hash of all that shaped them.

A file is either whole and of its key, or it is refused: a digest over key and content lies inside, and nothing is
unpickled. Arrays in it: `tokens` int32, prompt, chosen and rejected of one pair after the other; `ends` int64 [N, 3],
where in `tokens` each of them ends; `cuts` int64 [N, 3], tokens that were cut from each; `text`, a JSON object as
UTF-8 bytes with the `ids` of the pairs and the `refused` messages; `digest`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from drift_jax.data.pairs import TokenizedPair
from drift_jax.errors import DataError
from drift_jax.files import atomic_writer
from drift_jax.reading import read_arrays

_REMEDY = "Remove it, and it is made again."
FORMAT = 1  # part of every key; raise it when this layout changes, or the ids that the code makes of a pair
KEPT = 2  # newest files of a kind that stay: a stage's train and held-out pairs may have the same file name


class TokenizedRows(NamedTuple):
    """What tokenising a file of pairs gives."""

    pairs: list[TokenizedPair]  # also those that a cut left without a completion
    refused: tuple[str, ...]  # why no ids could be made of the others


def cache_path(cache_dir: Path, kind: str, key: str) -> Path:
    """Where tokens of this key lie; `kind` tells the files of one stage apart, `key` is a sha256 in hex."""
    return cache_dir / f"{kind}.{key}.npz"


def read_tokens(path: Path, key: str) -> TokenizedRows | None:
    """The tokens in a file that `write_tokens` wrote; None when there is no such file.

    Raises:
      DataError: the file is not whole, or of another key.
    """
    if not path.exists():
        return None
    arrays = read_arrays(path, _REMEDY)
    try:
        if arrays.pop("digest").tobytes() != _digest(key, arrays):
            raise ValueError("its digest does not fit its content")
        return _rows_of(arrays)
    except Exception as error:  # a damaged archive makes zipfile, zlib and numpy raise errors of a dozen kinds
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error


class Lengths(NamedTuple):
    """Tokens of one pair."""

    prompt: int
    chosen: int
    rejected: int


def read_lengths(path: Path) -> list[tuple[str, Lengths]]:
    """How long the pairs of a file are, by id, whatever key it is of. Raises `DataError` where it is damaged."""
    arrays = read_arrays(path, _REMEDY)
    try:
        ends, ids = arrays["ends"], json.loads(arrays["text"].tobytes())["ids"]
        sizes = np.diff(ends.ravel(), prepend=0).reshape(-1, 3)
        return [(name, Lengths(*row)) for name, row in zip(ids, sizes.tolist(), strict=True)]
    except Exception as error:  # as in `read_tokens`
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}. {_REMEDY}") from error


def _rows_of(arrays: Mapping[str, np.ndarray]) -> TokenizedRows:
    text = json.loads(arrays["text"].tobytes())
    tokens, ends, cuts = arrays["tokens"], arrays["ends"], arrays["cuts"]
    parts = [tokens[start:end] for start, end in itertools.pairwise([0, *ends.ravel().tolist()])]
    rows = zip(text["ids"], parts[0::3], parts[1::3], parts[2::3], cuts.tolist(), strict=True)
    pairs = [TokenizedPair(name, prompt, chosen, rejected, *cut) for name, prompt, chosen, rejected, cut in rows]
    return TokenizedRows(pairs, tuple(text["refused"]))


def write_tokens(path: Path, key: str, rows: TokenizedRows) -> None:
    """Writes the file, whole or not at all, and removes older ones of its kind.

    Raises:
      StageError: the disk is full, or the directory cannot be written.
    """
    arrays = _arrays_of(rows)
    digest = np.frombuffer(_digest(key, arrays), np.uint8)
    with contextlib.suppress(OSError):  # the writer says what is wrong
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays, digest=digest)
    _remove_older(path)


def _arrays_of(rows: TokenizedRows) -> dict[str, np.ndarray]:
    parts = [part for pair in rows.pairs for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    cuts = [(pair.prompt_tokens_cut, pair.chosen_tokens_cut, pair.rejected_tokens_cut) for pair in rows.pairs]
    text = json.dumps({"ids": [pair.id for pair in rows.pairs], "refused": rows.refused})
    return {
        "tokens": np.concatenate([np.empty(0, np.int32), *parts], dtype="<i4"),
        "ends": np.cumsum([len(part) for part in parts], dtype="<i8").reshape(-1, 3),
        "cuts": np.array(cuts, "<i8").reshape(-1, 3),
        "text": np.frombuffer(text.encode("ascii"), np.uint8),
    }


def rows_to_bytes(rows: TokenizedRows) -> bytes:
    """For other processes of a run; `rows_from_bytes` reads them."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **_arrays_of(rows))
    return file.getvalue()


def rows_from_bytes(data: bytes) -> TokenizedRows:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return _rows_of(file)


def _digest(key: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256(key.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode() + array.tobytes())
    return digest.digest()


def _remove_older(path: Path) -> None:
    kind = path.name.rsplit(".", 2)[0]
    of_kind = re.compile(re.escape(kind) + r"\.[0-9a-f]{64}\.npz")
    others = [other for other in path.parent.iterdir() if other != path and of_kind.fullmatch(other.name)]
    others.sort(key=lambda other: other.stat().st_mtime_ns, reverse=True)
    for old in others[KEPT - 1 :]:
        old.unlink(missing_ok=True)
