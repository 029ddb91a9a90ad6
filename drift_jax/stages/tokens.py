"""Pairs of a file as ids for one stage: what was cut, what was left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drift_jax.config import RunConfig
from drift_jax.data.pairs import TokenizedPair, TruncationCounts, count_truncation, tokenize_pair
from drift_jax.data.rules import build_rules
from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.errors import DataError
from drift_jax.guards import emptied_warning
from drift_jax.records import read_pairs
from drift_jax.stages.inputs import report_refused


@dataclass(frozen=True)
class TokenizedFile:
    """The pairs to train or evaluate on, and what became of the others."""

    pairs: list[TokenizedPair]
    cuts: TruncationCounts  # over all pairs, those in `emptied` included
    refused: tuple[str, ...] = ()  # pairs that no ids could be made of (with --on-bad-row skip)
    emptied: tuple[str, ...] = ()  # ids of pairs of which a cut left no completion token on one side

    @property
    def drops(self) -> dict[str, int]:
        return {"not encodable": len(self.refused), "completion cut away": len(self.emptied)}

    def warning(self, what: str) -> str | None:
        """A line for the user when completions were cut away."""
        return emptied_warning(self.emptied, len(self.pairs) + len(self.emptied), what)


def load_tokenized(config: RunConfig, path: Path | None, tokenizer: ChatTokenizer) -> TokenizedFile:
    """Reads pairs and makes ids of them by the rules that the config names; no path: no pairs.

    A pair of which a completion was cut away entirely is left out, as TRL does since 0.29: no token of it could be
    learnt, yet it would count in the mean.

    Raises:
      DataError: pairs cannot be encoded, and bad rows are not to be skipped.
    """
    if path is None:
        return TokenizedFile([], TruncationCounts())
    data, rules = config.data, build_rules(config.data)
    tokenized, refused = [], []
    for pair in read_pairs(path, data.on_bad_row).records:
        try:
            tokenized.append(tokenize_pair(pair, tokenizer, data.max_prompt_length, data.max_length, rules))
        except DataError as error:
            refused.append(str(error))
    report_refused(refused, config)
    kept = [pair for pair in tokenized if not pair.emptied]
    emptied = tuple(pair.id for pair in tokenized if pair.emptied)
    return TokenizedFile(kept, count_truncation(tokenized), tuple(refused), emptied)


def describe_rules(config: RunConfig) -> str:
    """How pairs become tokens and losses, in one line."""
    data, train, model = config.data, config.train, config.model
    return (
        f"preset {config.preset}: template {data.template}, end {data.eos}, cut {data.truncation}, NLL "
        f"{train.nll_reduction} over {train.nll_tokens} tokens (groups of {train.group_size}), "
        f"pad embedding {model.pad_embedding}"
    )


def describe_cuts(train: TokenizedFile, test: TokenizedFile) -> str:
    """How many pairs there are and what was cut from those to train on, in one line."""
    cuts = train.cuts
    parts = [
        f"{count} {name} ({tokens} tokens)"
        for name, count, tokens in (
            ("prompts", cuts.prompts_cut, cuts.prompt_tokens_cut),
            ("chosen", cuts.chosen_cut, cuts.chosen_tokens_cut),
            ("rejected", cuts.rejected_cut, cuts.rejected_tokens_cut),
        )
        if count
    ]
    return f"{len(train.pairs)} pairs, {len(test.pairs)} held out; cut to fit: {', '.join(parts) or 'nothing'}"


def sum_drops(files: Sequence[TokenizedFile]) -> dict[str, int]:
    """What was left out of several files, by reason."""
    return {reason: sum(file.drops[reason] for file in files) for reason in files[0].drops}
