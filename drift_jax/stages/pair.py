"""Joining sampled completions with the logged replies: what may be chosen, which one is, and what was dropped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.data.chosen import Candidate, check_rules, refusal
from drift_jax.endpoint import read_api_key
from drift_jax.errors import DataError
from drift_jax.files import write_json, write_jsonl
from drift_jax.journal import read_rows
from drift_jax.records import DsatRecord, Pair, pair_to_row
from drift_jax.stages.choose import CHOOSERS, Candidates, Choice
from drift_jax.stages.inputs import Summary, load_dsat_split

DRAWN_AGAIN = "cut by length, drawn again"
_META_KEYS = ("style", "temperature", "top_p", "top_k", "n", "max_new_tokens", "seed")


def check_choosing(config: RunConfig) -> None:
    """Finds what would stop the pair stage before completions have cost any time.

    Raises:
      ConfigError: a rule needs a library that is not installed, or the judge's key is not set.
    """
    check_rules(config.sampling)
    if config.sampling.chooser == "judge":
        read_api_key(config.judge.api_key_env)


def pair_stage(config: RunConfig, policy_hash: str, dsat_path: str, out_dir: Path, console: Console) -> Summary:
    """Writes `pairs.train.jsonl`, `pairs.test.jsonl` and `drops.json` from `completions.jsonl`.

    `drops.json` has `counts` by reason, `rows` (id, split, sample, reason) of every completion that was dropped, and
    `records` (id, split, reason) of those that make no pair. Completions that were usable and not chosen are no drops.

    Raises:
      DataError: no pair is left to train on.
      StageError: the judge failed on all records.
    """
    split = load_dsat_split(config, dsat_path)
    by_record: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(out_dir / "completions.jsonl"):
        by_record.setdefault(row["id"], []).append(row)
    candidates: list[tuple[str, Candidates]] = []
    rows: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for name, record in split.rows():
        drawn = by_record.get(record.id, [])
        usable = []
        for row, reason in _judged(drawn, record, config):
            if reason is None:
                usable.append(row)
            else:
                rows.append({"id": record.id, "split": name, "sample": row["sample"], "reason": reason})
        if usable:
            candidates.append((name, Candidates(record, usable)))
        else:
            records.append(
                {"id": record.id, "split": name, "reason": "no completion left" if drawn else "not encodable"}
            )
    left_out = Counter(row["reason"] for row in records)
    drops = {
        "bad row": split.skipped,
        "not encodable": left_out["not encodable"],
        **Counter(row["reason"] for row in rows),
        "record left out": left_out["no completion left"],
    }
    write_json(out_dir / "drops.json", {"counts": drops, "rows": rows, "records": records})
    if not any(name == "train" for name, _ in candidates):
        raise DataError(
            f"no pair is left to train on: {_in_words(drops)}. The reasons stand in {out_dir}/drops.json; "
            "sampling.on_cut, max_similarity, max_repetition, other_speakers and same_language say what is dropped."
        )
    choices = CHOOSERS[config.sampling.chooser]([one for _, one in candidates], config, out_dir, console)
    pairs: dict[str, list[Pair]] = {"train": [], "test": []}
    for (name, one), choice in zip(candidates, choices, strict=True):
        pairs[name].append(_build_pair(config, one, choice, policy_hash))
    for name, made in pairs.items():
        write_jsonl(out_dir / f"pairs.{name}.jsonl", map(pair_to_row, made))
    return {
        "pairs": len(pairs["train"]),
        "held_out": len(pairs["test"]),
        "cut_by_length": sum(p.meta["finish_reason"] == "length" for p in pairs["train"] + pairs["test"]),
        "judge_failures": sum("failed" in choice.evidence for choice in choices),
        "drops": drops,
    }


def _judged(
    drawn: list[dict[str, Any]], record: DsatRecord, config: RunConfig
) -> list[tuple[dict[str, Any], str | None]]:
    """The completions of a record, each with why it cannot be chosen, or None."""
    # A completion that was drawn again (its second draw has sample n + i) has had its chance.
    again = {row["sample"] - config.sampling.n for row in drawn}
    reasons = (
        DRAWN_AGAIN
        if row["sample"] in again
        else refusal(Candidate(row["text"], row["finish_reason"], row.get("control_token")), record, config.sampling)
        for row in drawn
    )
    return list(zip(drawn, reasons, strict=True))


def _build_pair(config: RunConfig, one: Candidates, choice: Choice, policy_hash: str) -> Pair:
    s, record, row = config.sampling, one.record, one.rows[choice.index]
    meta = dict(record.extra) | {
        "id": record.id,
        "sampler": s.engine,
        "policy": policy_hash,
        "sampling": {key: getattr(s, key) for key in _META_KEYS},
        "sample": row["sample"],
        "chooser": {"name": s.chooser, "candidates": [r["sample"] for r in one.rows]} | choice.evidence,
        "finish_reason": row["finish_reason"],
        "chosen_token_ids": row["token_ids"],
    }
    return Pair(record.id, record.prompt, row["text"], record.rejected, meta)


def _in_words(drops: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in drops.items() if count) or "there are no records"
