"""What may not become a reply of a pair: rules on the text of a completion, each with the reason that it gives.

A rule that refuses too much costs good pairs, so each is built to let natural replies pass. Tried on 572 real ones
(198 logged replies of people and models, 171 replies after the complaint, 203 earlier turns) they refuse none. Labels
of turns are looked for outside of fenced code, as a reply may show a chat format, and in English only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from rapidfuzz import fuzz

from drift_jax.config import SamplingConfig
from drift_jax.errors import ConfigError
from drift_jax.methods import Record, logged_reply

EMPTY = "empty"
SAME = "same as rejected"
NEAR = "near the rejected"
CUT = "cut by length"
REPEATS = "repeats itself"
SPEAKER = "speaks for another"
THOUGHT = "unfinished thought"
LANGUAGE = "other language"
# The same, where the logged reply is the chosen one.
_AGAINST_CHOSEN = {SAME: "same as chosen", NEAR: "near the chosen"}

_FENCE = re.compile(r"^ {0,3}(```+|~~~+).*?(?:^ {0,3}\1[`~]* *$|\Z)", re.MULTILINE | re.DOTALL)
# A turn of somebody else, as the plain prompt of style `paper` and base models write it: "User: ...", "**Human:** ...".
_LABEL = re.compile(r"^\s{0,3}(?:#{1,6} |\*\*|__)?(user|human|assistant)(?:\*\*|__)?\s*:", re.IGNORECASE | re.MULTILINE)
# Control tokens of chat templates that were written as text, and headers of instruction formats.
_MARKER = re.compile(
    r"^\s{0,3}(?:<\|(?:im_start|im_end|start_header_id|eot_id|user|assistant|system|endoftext)\|>|<start_of_turn>"
    r"|\[/?INST\]|#{2,3} Instruction:)",
    re.MULTILINE,
)
_OTHER_LABEL = re.compile(
    r"^\s*(?:[-*+] |\d+[.)] )?(?:\*\*|__|`)?(?!(?:user|human|assistant|system)\b)\w+(?: \w+)?(?:\*\*|__|`)?\s*:",
    re.IGNORECASE,
)
_ASKS_FOR_TURNS = re.compile(
    r"\b(?:dialog(?:ue)?s?|conversations?|chats?|chatbots?|scripts?|screenplay|transcripts?|role-?play\w*|interviews?|skits?"
    r"|few-shot|prompts?|play|scene|talk(?:ing|s)? (?:to|with))\b",
    re.IGNORECASE,
)
_LONGEST_UNIT = 600  # characters of a phrase that is looked for as repeated
_FEWEST_REPEATS = 4
_SHORTEST_RUN = 100  # characters of repeated phrases: a line of a song is no loop
_FEWEST_LETTERS = 60  # of a text whose language is asked for
_SURE = 0.9  # of a language, as a probability


@dataclass(frozen=True)
class Candidate:
    """One completion of a record, as the rules see it."""

    text: str
    finish_reason: str  # stop or length
    control_token: str | None = None  # a control token in the midst of the reply, which the text does not show


def refusal(
    candidate: Candidate, record: Record, sampling: SamplingConfig, logged: str | None = "rejected"
) -> str | None:
    """Why a completion cannot be in a pair, by the first rule that refuses it; None when it can.

    Args:
      logged: the side of the pair that the logged reply is, with which a completion is compared; None: neither.

    Raises:
      ConfigError: `sampling.same_language` needs a library that is not installed.
    """
    for reason, rule in RULES.items():
        compares = reason in _AGAINST_CHOSEN
        if not (compares and logged is None) and rule(candidate, record, sampling):
            return _AGAINST_CHOSEN[reason] if compares and logged == "chosen" else reason
    return None


def alike(text: str, other: str, sampling: SamplingConfig) -> bool:
    """Whether two completions are equal, or more alike than `sampling.max_similarity`."""
    most = sampling.max_similarity
    return _flat(text) == _flat(other) or (most < 1 and similarity(text, other) > most)


def similarity(a: str, b: str) -> float:
    """1 for equal texts, 0 for texts without a character in common; white space counts as one space.

    It is 1 - (insertions and deletions from one to the other) / (length of both), `fuzz.ratio` of rapidfuzz.
    """
    return fuzz.ratio(_flat(a), _flat(b)) / 100


def repetition(text: str, of_signs: bool = True) -> float:
    """The largest share of a text that one phrase takes, written four times or more in a row, 100 characters or more.

    A phrase may have any length up to 600 characters. White space counts as one space. Exact: for each length p of a
    phrase, a run of characters equal to those p before them is a phrase repeated.

    Args:
      of_signs: whether a phrase without a letter counts, such as digits or lines.
    """
    flat = _flat(text)
    codes = np.array([ord(char) for char in flat], np.int32)
    longest = 0
    for period in range(1, min(_LONGEST_UNIT, len(codes) // _FEWEST_REPEATS) + 1):
        least = max(_SHORTEST_RUN, _FEWEST_REPEATS * period, longest + 1) - period
        equal = codes[period:] == codes[:-period]
        if np.count_nonzero(equal) < least:
            continue
        breaks = np.concatenate([[-1], np.flatnonzero(~equal), [len(equal)]])
        runs = np.diff(breaks) - 1
        for i in np.flatnonzero(runs >= least):
            start = breaks[i] + 1
            if of_signs or any(char.isalpha() for char in flat[start : start + period]):
                longest = max(longest, int(runs[i]) + period)
    return longest / max(1, len(flat))


def speaks_for_another(text: str, record: Record) -> bool:
    """Whether a reply goes on with the turn of another speaker.

    That is a line that opens with `User:` or `Human:`, with `Assistant:` after the first line, or with a marker of a
    chat format. Not counted are fenced code, lists of other labels around it (`Admin: ...` before `User: ...`), and
    dialogues with a user who wrote of such turns, or of a dialogue, script, prompt or the like.
    """
    said = _FENCE.sub("\n", text)
    asked = [m.content for m in record.prompt if m.role == "user"] + [record.user_preference]
    if _MARKER.search(said) and not any(_MARKER.search(message) or "<|" in message for message in asked):
        return True
    lines = [line for line in said.split("\n") if line.strip()]
    turns = [i for i, line in enumerate(lines) if _is_turn(line, i)]
    if not turns or any(_LABEL.search(m) or _ASKS_FOR_TURNS.search(m) for m in asked):
        return False
    return not all(_in_list_of_labels(lines, i) for i in turns)


def _is_turn(line: str, index: int) -> bool:
    found = _LABEL.match(line)
    return found is not None and (index > 0 or found[1].lower() != "assistant")


def _in_list_of_labels(lines: list[str], index: int) -> bool:
    before, after = lines[max(0, index - 1) : index], lines[index + 1 : index + 2]
    return any(_OTHER_LABEL.match(line) for line in before + after) and not any(map(_LABEL.match, after))


def speaks_another_language(text: str, record: Record) -> bool:
    """Whether reply and the user's last messages are long enough to tell their languages, and these differ."""
    reply = language_of(_FENCE.sub("\n", text))
    asked = language_of(_FENCE.sub("\n", f"{record.prompt[-1].content}\n{record.user_preference}"))
    return reply is not None and asked is not None and reply != asked


def language_of(text: str) -> str | None:
    """ISO 639-1 code; None where the text is too short or mixed to say.

    Raises:
      ConfigError: py3langid is not installed.
    """
    if sum(char.isalpha() for char in text) < _FEWEST_LETTERS:
        return None
    code, probability = _language_identifier().classify(text)
    return code if probability >= _SURE else None


@lru_cache(maxsize=1)
def _language_identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "to tell languages (sampling.same_language, hygiene.languages) py3langid is needed: pip install "
            "'drift-jax[language]', or leave the key out."
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_rules(sampling: SamplingConfig) -> None:
    """Raises `ConfigError` before any work where a rule needs what is not installed."""
    if sampling.same_language:
        _language_identifier()


def _flat(text: str) -> str:
    return " ".join(text.split())


# --- the rules ----------------------------------------------------------------------------------------------


def _is_empty(candidate: Candidate, record: Record, sampling: SamplingConfig) -> bool:
    return not any(char.isprintable() and not char.isspace() for char in candidate.text)


def _is_same(candidate: Candidate, record: Record, sampling: SamplingConfig) -> bool:
    return _flat(candidate.text) == _flat(logged_reply(record))


def _is_near(candidate: Candidate, record: Record, sampling: SamplingConfig) -> bool:
    most = sampling.max_similarity
    return most < 1 and similarity(candidate.text, logged_reply(record)) > most


def _repeats(candidate: Candidate, record: Record, sampling: SamplingConfig) -> bool:
    # Of a reply that ends by itself, rows of digits or signs may be meant: an identity matrix is one.
    of_signs = candidate.finish_reason == "length"
    return sampling.max_repetition < 1 and repetition(candidate.text, of_signs) > sampling.max_repetition


def _speaks(candidate: Candidate, record: Record, sampling: SamplingConfig) -> bool:
    if sampling.other_speakers == "keep":
        return False
    return candidate.control_token is not None or speaks_for_another(candidate.text, record)


def _is_cut(candidate: Candidate, record: Record, sampling: SamplingConfig) -> bool:
    return sampling.on_cut != "keep" and candidate.finish_reason == "length"


def _is_foreign(candidate: Candidate, record: Record, sampling: SamplingConfig) -> bool:
    return sampling.same_language and speaks_another_language(candidate.text, record)


def _only_thinks(candidate: Candidate, record: Record, sampling: SamplingConfig) -> bool:
    """A thought that ran into the limit has no reply; the logged side of the pair has one, and no thought."""
    return candidate.text.lstrip().startswith("<think>") and "</think>" not in candidate.text


Rule = Callable[[Candidate, Record, SamplingConfig], bool]

# In this order: a loop that ran into the limit counts as a loop, not as a cut.
RULES: Mapping[str, Rule] = {
    EMPTY: _is_empty,
    SAME: _is_same,
    NEAR: _is_near,
    REPEATS: _repeats,
    SPEAKER: _speaks,
    THOUGHT: _only_thinks,
    CUT: _is_cut,
    LANGUAGE: _is_foreign,
}
