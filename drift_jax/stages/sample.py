"""Sampling chosen responses, and joining them with the logged ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.data.prompts import build_sampling_prompt
from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.errors import DataError
from drift_jax.progress import stage_progress
from drift_jax.records import DsatRecord, Pair, pair_to_row, write_json, write_jsonl
from drift_jax.sampling.base import Completion, SampleRequest, SamplingParams
from drift_jax.sampling.local import LocalSampler
from drift_jax.sharding import build_layout, for_sampling
from drift_jax.stages.inputs import (
    DsatSplit,
    Summary,
    load_dsat_split,
    open_policy,
    open_tokenizer,
    report_refused,
)
from drift_jax.stages.journal import Journal, read_rows
from drift_jax.telemetry import StageTimer


def sample_stage(config: RunConfig, model_dir: Path, dsat_path: str, out_dir: Path, console: Console) -> Summary:
    """Samples `sampling.n` completions for every DSAT record from the policy in `model_dir`."""
    split = load_dsat_split(config, dsat_path)
    tokenizer = open_tokenizer(model_dir)
    requests, cut_tokens, refused = _build_requests(config, split, tokenizer)
    out_dir.mkdir(parents=True, exist_ok=True)
    params = SamplingParams.from_config(config.sampling, tokenizer.eos_ids, tokenizer.vocab_size)
    with Journal(out_dir / "completions.partial.jsonl") as journal, StageTimer() as timer:
        done = {(row["id"], row["sample"]): row for row in journal.rows}
        missing = [r for r in requests if (r.row_id, r.sample) not in done]
        dtype = config.sampling.compute_dtype
        policy = open_policy(model_dir, for_sampling(build_layout(config.mesh)), dtype, dtype, console)
        with stage_progress("sampling", len(missing), "rows", console=console) as bar:

            def keep(completions: list[Completion]) -> None:
                rows = [_completion_row(c, tokenizer) for c in completions]
                journal.append(rows)
                done.update({(row["id"], row["sample"]): row for row in rows})
                timer.count_tokens(sum(len(c.token_ids) for c in completions))
                bar.advance(len(rows), _shorten(rows[-1]["text"]))

            LocalSampler(policy, config.sampling.batch_size).sample(missing, params, keep)
    write_jsonl(out_dir / "completions.jsonl", (done[(r.row_id, r.sample)] for r in requests))
    journal.path.unlink()
    return {
        "completions": len(requests),
        "tokens_per_second": timer.tokens_per_second,
        "prompts_cut": sum(cut > 0 for cut in cut_tokens),
        "prompt_tokens_cut": sum(cut_tokens),
        "drops": {"bad row": split.skipped, "not encodable": len(refused)},
    }


def _completion_row(completion: Completion, tokenizer: ChatTokenizer) -> dict[str, Any]:
    return {
        "id": completion.row_id,
        "sample": completion.sample,
        "text": tokenizer.decode(completion.token_ids),
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def _build_requests(
    config: RunConfig, split: DsatSplit, tokenizer: ChatTokenizer
) -> tuple[list[SampleRequest], list[int], list[str]]:
    requests, cut_tokens, refused = [], [], []
    for _, record in split.rows():
        try:
            prompt = build_sampling_prompt(record, config.sampling.style, tokenizer, config.sampling.max_input_length)
        except DataError as error:
            refused.append(str(error))
            continue
        ids = tuple(prompt.ids.tolist())
        requests += [SampleRequest(record.id, sample, ids) for sample in range(config.sampling.n)]
        cut_tokens.append(prompt.cut_tokens)
    report_refused(refused, config)
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
