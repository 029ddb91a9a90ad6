"""Sampling chosen responses, and joining them with the logged ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.data.prompts import build_sampling_prompt
from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.distributed import gather, gather_packed, on_each, on_main
from drift_jax.errors import DataError
from drift_jax.files import write_json, write_jsonl
from drift_jax.progress import stage_progress
from drift_jax.records import DsatRecord, Pair, pair_to_row
from drift_jax.sampling.base import Completion, SampleRequest, SamplingParams
from drift_jax.stages.engines import ENGINES
from drift_jax.stages.inputs import (
    Summary,
    load_dsat_split,
    open_tokenizer,
    report_refused,
)
from drift_jax.stages.journal import Journals, open_journals, read_rows
from drift_jax.telemetry import StageTimer


def sample_stage(config: RunConfig, model_dir: Path, dsat_path: str, out_dir: Path, console: Console) -> Summary:
    """Samples `sampling.n` completions for every DSAT record from the policy in `model_dir`.

    Of several hosts each makes prompts and completions of its share of the records, where the engine can; the results
    are merged in the order of the records, also what an interrupted run on other hosts has left.
    """
    split = on_each(lambda: load_dsat_split(config, dsat_path))
    tokenizer = open_tokenizer(model_dir)
    engine = ENGINES[config.sampling.engine](config, model_dir)
    per_host = engine.per_host
    records = [record for _, record in split.rows()]
    mine = records[jax.process_index() :: jax.process_count()] if per_host else records
    requests, cut_tokens, refused = _build_requests(config, mine, tokenizer)
    all_refused = _of_all(refused, per_host)
    on_each(lambda: report_refused(all_refused, config))
    params = SamplingParams.from_config(config.sampling, tokenizer.eos_ids, tokenizer.vocab_size)
    with (
        on_each(lambda: open_journals(out_dir, jax.process_count() if per_host else 1)) as journals,
        StageTimer() as timer,
    ):
        known = {tuple(key) for keys in gather(list(journals.rows)) for key in keys}
        missing = [r for r in requests if (r.row_id, r.sample) not in known]
        what = f"sampling, 1 of {jax.process_count()} hosts" if per_host else "sampling"
        with (
            engine.open(missing, out_dir, console) as sampler,
            stage_progress(what, len(missing), "rows", console=console) as bar,
        ):

            def keep(completions: list[Completion]) -> None:
                rows = [_completion_row(c, tokenizer) for c in completions]
                journals.append(rows)
                timer.count_tokens(sum(len(c.token_ids) for c in completions))
                bar.advance(len(rows), _shorten(rows[-1]["text"]))

            sampler.sample(missing, params, keep)
        count = _merge(journals, records, config.sampling.n, out_dir)
    cuts, rates = _of_all(cut_tokens, per_host), _of_all([timer.tokens_per_second], per_host)
    return {
        "completions": count,
        "tokens_per_second": sum(rates),
        "prompts_cut": sum(cut > 0 for cut in cuts),
        "prompt_tokens_cut": sum(cuts),
        "drops": {"bad row": split.skipped, "not encodable": len(_of_all(refused, per_host))},
    }


def _of_all(mine: list[Any], per_host: bool) -> list[Any]:
    """What the hosts found, one after the other, where each has a share; else all have found the same."""
    return [item for items in gather(mine) for item in items] if per_host else mine


def _merge(journals: Journals, records: Sequence[DsatRecord], samples: int, out_dir: Path) -> int:
    """Writes what all hosts have sampled, in the order of the records; the journals can go then."""
    shares = gather_packed(list(journals.rows.values()), lambda rows: json.dumps(rows).encode(), json.loads)
    done = {(row["id"], row["sample"]): row for share in shares for row in share}
    keys = [(record.id, sample) for record in records for sample in range(samples)]
    rows = [done[key] for key in keys if key in done]
    on_main(lambda: write_jsonl(out_dir / "completions.jsonl", rows))
    journals.remove()
    return len(rows)


def _completion_row(completion: Completion, tokenizer: ChatTokenizer) -> dict[str, Any]:
    return {
        "id": completion.row_id,
        "sample": completion.sample,
        "text": tokenizer.decode(completion.token_ids),
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def _build_requests(
    config: RunConfig, records: Sequence[DsatRecord], tokenizer: ChatTokenizer
) -> tuple[list[SampleRequest], list[int], list[str]]:
    """(requests, tokens cut from each prompt, why no prompt could be made of the other records)."""
    requests, cut_tokens, refused = [], [], []
    for record in records:
        try:
            prompt = build_sampling_prompt(record, config.sampling.style, tokenizer, config.sampling.max_input_length)
        except DataError as error:
            refused.append(str(error))
            continue
        ids = tuple(prompt.ids.tolist())
        requests += [SampleRequest(record.id, sample, ids) for sample in range(config.sampling.n)]
        cut_tokens.append(prompt.cut_tokens)
    return requests, cut_tokens, refused


def pair_stage(config: RunConfig, policy_hash: str, dsat_path: str, out_dir: Path) -> Summary:
    """Joins each record with its first usable completion. What is left out is in drops.json, with the reason."""
    split = load_dsat_split(config, dsat_path)
    by_record: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(out_dir / "completions.jsonl"):
        by_record.setdefault(row["id"], []).append(row)
    pairs: dict[str, list[Pair]] = {"train": [], "test": []}
    dropped: list[dict[str, str]] = []
    for name, record in split.rows():
        completions = by_record.get(record.id, [])
        reasons = [unusable_reason(c, record) for c in completions]
        usable = [c for c, reason in zip(completions, reasons, strict=True) if reason is None]
        if usable:
            pairs[name].append(_build_pair(config, record, usable[0], policy_hash))
        else:
            reason = next((r for r in reasons if r), "not encodable")
            dropped.append({"id": record.id, "split": name, "reason": reason})
    counts = Counter(row["reason"] for row in dropped)
    drops = {"bad row": split.skipped, **counts}
    write_json(out_dir / "drops.json", {"counts": drops, "rows": dropped})
    if not pairs["train"]:
        raise DataError(f"no pair is left to train on: {dict(counts)}. The reasons stand in {out_dir}/drops.json.")
    for name, rows in pairs.items():
        write_jsonl(out_dir / f"pairs.{name}.jsonl", map(pair_to_row, rows))
    return {
        "pairs": len(pairs["train"]),
        "held_out": len(pairs["test"]),
        "cut_by_length": sum(p.meta["finish_reason"] == "length" for p in pairs["train"] + pairs["test"]),
        "drops": drops,
    }


def unusable_reason(completion: dict[str, Any], record: DsatRecord) -> str | None:
    """Why a completion cannot be a chosen response; None when it can."""
    text = completion["text"].strip()
    if not text:
        return "empty"
    if text == record.rejected.strip():
        return "same as rejected"
    return None


def _build_pair(config: RunConfig, record: DsatRecord, completion: dict[str, Any], policy_hash: str) -> Pair:
    s = config.sampling
    meta = dict(record.extra) | {
        "id": record.id,
        "sampler": s.engine,
        "policy": policy_hash,
        "sampling": {
            key: getattr(s, key) for key in ("style", "temperature", "top_p", "top_k", "n", "max_new_tokens", "seed")
        },
        "sample": completion["sample"],
        "finish_reason": completion["finish_reason"],
        "chosen_token_ids": completion["token_ids"],
    }
    return Pair(record.id, record.prompt, completion["text"], record.rejected, meta)


def _shorten(text: str, width: int = 60) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."
