"""How pairs become ids, as named objects: templates, ends of completions, cuts. `presets.CHOICES` says what each does.

Where the stacks that are imitated here are left on purpose:

1. A control token spelled out in a message stays text under every template. (TRL encodes rendered text, so that
   `<|im_end|>` in a message ends a turn.)
2. A pair whose prompt and completion cannot be told apart exactly, token by token, is refused with its id. (TRL up
   to 0.11 moves the boundary by one token, TRL 1.x to the first token that differs, with a warning.)
3. No BOS is added: Qwen's tokenizers have none. (TRL up to 0.11 adds one where the tokenizer has it.)

Sources: numbers as in alignment-handbook `src/alignment/data.py`; TRL v0.11.4, v0.12.2 and v1.16
`trl/trainer/dpo_trainer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from drift_jax.config import DataConfig
from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.errors import DataError
from drift_jax.records import Message, Pair

Ids = list[int]


@dataclass(frozen=True)
class PairIds:
    """A pair as ids: before a cut, or after it."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


@dataclass(frozen=True)
class Template:
    """How the text of a pair becomes ids; what follows the reply in the rendered dialogue is still there."""

    encode_prompt: Callable[[Sequence[Message], ChatTokenizer], Ids]
    encode_chosen: Callable[[Pair, ChatTokenizer], Ids]
    encode_rejected: Callable[[Pair, ChatTokenizer], Ids]


# (ids of a completion, tokenizer) -> ids with the end that the stack gives them
EndRule = Callable[[Ids, ChatTokenizer], Ids]
# (prompt lengths, completion lengths before any cut, max_length) of one group -> which rows lose their last token
GroupCut = Callable[[Int[np.ndarray, " G"], Int[np.ndarray, "G 2"], int], Bool[np.ndarray, "G 2"]]


@dataclass(frozen=True)
class Truncation:
    """What is cut from a pair, and what from a pair because of its neighbours in the batch."""

    cut: Callable[[PairIds, int, int], PairIds]  # (pair, max_prompt_length, max_length); may empty a completion
    group_cut: GroupCut | None = None


@dataclass(frozen=True)
class PairRules:
    """A way to turn pairs into ids."""

    template: Template
    end: EndRule
    truncation: Truncation


def build_rules(data: DataConfig) -> PairRules:
    """The objects that the config names."""
    return PairRules(TEMPLATES[data.template], END_RULES[data.eos], TRUNCATIONS[data.truncation])


# --- templates ----------------------------------------------------------------------------------------------


def _prompt_up_to_reply(prompt: Sequence[Message], tokenizer: ChatTokenizer) -> Ids:
    return tokenizer.encode_chat(prompt, add_generation_prompt=True)


def _as_sampled(ids_key: str, finish_key: str, reply: str, pair: Pair, tokenizer: ChatTokenizer) -> Ids:
    """The ids in `meta` where the reply was sampled, else those of its text."""
    ids = pair.meta.get(ids_key)
    if ids is None:
        return tokenizer.encode_reply(pair.prompt, reply)
    _check_sampled(ids_key, ids, finish_key, pair.meta.get(finish_key), tokenizer)
    return list(ids)


def _chosen_as_sampled(pair: Pair, tokenizer: ChatTokenizer) -> Ids:
    return _as_sampled("chosen_token_ids", "finish_reason", pair.chosen, pair, tokenizer)


def _rejected_as_sampled(pair: Pair, tokenizer: ChatTokenizer) -> Ids:
    return _as_sampled("rejected_token_ids", "rejected_finish_reason", pair.rejected, pair, tokenizer)


def _check_sampled(ids_key: str, ids: Any, finish_key: str, finish_reason: Any, tokenizer: ChatTokenizer) -> None:
    if not isinstance(ids, (list, tuple)) or not all(type(i) is int for i in ids):
        raise DataError(f"meta.{ids_key} must be a list of token ids, found {ids!r:.80}.")
    foreign = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
    if foreign:
        raise DataError(
            f"meta.{ids_key} holds {foreign[0]}, the tokenizer has ids below {tokenizer.vocab_size}: "
            f"the pair was sampled with another model. Sample again, or remove meta.{ids_key}."
        )
    if finish_reason == "stop" and ids and ids[-1] not in tokenizer.eos_ids:
        raise DataError(
            f"meta.{finish_key} is 'stop', but meta.{ids_key} ends with {ids[-1]}, which is none of "
            f"the EOS ids {tokenizer.eos_ids}: the sampler must keep the id that it stopped at."
        )


def _handbook_prompt(prompt: Sequence[Message], tokenizer: ChatTokenizer) -> Ids:
    opening = prompt[0].role == "system" or not tokenizer.knows_system
    messages = prompt if opening else [Message("system", ""), *prompt]
    return tokenizer.encode_chat(messages, add_generation_prompt=False)


def _handbook_reply(reply: str, prompt: Sequence[Message], tokenizer: ChatTokenizer) -> Ids:
    ids = tokenizer.encode_chat([Message("assistant", reply)], add_generation_prompt=False)
    if ids[:1] and ids[0] not in tokenizer.control_ids:
        raise DataError(
            "the chat template does not open a turn with a control token, so that the last token of the prompt and "
            "the first of the reply may merge: the handbook's template is computed for ChatML-like templates only."
        )
    return ids


def _after_prompt(reply: str, prompt: Sequence[Message], tokenizer: ChatTokenizer) -> Ids:
    before = tokenizer.encode_chat(prompt, add_generation_prompt=True)
    whole = tokenizer.encode_chat([*prompt, Message("assistant", reply)], add_generation_prompt=False)
    if whole[: len(before)] != before:
        at = next(i for i, (a, b) in enumerate(zip(before, [*whole, -1], strict=False)) if a != b)
        raise DataError(
            f"the ids of the prompt are not the beginning of those of prompt and reply: they differ at token {at} of "
            f"{len(before)}, {tokenizer.decode(before[at : at + 4], skip_special=False)!r} became "
            f"{tokenizer.decode(whole[at : at + 4], skip_special=False)!r}. Strip the reply, or use data.template "
            "generation_prompt, which encodes the reply for itself."
        )
    return whole[len(before) :]


def _each_side(encode: Callable[[str, Sequence[Message], ChatTokenizer], Ids]) -> dict[str, Any]:
    return {
        "encode_chosen": lambda pair, tokenizer: encode(pair.chosen, pair.prompt, tokenizer),
        "encode_rejected": lambda pair, tokenizer: encode(pair.rejected, pair.prompt, tokenizer),
    }


TEMPLATES: Mapping[str, Template] = {
    "generation_prompt": Template(
        _prompt_up_to_reply,
        _chosen_as_sampled,
        _rejected_as_sampled,
    ),
    "reply_text": Template(
        _prompt_up_to_reply,
        **_each_side(lambda reply, prompt, tokenizer: tokenizer.encode_reply(prompt, reply)),
    ),
    "handbook": Template(_handbook_prompt, **_each_side(_handbook_reply)),
    "full_render": Template(_prompt_up_to_reply, **_each_side(_after_prompt)),
}


# --- ends of completions ------------------------------------------------------------------------------------


def _up_to_turn_end(ids: Ids, tokenizer: ChatTokenizer) -> Ids:
    """A completion that its sampler cut by length has no turn end, and gets none: it must not learn to stop there."""
    return ids[: ids.index(tokenizer.turn_end_id) + 1] if tokenizer.turn_end_id in ids else ids


def _with_eos(ids: Ids, tokenizer: ChatTokenizer) -> Ids:
    return [*ids, tokenizer.eos_token_id]


def _with_eos_if_missing(ids: Ids, tokenizer: ChatTokenizer) -> Ids:
    return ids if ids and ids[-1] == tokenizer.eos_token_id else _with_eos(ids, tokenizer)


END_RULES: Mapping[str, EndRule] = {
    "turn_end": _up_to_turn_end,
    "append_if_missing": _with_eos_if_missing,
    "append": _with_eos,
    "as_rendered": lambda ids, tokenizer: ids,
}


# --- cuts ---------------------------------------------------------------------------------------------------


def _check_room(max_prompt_length: int, max_length: int) -> None:
    if not 0 < max_prompt_length < max_length:
        raise ValueError(f"need 0 < max_prompt_length < max_length, got {max_prompt_length} and {max_length}")


def keep_prompt_end(pair: PairIds, max_prompt_length: int, max_length: int) -> PairIds:
    """Cuts the prompt's front always, then the end of each completion for itself."""
    _check_room(max_prompt_length, max_length)
    prompt = pair.prompt[-max_prompt_length:]
    room = max_length - len(prompt)
    return PairIds(prompt, pair.chosen[:room], pair.rejected[:room])


def _cut_when_too_long(cut_prompt: Callable[[Ids, int], Ids]) -> Callable[[PairIds, int, int], PairIds]:
    def cut(pair: PairIds, max_prompt_length: int, max_length: int) -> PairIds:
        _check_room(max_prompt_length, max_length)
        longer = max(len(pair.chosen), len(pair.rejected))
        if len(pair.prompt) + longer <= max_length:
            return pair
        prompt = cut_prompt(pair.prompt, max_prompt_length)
        if len(prompt) + longer <= max_length:
            return PairIds(prompt, pair.chosen, pair.rejected)
        room = max_length - max_prompt_length  # also where the prompt is shorter than max_prompt_length
        return PairIds(prompt, pair.chosen[:room], pair.rejected[:room])

    return cut


def keep_start(pair: PairIds, max_prompt_length: int, max_length: int) -> PairIds:
    """Cuts the end of prompt + completion; of a pair whose prompt is that long no completion is left."""
    del max_prompt_length  # no such limit since TRL 0.29
    prompt = pair.prompt[:max_length]
    room = max_length - len(prompt)
    return PairIds(prompt, pair.chosen[:room], pair.rejected[:room])


def drop_last_of_longest(
    prompt_lengths: Int[np.ndarray, " G"], completion_lengths: Int[np.ndarray, "G 2"], max_length: int
) -> Bool[np.ndarray, "G 2"]:
    """TRL 0.12.0 to 0.12.2: rows are shifted left, then cut one column before the first that is all padding.

    Such a column exists unless the longest prompt and the longest completion meet in one row. The column that is
    lost holds the last token of the longest rows; a later cut to `max_length` hides it.
    """
    rows = prompt_lengths[:, None] + completion_lengths
    longest, width = rows.max(), prompt_lengths.max() + completion_lengths.max()
    return (rows == longest) & (longest < width) & (longest <= max_length)


# TRL 0.12 cuts prompts first and rows when a batch is made; the order makes no difference to the tokens that stay.
TRUNCATIONS: Mapping[str, Truncation] = {
    "keep_prompt_end": Truncation(keep_prompt_end),
    "trl<=0.11": Truncation(_cut_when_too_long(lambda prompt, length: prompt[-length:])),
    "trl<=0.11 keep_start": Truncation(_cut_when_too_long(lambda prompt, length: prompt[:length])),
    "trl0.12": Truncation(keep_prompt_end),
    "trl0.12.0-0.12.2": Truncation(keep_prompt_end, drop_last_of_longest),
    "keep_start": Truncation(keep_start),
}

DRIFT_RULES = build_rules(DataConfig())
