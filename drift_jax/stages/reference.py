"""Reference log-probabilities as an artefact: computed once per stage, stored with the tokens they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from drift_jax.data.pairs import TokenizedPair
from drift_jax.distributed import send
from drift_jax.errors import StageError


class RefLogps(NamedTuple):
    """Of each pair, in nats under the reference."""

    logps: Float[np.ndarray, "N 2"]  # summed over the completion
    last_logps: Float[np.ndarray, "N 2"]  # of the completion's last token


def write_ref_logps(path: Path, pairs: list[TokenizedPair], ref: RefLogps) -> None:
    temporary = path.with_name(".ref_logps.tmp.npz")
    try:
        ids, tokens = np.array([p.id for p in pairs]), _token_hashes(pairs)
        np.savez(temporary, ids=ids, tokens=tokens, ref_logps=ref.logps, ref_last_logps=ref.last_logps)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StageError(f"cannot write {path}: {error}. Free space and run again.") from None
    temporary.rename(path)


def read_ref_logps(path: Path, pairs: list[TokenizedPair]) -> RefLogps | None:
    """Stored log-probs, when they are of exactly these tokens in this order."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        if not np.array_equal(stored["tokens"], _token_hashes(pairs)):
            return None
        return RefLogps(stored["ref_logps"], stored["ref_last_logps"])


def share_ref_logps(path: Path, pairs: list[TokenizedPair]) -> RefLogps | None:
    """`read_ref_logps` of process 0, on every process."""

    def unpack(data: bytes) -> RefLogps:
        return RefLogps(*np.frombuffer(data).reshape(2, len(pairs), 2))

    return send(lambda: read_ref_logps(path, pairs), lambda ref: np.stack(ref).tobytes(), unpack)


def _token_hashes(pairs: Iterable[TokenizedPair]) -> np.ndarray:
    def one(pair: TokenizedPair) -> str:
        digest = hashlib.sha256()
        for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(len(part).to_bytes(4, "little") + np.asarray(part, "<i4").tobytes())
        return digest.hexdigest()

    return np.array([one(pair) for pair in pairs])
