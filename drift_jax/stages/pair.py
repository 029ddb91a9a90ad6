"""Sampled completions and logged replies -> pairs: what may be in one, which one is, and what was dropped."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.data.chosen import Candidate, alike, check_rules, refusal
from drift_jax.endpoint import read_api_key
from drift_jax.errors import DataError
from drift_jax.files import write_json, write_jsonl
from drift_jax.methods import Record, logged_reply
from drift_jax.records import Pair, pair_to_row
from drift_jax.stages.choose import CHOOSERS, Candidates, Choice
from drift_jax.stages.draws import method_of, prompt_of, samples_each, style_of
from drift_jax.stages.inputs import LoggedSplit, Summary, load_split
from drift_jax.stages.journal import read_completions
from drift_jax.stages.rank import NO_VERDICT, Ranking, build_ranker

DRAWN_AGAIN = "cut by length, drawn again"
ALIKE = "both replies alike"
_NOTHING_DRAWN, _NOTHING_LEFT = "not encodable", "no completion left"
_META_KEYS = ("style", "temperature", "top_p", "top_k", "n", "max_new_tokens", "seed")


def check_choosing(config: RunConfig) -> None:
    """Finds what would stop the pair stage before completions have cost any time.

    Raises:
      ConfigError: a rule needs a library that is not installed, the judge's key is not set, or there is no function of
        the name of the ranker.
    """
    check_rules(config.sampling)
    ranks = method_of(config).ranks
    if config.sampling.chooser == "judge" or (ranks and config.recipe.ranker == "judge"):
        read_api_key(config.judge.api_key_env)
    if ranks:
        build_ranker(config.recipe.ranker)


def pair_stage(config: RunConfig, policy_hash: str, records: str, out_dir: Path, console: Console) -> Summary:
    """Writes `pairs.train.jsonl`, `pairs.test.jsonl` and `drops.json` from `completions.jsonl`.

    Where no pair is held out, `pairs.test.jsonl` is empty. `drops.json` has `counts` by reason, `rows` (id, split,
    sample, reason) of every completion that was dropped, and `records` (id, split, reason) of those that make no pair.
    Completions that were usable and not chosen are no drops.

    Raises:
      DataError: no pair is left to train on.
      StageError: the judge failed on all records, or the ranker on one.
    """
    method = method_of(config)
    found, drops = _sort_out(config, load_split(config, records), out_dir)
    drops.write(out_dir)
    drops.check(found, out_dir)
    choices = _choose(config, found, out_dir, console)
    failures = sum("failed" in choice.evidence for each in choices for choice in each)
    if method.ranks:
        found, choices, rankings = _rank(config, found, choices, drops, out_dir, console)
        failures += drops.count(NO_VERDICT)
        drops.write(out_dir)
        drops.check(found, out_dir)
    else:
        rankings = [None] * len(found)
    build = _PairBuilder(config, policy_hash, _sha256(Path(records)))
    pairs: dict[str, list[Pair]] = {"train": [], "test": []}
    for one, picked, ranking in zip(found, choices, rankings, strict=True):
        pairs[one.split].append(build(one, picked, ranking))
    for name, made in pairs.items():
        write_jsonl(out_dir / f"pairs.{name}.jsonl", map(pair_to_row, made))
    if not pairs["test"]:
        _say_none_held_out(config.data.test_rows, out_dir, console)
    return {
        "pairs": len(pairs["train"]),
        "held_out": len(pairs["test"]),
        "cut_by_length": sum(_is_cut(pair) for made in pairs.values() for pair in made),
        "judge_failures": failures,
        "drops": drops.counts(),
    }


def _say_none_held_out(records: int, out_dir: Path, console: Console) -> None:
    """`records`: that were held out, and have made no pair."""
    message, style = "data.test_rows is 0: no pair is held out, and training evaluates nothing", None
    if records:
        message, style = (
            f"warning: none of the {records} held-out records has made a pair, so that training evaluates nothing. "
            f"{out_dir}/drops.json says why.",
            "yellow",
        )
    console.print(message, style=style, highlight=False, soft_wrap=True, markup=False, emoji=False)


@dataclass(frozen=True)
class _Found:
    """A record, and the completions of each of its prompts that can be in a pair; at least one of each."""

    split: str  # train or test
    record: Record
    rows: tuple[list[dict[str, Any]], ...]


@final
@dataclass
class _Drops:
    """What makes no pair, and why."""

    bad_rows: int
    rows: list[dict[str, Any]] = field(default_factory=list)  # completions
    records: list[dict[str, Any]] = field(default_factory=list)

    def count(self, reason: str) -> int:
        """Records that were left out for that reason."""
        return sum(row["reason"] == reason for row in self.records)

    def counts(self) -> dict[str, int]:
        own = Counter(row["reason"] for row in self.records if row["reason"] not in (_NOTHING_DRAWN, _NOTHING_LEFT))
        return {
            "bad row": self.bad_rows,
            _NOTHING_DRAWN: self.count(_NOTHING_DRAWN),
            **Counter(row["reason"] for row in self.rows),
            **own,
            "record left out": self.count(_NOTHING_LEFT),
        }

    def write(self, out_dir: Path) -> None:
        write_json(out_dir / "drops.json", {"counts": self.counts(), "rows": self.rows, "records": self.records})

    def check(self, found: list[_Found], out_dir: Path) -> None:
        """Raises `DataError` when no pair is left to train on."""
        if any(one.split == "train" for one in found):
            return
        told = ", ".join(f"{count} {reason}" for reason, count in self.counts().items() if count)
        raise DataError(
            f"no pair is left to train on: {told or 'there are no records'}. The reasons stand in "
            f"{out_dir}/drops.json; sampling.on_cut, max_similarity, max_repetition, other_speakers and same_language "
            "say what is dropped."
        )


def _sort_out(config: RunConfig, split: LoggedSplit, out_dir: Path) -> tuple[list[_Found], _Drops]:
    """The records that have usable completions of all prompts, and what was dropped."""
    by_record: dict[str, list[dict[str, Any]]] = {}
    for row in read_completions(out_dir / "completions.jsonl"):
        by_record.setdefault(row["id"], []).append(row)
    drops, found = _Drops(split.skipped), []
    for name, record in split.rows():
        drawn = by_record.get(record.id, [])
        usable: tuple[list[dict[str, Any]], ...] = tuple([] for _ in method_of(config).draws)
        for row, reason in _judged(drawn, record, config):
            if reason is None:
                usable[prompt_of(config, row["sample"])].append(row)
            else:
                drops.rows.append({"id": record.id, "split": name, "sample": row["sample"], "reason": reason})
        if all(usable):
            found.append(_Found(name, record, usable))
        else:
            reason = _NOTHING_LEFT if drawn else _NOTHING_DRAWN
            drops.records.append({"id": record.id, "split": name, "reason": reason})
    return found, drops


def _judged(drawn: list[dict[str, Any]], record: Record, config: RunConfig) -> list[tuple[dict[str, Any], str | None]]:
    """The completions of a record, each with why it cannot be in a pair, or None."""
    # A completion that was drawn again has had its chance.
    again = {row["sample"] - samples_each(config) for row in drawn}
    logged = method_of(config).logged

    def judge(row: dict[str, Any]) -> str | None:
        if row["sample"] in again:
            return DRAWN_AGAIN
        candidate = Candidate(row["text"], row["finish_reason"], row.get("control_token"))
        return refusal(candidate, record, config.sampling, logged)

    return [(row, judge(row)) for row in drawn]


Picked = tuple[Choice, ...]  # of each prompt


def _choose(config: RunConfig, found: list[_Found], out_dir: Path, console: Console) -> list[Picked]:
    """Of each record, one completion of each prompt."""
    choose, prompts = CHOOSERS[config.sampling.chooser], range(len(method_of(config).draws))
    each = [choose([Candidates(one.record, one.rows[p]) for one in found], config, out_dir, console) for p in prompts]
    return list(zip(*each, strict=True))


def _rank(
    config: RunConfig, found: list[_Found], choices: list[Picked], drops: _Drops, out_dir: Path, console: Console
) -> tuple[list[_Found], list[Picked], list[Ranking | None]]:
    """Those records of whose two replies one is better, with which one it is; the others are dropped."""
    both = [
        [rows[choice.index] for rows, choice in zip(o.rows, c, strict=True)]
        for o, c in zip(found, choices, strict=True)
    ]
    same = [alike(first["text"], second["text"], config.sampling) for first, second in both]
    asked = [Candidates(one.record, rows) for one, rows, equal in zip(found, both, same, strict=True) if not equal]
    answers = iter(build_ranker(config.recipe.ranker)(asked, config, out_dir, console))
    rankings = [Ranking(None, {}, ALIKE) if equal else next(answers) for equal in same]
    kept = []
    for one, choice, ranking in zip(found, choices, rankings, strict=True):
        if ranking.best is None:
            drops.records.append({"id": one.record.id, "split": one.split, "reason": ranking.why})
        else:
            kept.append((one, choice, ranking))
    return [one for one, _, _ in kept], [choice for _, choice, _ in kept], [ranking for _, _, ranking in kept]


@final
@dataclass(frozen=True)
class _PairBuilder:
    """Pairs of the method; `meta` says of both sides where they come from."""

    config: RunConfig
    policy_hash: str
    records_hash: str

    def __call__(self, one: _Found, choices: Picked, ranking: Ranking | None) -> Pair:
        config, s = self.config, self.config.sampling
        method = method_of(config)
        better = 0 if ranking is None or ranking.best is None else ranking.best
        place = {"drawn": 0, "best": better, "worst": 1 - better}
        meta = dict(one.record.extra) | {
            "id": one.record.id,
            "method": config.recipe.method,
            "sampler": s.engine,
            "policy": self.policy_hash,
            "sampling": {key: getattr(s, key) for key in _META_KEYS} | {"style": " + ".join(method.draws)},
        }
        texts = {}
        for side, prefix in (("chosen", ""), ("rejected", "rejected_")):
            source = getattr(method, side)
            if source == "logged":
                texts[side] = logged_reply(one.record)
                meta[f"{side}_from"] = {"source": method.records, "sha256": self.records_hash, "id": one.record.id}
                continue
            rows, choice = one.rows[place[source]], choices[place[source]]
            row = rows[choice.index]
            texts[side] = row["text"]
            style = style_of(config, row["sample"])
            meta[f"{side}_from"] = {"source": "policy", "sha256": self.policy_hash, "style": style, "as": source}
            meta |= {
                f"{prefix}sample": row["sample"],
                f"{prefix}chooser": {"name": s.chooser, "candidates": [r["sample"] for r in rows]} | choice.evidence,
                f"{prefix}finish_reason": row["finish_reason"],
                f"{side}_token_ids": row["token_ids"],
            }
        if ranking is not None:
            both = [rows[choice.index]["sample"] for rows, choice in zip(one.rows, choices, strict=True)]
            meta["ranker"] = {"name": config.recipe.ranker, "samples": both} | ranking.evidence
        return Pair(one.record.id, one.record.prompt, texts["chosen"], texts["rejected"], meta)


def _is_cut(pair: Pair) -> bool:
    return "length" in (pair.meta.get("finish_reason"), pair.meta.get("rejected_finish_reason"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
