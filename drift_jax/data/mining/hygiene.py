"""Which mined records are left out: lengths, languages, exact and near-duplicates; and which ones are held out.

Near-duplicates are found by MinHash (`datasketch`) over word triples, in bands, and confirmed by the texts' similarity
(`rapidfuzz`). A record costs 128 bytes until the end, when the bands are sorted: an index in memory takes many times
that.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import zlib
from array import array
from collections.abc import Callable
from typing import final

import numpy as np
from jaxtyping import UInt64
from rapidfuzz import fuzz

from drift_jax.data.chosen import language_of
from drift_jax.data.mining.config import HygieneRules, SplitRules
from drift_jax.data.mining.mined import Mined

EXACT = "exact duplicate"
NEAR = "near-duplicate"
LANGUAGE = "other language"

_BANDS, _HASHES = 16, 4  # a band of 4: of two texts that share 60 % of their triples, 89 % meet in one of 16
_SCHEME = "affine32"
_MOST_COMPARED = 50  # records that meet in a band and are compared with one of them
# Words; signs of scripts that put no spaces between words count one by one.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]|[^\W_]+")


@final
class Hygiene:
    """The rules that look at one record, and at which ones were there before it."""

    def __init__(self, rules: HygieneRules) -> None:
        self._rules = rules
        self._seen: set[bytes] = set()

    def refuse(self, mined: Mined) -> str | None:
        """Why a record is left out, by the first rule; None when it stays."""
        rules = self._rules
        complaint, reply = len(mined.feedback), len(mined.reply)
        prompt = sum(len(message.content) for message in mined.prompt)
        revised = [len(mined.revised)] if mined.kind == "seed" else []
        if complaint < rules.min_complaint:
            return "complaint too short"
        if complaint > rules.max_complaint:
            return "complaint too long"
        if min([reply, *revised]) < rules.min_reply:
            return "reply too short"
        if max([reply, *revised]) > rules.max_reply:
            return "reply too long"
        if prompt > rules.max_prompt:
            return "prompt too long"
        if rules.languages:
            language = language_of(f"{mined.prompt[-1].content}\n{mined.feedback}")
            if language is not None and language not in rules.languages:
                return LANGUAGE
        return EXACT if rules.exact_duplicates == "drop" and self._is_known(mined) else None

    def _is_known(self, mined: Mined) -> bool:
        """Whether a record of the same texts was there before; white space counts as one space."""
        digest = hashlib.blake2b(mined.kind.encode(), digest_size=16)
        for role, text in zip(
            [m.role for m in mined.prompt] + ["reply", "feedback", "revised"], mined.texts(), strict=True
        ):
            digest.update(f"\0{role}\0{_flat(text)}".encode())
        key = digest.digest()
        known = key in self._seen
        self._seen.add(key)
        return known


def held_out(mined: Mined, rules: SplitRules) -> bool:
    """Whether a record belongs to the test side: by its conversation's first user message alone.

    So a conversation is on one side as a whole, and so are all that begin alike: no prompt is on both.
    """
    first = next(message.content for message in mined.prompt if message.role == "user")
    digest = hashlib.sha256(f"{rules.seed}\0{_flat(first).casefold()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < rules.test_share * 2**64


@final
class NearDuplicates:
    """Records of one kind, in their order. `add` each, then ask for those that are like an earlier one."""

    def __init__(self, max_similarity: float) -> None:
        self._most = max_similarity
        self._bands = array("Q")
        self._permutations = None

    def add(self, mined: Mined) -> None:
        if self._most < 1:
            self._bands.extend(self._bands_of(local_text(mined)))

    def find(self, text_of: Callable[[int], str]) -> set[int]:
        """Numbers of the records that are too much like an earlier one that stays.

        Args:
          text_of: `local_text` of record i.
        """
        bands: UInt64[np.ndarray, "N bands"] = np.frombuffer(self._bands, np.uint64).reshape(-1, _BANDS)
        found: set[int] = set()
        for band in bands.T:
            order = np.argsort(band, kind="stable")
            starts = np.flatnonzero(np.diff(band[order], prepend=band[order][:1] + 1, append=band[order][-1:] + 1))
            for start, end in itertools.pairwise(starts):
                if end - start > 1:
                    self._compare([int(i) for i in order[start:end] if int(i) not in found], text_of, found)
        return found

    def _compare(self, numbers: list[int], text_of: Callable[[int], str], found: set[int]) -> None:
        kept: list[str] = []
        for number in numbers:
            text = text_of(number)
            if any(fuzz.ratio(text, other, score_cutoff=100 * self._most) > 100 * self._most for other in kept):
                found.add(number)
            elif len(kept) < _MOST_COMPARED:
                kept.append(text)

    def _bands_of(self, text: str) -> list[int]:
        from datasketch import MinHash

        words = _WORDS.findall(text.casefold())
        triples = {" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))}
        hashes = MinHash(_BANDS * _HASHES, hashfunc=zlib.crc32, permutations=self._permutations, scheme=_SCHEME, seed=1)
        self._permutations = hashes.permutations
        hashes.update_batch(sorted(triples))
        values = np.asarray(hashes.hashvalues, np.uint64).reshape(_BANDS, _HASHES)
        digests = (hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in values)
        return [int.from_bytes(digest, "little") for digest in digests]


def local_text(mined: Mined) -> str:
    """What is compared: the last message of the prompt, the reply and what the user said to it.

    Two complaints in one long conversation share all that was said before the first.
    """
    parts = (mined.prompt[-1].content, mined.reply, mined.feedback, mined.revised)
    return "\n".join(_flat(part) for part in parts if part)


def _flat(text: str) -> str:
    return " ".join(text.split())
