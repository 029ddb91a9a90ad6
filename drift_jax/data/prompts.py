"""The prompt by which the policy's reply to a logged record is sampled, in four styles.

    chat      the dialogue, the logged reply, the complaint and the request to improve, through the model's
              own chat template: what an instruction-tuned model was trained to read
    complaint the same without the request: small models answer that request ("Here is a revised version ...") where
              they should answer the user
    paper     the authors' plain text, character by character (github.com/cacayaya/DRIFT, sampling script)
    unguided  the dialogue alone, through the chat template; the only one for SAT records

Whatever the style, the pair keeps the original prompt: DPO trains on the dialogue without the complaint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.errors import DataError
from drift_jax.methods import UNGUIDED, Record
from drift_jax.records import DsatRecord, Message

IMPROVE_INSTRUCTION = (
    "Based on the user's latest feedback, please provide an improved response that addresses their concerns."
)


@dataclass(frozen=True, eq=False)
class SamplingPrompt:
    """Token ids to continue, and how many tokens were cut from their front."""

    ids: Int32[np.ndarray, " T"]
    cut_tokens: int


def build_sampling_prompt(
    record: Record, style: str, tokenizer: ChatTokenizer, max_input_length: int
) -> SamplingPrompt:
    """Token ids of the sampling prompt, at most `max_input_length` of them.

    A longer prompt keeps its END: the complaint and the cue to answer stand there, and without them the model
    would continue some earlier turn. (The authors' script cut the end.) With a chat template the cut drops
    the opening of the dialogue, its system message included.

    Args:
      style: a key of `PROMPT_STYLES`.

    Raises:
      DataError: the chat template or the tokenizer refuses the record; names its id.
    """
    try:
        ids = PROMPT_STYLES[style](record, tokenizer)
    except DataError as error:
        kind = "DSAT" if isinstance(record, DsatRecord) else "SAT"
        raise DataError(f"{kind} record {record.id}: {error}") from error
    cut = max(0, len(ids) - max_input_length)
    return SamplingPrompt(np.asarray(ids[cut:], np.int32), cut)


def paper_prompt_text(record: DsatRecord) -> str:
    """The plain text that the authors' sampling script builds; a system message stands before the turns."""
    opening = "".join(f"{m.content}\n\n" for m in record.prompt if m.role == "system")
    turns = "".join(f"{m.role.capitalize()}: {m.content}\n" for m in record.prompt if m.role != "system")
    return (
        f"{opening}{turns}"
        f"Assistant: {record.rejected}\n"
        f"User: {record.user_preference}\n"
        f"System: {IMPROVE_INSTRUCTION}\n"
        "Assistant: "
    )


def _chat(record: DsatRecord, tokenizer: ChatTokenizer) -> list[int]:
    # The instruction is part of the user's turn: many templates refuse a system message that is not first.
    return _after_reply(record, f"{record.user_preference}\n\n{IMPROVE_INSTRUCTION}", tokenizer)


def _complaint(record: DsatRecord, tokenizer: ChatTokenizer) -> list[int]:
    return _after_reply(record, record.user_preference, tokenizer)


def _after_reply(record: DsatRecord, said: str, tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.encode_chat([*record.prompt, Message("assistant", record.rejected), Message("user", said)])


def _paper(record: DsatRecord, tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.encode_text(paper_prompt_text(record))


def _unguided(record: Record, tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.encode_chat(record.prompt)


PROMPT_STYLES: dict[str, Callable[[Any, ChatTokenizer], list[int]]] = {
    "chat": _chat,
    "complaint": _complaint,
    "paper": _paper,
    UNGUIDED: _unguided,
}
