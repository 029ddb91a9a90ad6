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
from drift_jax.reading import read_arrays

_REMEDY = "Remove it, and it is computed again."


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
    stored = read_arrays(path, _REMEDY, StageError)
    if missing := sorted({"tokens", "ref_logps", "ref_last_logps"} - stored.keys()):
        raise StageError(f"{path} has no array {missing[0]}. {_REMEDY}")
    if not np.array_equal(stored["tokens"], _token_hashes(pairs)):
        return None
    for name in ("ref_logps", "ref_last_logps"):
        if stored[name].shape != (len(pairs), 2) or stored[name].dtype.kind != "f":
            raise StageError(
                f"{path}: {name} is {stored[name].dtype} {stored[name].shape}, not numbers for {len(pairs)} pairs. "
                f"{_REMEDY}"
            )
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
