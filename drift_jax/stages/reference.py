"""Reference log-probabilities as an artefact: computed once per stage, stored with the tokens they belong to."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NamedTuple, final

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeInt
from typing_extensions import TypedDict

from drift_jax import stopping
from drift_jax.data.pairs import TokenizedPair
from drift_jax.distributed import on_main, send, send_bytes
from drift_jax.errors import StageError
from drift_jax.files import atomic_writer
from drift_jax.journal import Journal
from drift_jax.reading import read_arrays
from drift_jax.step import KnownScores, PairScores
from drift_jax.stopping import Stopped

_REMEDY = "Remove it, and it is computed again."
_WRITE_S = 1.0  # between two writes of the journal: each waits for the disk


class RefLogps(NamedTuple):
    """Of each pair, in nats under the reference."""

    logps: Float[np.ndarray, "N 2"]  # summed over the completion
    last_logps: Float[np.ndarray, "N 2"]  # of the completion's last token


def write_ref_logps(path: Path, pairs: list[TokenizedPair], ref: RefLogps) -> None:
    """Raises `StageError` when the disk cannot take it."""
    ids, tokens = np.array([p.id for p in pairs]), token_hashes(pairs)
    with atomic_writer(path, "wb") as file:
        np.savez(file, ids=ids, tokens=tokens, ref_logps=ref.logps, ref_last_logps=ref.last_logps)


def journal_path(path: Path) -> Path:
    """Of the journal of what goes to `path`, `ref_logps.npz`."""
    return path.with_name("ref_logps.partial.jsonl")


_BothSides = Annotated[list[float], Field(min_length=2, max_length=2)]  # chosen, rejected


class _Row(TypedDict):
    """Of the journal."""

    pair: NonNegativeInt  # its place in the pass
    tokens: str  # the beginning of their hash
    logps: Annotated[list[_BothSides], Field(min_length=2, max_length=2)]  # of all tokens, of the last ones; nats


@final
class RefJournal:
    """Log-probs of a reference pass as they come, in `ref_logps.partial.jsonl`, so that a pass that was ended goes on.

    A row of it says which tokens it is of. Of several processes all make one, and process 0 writes.
    """

    def __init__(self, out_dir: Path, pairs: list[TokenizedPair]) -> None:
        self._pairs, self._path = pairs, out_dir / "ref_logps.npz"
        self._found = np.full((len(pairs), 2, 2), np.nan)  # (log-probs, those of the last tokens) of both sides
        self._hashes = [tokens[:16] for tokens in token_hashes(pairs).tolist()]
        self._journal: Journal | None = None
        self._waiting: list[dict[str, Any]] = []
        self._written = time.monotonic()

    def __enter__(self) -> RefJournal:
        def read() -> bytes:
            self._journal = Journal(journal_path(self._path), _Row)
            for row in self._journal.rows:
                if row["pair"] < len(self._pairs) and row["tokens"] == self._hashes[row["pair"]]:
                    self._found[row["pair"]] = row["logps"]
            return self._found.tobytes()

        data = send_bytes(read)
        assert data is not None
        self._found = np.frombuffer(data).reshape(self._found.shape).copy()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal is not None:
            if kind is None or issubclass(kind, Stopped | KeyboardInterrupt):
                self._write()
            self._journal.close()

    def part(self, start: int, stop: int) -> KnownScores:
        """What is known of some of the pairs, and how more of it is kept. Raises `Stopped` in the middle of a pass."""

        def keep(rows: Int[np.ndarray, "R"], scores: PairScores) -> None:
            new = np.stack([scores.logps, scores.last_logps], axis=1)
            self._found[start + rows] = new
            if self._journal is not None:
                self._waiting += [
                    {"pair": int(start + row), "tokens": self._hashes[start + row], "logps": logps.tolist()}
                    for row, logps in zip(rows, new, strict=True)
                    if np.isfinite(logps).all()  # JSON has no NaN: such a pair is computed anew
                ]
                if time.monotonic() - self._written > _WRITE_S:
                    self._write()
            if stopping.reached():
                raise Stopped

        return KnownScores(np.isfinite(self._found[start:stop, 0, 0]), keep)

    def finish(self) -> RefLogps:
        """All of them, on disk as `ref_logps.npz`; the journal can go then."""
        ref = RefLogps(self._found[:, 0].copy(), self._found[:, 1].copy())
        on_main(lambda: write_ref_logps(self._path, self._pairs, ref))
        if self._journal is not None:
            self._waiting = []
            self._journal.path.unlink()
        return ref

    def _write(self) -> None:
        assert self._journal is not None
        waiting, self._waiting = self._waiting, []
        self._journal.append(waiting)
        self._written = time.monotonic()


def read_ref_logps(path: Path, pairs: list[TokenizedPair]) -> RefLogps | None:
    """Stored log-probs, when they are of exactly these tokens in this order."""
    if not path.exists():
        return None
    stored = read_arrays(path, _REMEDY, StageError)
    if missing := sorted({"tokens", "ref_logps", "ref_last_logps"} - stored.keys()):
        raise StageError(f"{path} has no array {missing[0]}. {_REMEDY}")
    if not np.array_equal(stored["tokens"], token_hashes(pairs)):
        return None
    for name in ("ref_logps", "ref_last_logps"):
        if stored[name].shape != (len(pairs), 2) or stored[name].dtype.kind != "f":
            raise StageError(
                f"{path}: {name} is {stored[name].dtype} {stored[name].shape}, not numbers for {len(pairs)} pairs. "
                f"{_REMEDY}"
            )
    return RefLogps(stored["ref_logps"], stored["ref_last_logps"])


def share_ref_logps(path: Path, pairs: list[TokenizedPair]) -> RefLogps | None:
    """`read_ref_logps` of process 0, on every process. A journal that was left beside them is removed."""

    def read() -> RefLogps | None:
        found = read_ref_logps(path, pairs)
        if found is not None:  # a run that was killed at the end of the pass
            journal_path(path).unlink(missing_ok=True)
        return found

    def unpack(data: bytes) -> RefLogps:
        return RefLogps(*np.frombuffer(data).reshape(2, len(pairs), 2))

    return send(read, lambda ref: np.stack(ref).tobytes(), unpack)


def token_hashes(pairs: Iterable[TokenizedPair]) -> np.ndarray:
    """Of each pair, a sha256 in hex over the ids of its prompt and both completions."""

    def one(pair: TokenizedPair) -> str:
        digest = hashlib.sha256()
        for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(len(part).to_bytes(4, "little") + np.asarray(part, "<i4").tobytes())
        return digest.hexdigest()

    return np.array([one(pair) for pair in pairs])
