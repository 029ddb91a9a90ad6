"""Pairs -> token ids: one prompt, two completions, cut to the token budgets, every cut counted.

How a prompt and a completion become ids, and what is cut, are functions that a `PairRules` names together;
another set of rules is another such object.

`DRIFT_RULES`, and where they depart from the stacks the paper's configs ran on (TRL 0.9 to 0.28):

1. The prompt ends with the header of the assistant's turn, and the completion begins with the reply, as when
   sampling. (alignment-handbook put the header into the completion, TRL 0.12 split rendered text.)
2. A completion ends with one turn end id; what the template writes after it is left out. (TRL appended an EOS
   to the rendered turn, two tokens no sampler produces.) A completion that the sampler or `max_length` cut
   has no turn end: the policy must not learn to stop there.
3. Ids of a sampled completion are used as they came from the sampler, never encoded a second time.
4. A prompt keeps its END within `max_prompt_length`, also when the whole pair would fit. (TRL up to 0.11 cut
   only when it would not.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.errors import DataError
from drift_jax.records import Message, Pair


@dataclass(frozen=True, eq=False)
class TokenizedPair:
    """A pair as ids after cutting; the tokens cut are from the prompt's front and the completions' ends."""

    id: str
    prompt_ids: Int32[np.ndarray, " P"]
    chosen_ids: Int32[np.ndarray, " C"]
    rejected_ids: Int32[np.ndarray, " R"]
    prompt_tokens_cut: int = 0
    chosen_tokens_cut: int = 0
    rejected_tokens_cut: int = 0


@dataclass(frozen=True)
class TruncationCounts:
    """What cutting took away, over all pairs: how many were touched, and the tokens lost.

    `completions_emptied` counts completions of which nothing is left. Under `DRIFT_RULES` it stays 0, since
    max_prompt_length < max_length leaves room for a token.
    """

    prompts_cut: int = 0
    prompt_tokens_cut: int = 0
    chosen_cut: int = 0
    chosen_tokens_cut: int = 0
    rejected_cut: int = 0
    rejected_tokens_cut: int = 0
    completions_emptied: int = 0


@dataclass(frozen=True)
class PairRules:
    """A way to turn pairs into ids."""

    encode_prompt: Callable[[Sequence[Message], ChatTokenizer], list[int]]
    encode_chosen: Callable[[Pair, ChatTokenizer], list[int]]
    encode_rejected: Callable[[Pair, ChatTokenizer], list[int]]
    # (pair before cutting, max_prompt_length, max_length) -> pair within the budgets
    truncate: Callable[[TokenizedPair, int, int], TokenizedPair]


def tokenize_pairs(
    pairs: Iterable[Pair],
    tokenizer: ChatTokenizer,
    max_prompt_length: int,
    max_length: int,
    rules: PairRules | None = None,
) -> tuple[list[TokenizedPair], TruncationCounts]:
    """`tokenize_pair` for every pair, in their order, and what the cuts took away."""
    tokenized = [tokenize_pair(pair, tokenizer, max_prompt_length, max_length, rules) for pair in pairs]
    return tokenized, count_truncation(tokenized)


def tokenize_pair(
    pair: Pair,
    tokenizer: ChatTokenizer,
    max_prompt_length: int,
    max_length: int,
    rules: PairRules | None = None,
) -> TokenizedPair:
    """Ids of a pair, cut to `max_prompt_length` tokens of prompt and `max_length` of prompt and completion.

    Args:
      rules: None: `DRIFT_RULES`.

    Raises:
      DataError: naming the pair's id: the template cannot tell prompt from reply, `meta.chosen_token_ids` are
        not ids of this tokenizer or contradict `meta.finish_reason`, or a prompt or completion has no token.
    """
    if not 0 < max_prompt_length < max_length:
        raise ValueError(f"need 0 < max_prompt_length < max_length, got {max_prompt_length} and {max_length}")
    rules = rules or DRIFT_RULES
    try:
        ids = (
            rules.encode_prompt(pair.prompt, tokenizer),
            rules.encode_chosen(pair, tokenizer),
            rules.encode_rejected(pair, tokenizer),
        )
        for name, part in zip(("prompt", "chosen", "rejected"), ids, strict=True):
            if not part:
                raise DataError(f"{name} has no token.")
    except DataError as error:
        raise DataError(f"pair {pair.id}: {error}") from error
    prompt, chosen, rejected = (np.asarray(part, np.int32) for part in ids)
    whole = TokenizedPair(pair.id, prompt, chosen, rejected)
    return rules.truncate(whole, max_prompt_length, max_length)


def count_truncation(pairs: Iterable[TokenizedPair]) -> TruncationCounts:
    """Sums the cuts of tokenised pairs."""
    pairs = list(pairs)
    prompt, chosen, rejected = (
        [getattr(pair, f"{part}_tokens_cut") for pair in pairs] for part in ("prompt", "chosen", "rejected")
    )
    return TruncationCounts(
        prompts_cut=sum(cut > 0 for cut in prompt),
        prompt_tokens_cut=sum(prompt),
        chosen_cut=sum(cut > 0 for cut in chosen),
        chosen_tokens_cut=sum(chosen),
        rejected_cut=sum(cut > 0 for cut in rejected),
        rejected_tokens_cut=sum(rejected),
        completions_emptied=sum((len(p.chosen_ids) == 0) + (len(p.rejected_ids) == 0) for p in pairs),
    )


def keep_prompt_end(pair: TokenizedPair, max_prompt_length: int, max_length: int) -> TokenizedPair:
    """Cuts the prompt's front always, then the end of each completion for itself."""
    prompt = pair.prompt_ids[-max_prompt_length:]
    room = max_length - len(prompt)
    return TokenizedPair(
        pair.id,
        prompt,
        pair.chosen_ids[:room],
        pair.rejected_ids[:room],
        prompt_tokens_cut=len(pair.prompt_ids) - len(prompt),
        chosen_tokens_cut=max(0, len(pair.chosen_ids) - room),
        rejected_tokens_cut=max(0, len(pair.rejected_ids) - room),
    )


def _prompt_up_to_reply(prompt: Sequence[Message], tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.encode_chat(prompt, add_generation_prompt=True)


def _chosen_as_sampled(pair: Pair, tokenizer: ChatTokenizer) -> list[int]:
    ids = pair.meta.get("chosen_token_ids")
    if ids is None:
        return tokenizer.encode_completion(pair.prompt, pair.chosen)
    _check_sampled(ids, pair.meta.get("finish_reason"), tokenizer)
    return list(ids)


def _rejected_from_text(pair: Pair, tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.encode_completion(pair.prompt, pair.rejected)


def _check_sampled(ids: Any, finish_reason: Any, tokenizer: ChatTokenizer) -> None:
    if not isinstance(ids, (list, tuple)) or not all(type(i) is int for i in ids):
        raise DataError(f"meta.chosen_token_ids must be a list of token ids, found {ids!r:.80}.")
    foreign = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
    if foreign:
        raise DataError(
            f"meta.chosen_token_ids holds {foreign[0]}, the tokenizer has ids below {tokenizer.vocab_size}: "
            "the pair was sampled with another model. Sample again, or remove meta.chosen_token_ids."
        )
    if finish_reason == "stop" and ids and ids[-1] not in tokenizer.eos_ids:
        raise DataError(
            f"meta.finish_reason is 'stop', but meta.chosen_token_ids ends with {ids[-1]}, which is none of "
            f"the EOS ids {tokenizer.eos_ids}: the sampler must keep the id that it stopped at."
        )


DRIFT_RULES = PairRules(
    encode_prompt=_prompt_up_to_reply,
    encode_chosen=_chosen_as_sampled,
    encode_rejected=_rejected_from_text,
    truncate=keep_prompt_end,
)
