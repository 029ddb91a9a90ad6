"""Pairs of a file as ids for one stage: what was cut, what was left out and why."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.data.pairs import TokenizedPair, TruncationCounts, count_truncation, tokenize_pair
from drift_jax.data.rules import build_rules
from drift_jax.data.token_cache import (
    FORMAT,
    TokenizedRows,
    cache_path,
    read_tokens,
    rows_from_bytes,
    rows_to_bytes,
    write_tokens,
)
from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.distributed import gather, gather_packed, on_each, on_main, send
from drift_jax.errors import DataError
from drift_jax.guards import emptied_warning
from drift_jax.manifest import config_slice
from drift_jax.progress import stage_progress
from drift_jax.records import Pair, count_rows, read_pair_share, settle_rows
from drift_jax.stages.inputs import report_refused

# What of the config shapes the tokens of a file of pairs.
TOKEN_KEYS = (
    "data.max_length",
    "data.max_prompt_length",
    "data.template",
    "data.eos",
    "data.truncation",
    "data.on_bad_row",
)
_LIBRARIES = ("tokenizers", "transformers", "jinja2")  # they render templates and apply the tokenizer's rules
_WORTH_A_BAR = 1000  # pairs; fewer take about a second


@dataclass(frozen=True)
class TokenizedFile:
    """The pairs to train or evaluate on, and what became of the others."""

    pairs: list[TokenizedPair]
    cuts: TruncationCounts  # over all pairs, those in `emptied` included
    refused: tuple[str, ...] = ()  # pairs that no ids could be made of (with --on-bad-row skip)
    emptied: tuple[str, ...] = ()  # ids of pairs of which a cut left no completion token on one side
    bad_rows: int = 0  # rows that are no pairs (with --on-bad-row skip)

    @property
    def drops(self) -> dict[str, int]:
        return {
            "bad row": self.bad_rows,
            "not encodable": len(self.refused),
            "completion cut away": len(self.emptied),
        }

    def warning(self, what: str) -> str | None:
        """A line for the user when completions were cut away."""
        return emptied_warning(self.emptied, len(self.pairs) + len(self.emptied), what)

    def nothing_left(self, path: Path, purpose: str) -> DataError:
        """What to say where no pair is left."""
        why = ", ".join(f"{reason}: {count:,}" for reason, count in self.drops.items() if count)
        remedy = "Raise data.max_length, or mend the rows" if why else "The file has no rows: name another one"
        return DataError(f"{path}: no pair is left to {purpose}{f' ({why})' if why else ''}. {remedy}.")


def load_tokenized(
    config: RunConfig,
    path: Path | None,
    tokenizer: ChatTokenizer,
    cache_dir: Path | None = None,
    console: Console | None = None,
) -> TokenizedFile:
    """Reads pairs and makes ids of them by the rules that the config names; no path, or a file without rows: no pairs.

    A pair of which a completion was cut away entirely is left out, as TRL does since 0.29: no token of it could be
    learnt, yet it would count in the mean.

    Args:
      cache_dir: where the ids are kept for the next call with the same pairs, config and tokenizer; None: nowhere.

    Raises:
      DataError: pairs cannot be encoded, and bad rows are not to be skipped.
      StageError: `cache_dir` cannot be written.
    """
    if path is None:
        return TokenizedFile([], TruncationCounts())
    console = console or Console(emoji=False)
    if cache_dir is None:
        rows = _tokenize(config, path, tokenizer, console)
    else:
        rows = _tokenize_once(config, path, tokenizer, cache_dir, console)
    kept = [pair for pair in rows.pairs if not pair.emptied]
    emptied = tuple(pair.id for pair in rows.pairs if pair.emptied)
    bad_rows = 0
    if config.data.on_bad_row == "skip":  # counted from the file: the cache knows only rows that are pairs
        bad_rows = on_main(lambda: count_rows(path)) - len(rows.pairs) - len(rows.refused)
    return TokenizedFile(kept, count_truncation(rows.pairs), rows.refused, emptied, bad_rows)


def token_key(config: RunConfig, path: Path, tokenizer: ChatTokenizer) -> str:
    """sha256 of all that shapes the tokens of a file. Raises `DataError` when the file cannot be read."""
    try:
        with path.open("rb") as file:
            pairs = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error
    parts = {
        "format": FORMAT,
        "pairs": pairs,
        "config": config_slice(config, TOKEN_KEYS),
        "tokenizer": tokenizer.content_hash,
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenize_once(
    config: RunConfig, path: Path, tokenizer: ChatTokenizer, cache_dir: Path, console: Console
) -> TokenizedRows:
    key = on_main(lambda: token_key(config, path, tokenizer))
    cached = cache_path(cache_dir, path.stem, key)

    def read() -> TokenizedRows | None:
        try:
            return read_tokens(cached, key)
        except DataError as error:
            console.print(f"{error}; tokenising again", style="yellow", highlight=False, soft_wrap=True, markup=False)
            return None

    if (known := send(read, rows_to_bytes, rows_from_bytes)) is not None:
        return known
    rows = _tokenize(config, path, tokenizer, console)
    on_main(lambda: write_tokens(cached, key, rows))
    return rows


def _tokenize(config: RunConfig, path: Path, tokenizer: ChatTokenizer, console: Console) -> TokenizedRows:
    """Every process reads and tokenises its share of the rows; all of them then have all."""
    share = on_each(lambda: read_pair_share(path, jax.process_index(), jax.process_count()))
    if not share.total:  # a pair stage that holds nothing out writes such a file
        return TokenizedRows([], ())
    mine, refused = _tokenize_share(config, path, [pair for _, pair in share.records], tokenizer, console)
    lines = [line for line, _ in share.records]
    answers = gather({"lines": lines, "bad": share.bad, "refused": refused, "ids": [p.id for _, p in share.records]})
    ids = [pair for answer in answers for pair in zip(answer["lines"], answer["ids"], strict=True)]
    bad = [(line, why) for answer in answers for line, why in answer["bad"]]
    kept, _ = on_each(lambda: settle_rows(path, config.data.on_bad_row, ids, bad, share.total))
    shares = gather_packed(TokenizedRows(mine, ()), rows_to_bytes, rows_from_bytes)
    by_line, refusals = {}, []
    for answer, tokens in zip(answers, shares, strict=True):
        why = dict(answer["refused"])
        encoded = iter(tokens.pairs)
        for at, line in enumerate(answer["lines"]):
            if at in why:
                refusals += [(line, why[at])] if line in kept else []
            else:
                by_line[line] = next(encoded)
    messages = [message for _, message in sorted(refusals)]
    on_each(lambda: report_refused(messages, config))
    return TokenizedRows([by_line[line] for line in sorted(kept & by_line.keys())], tuple(messages))


def _tokenize_share(
    config: RunConfig, path: Path, records: Sequence[Pair], tokenizer: ChatTokenizer, console: Console
) -> tuple[list[TokenizedPair], list[tuple[int, str]]]:
    """Ids of pairs, and (position, reason) of those of which none could be made."""
    data, rules = config.data, build_rules(config.data)
    tokenized, refused = [], []
    shown = console if len(records) >= _WORTH_A_BAR else Console(quiet=True)
    with stage_progress(f"tokenising {path.name}", len(records), "pairs", console=shown) as bar:
        for at, pair in enumerate(records):
            try:
                tokenized.append(tokenize_pair(pair, tokenizer, data.max_prompt_length, data.max_length, rules))
            except DataError as error:
                refused.append((at, str(error)))
            bar.advance()
    return tokenized, refused


def describe_rules(config: RunConfig) -> str:
    """How pairs become tokens and losses, in one line."""
    data, train, model = config.data, config.train, config.model
    return (
        f"preset {config.preset}: template {data.template}, end {data.eos}, cut {data.truncation}, NLL "
        f"{train.nll_reduction} over {train.nll_tokens} tokens (groups of {train.group_size}), "
        f"pad embedding {model.pad_embedding}"
    )


def describe_cuts(train: TokenizedFile, test: TokenizedFile) -> str:
    """How many pairs there are and what was cut from them, in one line."""
    held_out = f"; of those held out: {_cuts_in_words(test.cuts)}" if test.pairs else ""
    counts = f"{len(train.pairs)} pairs, {len(test.pairs)} held out"
    return f"{counts}; cut to fit: {_cuts_in_words(train.cuts)}{held_out}"


def _cuts_in_words(cuts: TruncationCounts) -> str:
    parts = [
        f"{count} {name} ({tokens} tokens)"
        for name, count, tokens in (
            ("prompts", cuts.prompts_cut, cuts.prompt_tokens_cut),
            ("chosen", cuts.chosen_cut, cuts.chosen_tokens_cut),
            ("rejected", cuts.rejected_cut, cuts.rejected_tokens_cut),
        )
        if count
    ]
    return ", ".join(parts) or "nothing"


def sum_drops(files: Sequence[TokenizedFile]) -> dict[str, int]:
    """What was left out of several files, by reason."""
    return {reason: sum(file.drops[reason] for file in files) for reason in files[0].drops}
