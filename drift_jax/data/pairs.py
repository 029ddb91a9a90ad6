"""Pairs -> token ids: one prompt, two completions, cut to the token budgets, every cut counted.

How text becomes ids, how a completion ends and what is cut are objects that `data/rules.py` names; the config
chooses them (`drift presets` prints what each does). By default:

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

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from drift_jax.data.rules import DRIFT_RULES, PairIds, PairRules
from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.errors import DataError
from drift_jax.records import Pair


@dataclass(frozen=True, eq=False)
class TokenizedPair:
    """A pair as ids after cutting, with the number of tokens that were cut."""

    id: str
    prompt_ids: Int32[np.ndarray, " P"]
    chosen_ids: Int32[np.ndarray, " C"]
    rejected_ids: Int32[np.ndarray, " R"]
    prompt_tokens_cut: int = 0
    chosen_tokens_cut: int = 0
    rejected_tokens_cut: int = 0

    @property
    def completion_lengths(self) -> tuple[int, int]:
        """Tokens of both completions before any cut."""
        return (
            len(self.chosen_ids) + self.chosen_tokens_cut,
            len(self.rejected_ids) + self.rejected_tokens_cut,
        )

    @property
    def emptied(self) -> bool:
        """Whether a completion was cut away entirely: nothing can be learnt from such a pair."""
        return not (len(self.chosen_ids) and len(self.rejected_ids))


@dataclass(frozen=True)
class TruncationCounts:
    """What cutting took away, over all pairs: how many were touched, and the tokens lost.

    `completions_emptied` counts completions of which nothing is left; only `keep_start` leaves such.
    """

    prompts_cut: int = 0
    prompt_tokens_cut: int = 0
    chosen_cut: int = 0
    chosen_tokens_cut: int = 0
    rejected_cut: int = 0
    rejected_tokens_cut: int = 0
    completions_emptied: int = 0


def tokenize_pair(
    pair: Pair,
    tokenizer: ChatTokenizer,
    max_prompt_length: int,
    max_length: int,
    rules: PairRules = DRIFT_RULES,
) -> TokenizedPair:
    """Ids of a pair, cut to `max_prompt_length` tokens of prompt and `max_length` of prompt and completion.

    Raises:
      DataError: naming the pair's id: prompt and reply cannot be told apart, the ids of a sampled reply in `meta`
        are not of this tokenizer or contradict its finish reason, or a prompt or completion has no token.
    """
    try:
        prompt = rules.template.encode_prompt(pair.prompt, tokenizer)
        chosen = rules.template.encode_chosen(pair, tokenizer)
        rejected = rules.template.encode_rejected(pair, tokenizer)
        for name, part in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            if not part:
                raise DataError(f"{name} has no token.")
        whole = PairIds(prompt, rules.end(chosen, tokenizer), rules.end(rejected, tokenizer))
    except DataError as error:
        raise DataError(f"pair {pair.id}: {error}") from error
    cut = rules.truncation.cut(whole, max_prompt_length, max_length)
    return TokenizedPair(
        pair.id,
        *(np.asarray(ids, np.int32) for ids in (cut.prompt, cut.chosen, cut.rejected)),
        prompt_tokens_cut=len(whole.prompt) - len(cut.prompt),
        chosen_tokens_cut=len(whole.chosen) - len(cut.chosen),
        rejected_tokens_cut=len(whole.rejected) - len(cut.rejected),
    )


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
