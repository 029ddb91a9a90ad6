"""Sampling replies from the policy, by the prompts of the method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from drift_jax import stopping
from drift_jax.config import RunConfig
from drift_jax.data.prompts import build_sampling_prompt
from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.distributed import gather, gather_packed, on_each, on_main
from drift_jax.errors import DataError, StageError
from drift_jax.files import write_jsonl
from drift_jax.methods import UNGUIDED, Record
from drift_jax.progress import stage_progress
from drift_jax.sampling.base import Completion, Sampler, SampleRequest, SamplingParams
from drift_jax.stages.draws import method_of, needs_logps, samples_each, style_of
from drift_jax.stages.engines import ENGINES
from drift_jax.stages.inputs import (
    Summary,
    load_split,
    open_tokenizer,
    report_refused,
)
from drift_jax.stages.journal import Journals, open_journals
from drift_jax.stopping import Stopped
from drift_jax.telemetry import StageTimer


def sample_stage(
    config: RunConfig, model_dir: Path, records: str, out_dir: Path, console: Console, job: str
) -> Summary:
    """Samples completions for every record from the policy in `model_dir`: `sampling.n` for each prompt of the method.

    Sample i is of prompt i // n. With `sampling.on_cut: resample`, a sample i that was cut by length is drawn once
    more, as sample i + n x prompts.

    Of several hosts each makes prompts and completions of its share of the records, where the engine can; the results
    are merged in the order of the records, also what an interrupted run on other hosts has left.

    Args:
      job: what the completions are drawn by (`identity.sampling_job`).

    Raises:
      StageError: `out_dir` holds completions of another job, or another process writes there.
    """
    split = on_each(lambda: load_split(config, records))
    tokenizer = open_tokenizer(model_dir, config.data.thinking)
    engine = ENGINES[config.sampling.engine](config, model_dir)
    per_host = engine.per_host
    every = [record for _, record in split.rows()]
    mine = every[jax.process_index() :: jax.process_count()] if per_host else every
    requests, cut_tokens, refused = _build_requests(config, mine, tokenizer)
    all_refused = _of_all(refused, per_host)
    on_each(lambda: report_refused(all_refused, config))
    cuts = _all_cuts(cut_tokens, per_host, config, console)
    params = SamplingParams.from_config(config.sampling, tokenizer.eos_ids, tokenizer.vocab_size)
    with (
        on_each(lambda: open_journals(out_dir, jax.process_count() if per_host else 1)) as journals,
        StageTimer() as timer,
    ):
        on_each(lambda: refuse_foreign(journals.rows.values(), job, out_dir))
        cut = known_cuts(journals)
        by_id = {record.id: record for record in mine}

        def keep(completions: list[Completion]) -> dict[str, str]:
            rows = [completion_row(c, tokenizer, needs_logps(config), job) for c in completions]
            journals.append(rows)
            timer.count_tokens(sum(len(c.token_ids) for c in completions))
            return _example(by_id[rows[-1]["id"]], rows[-1]["text"], style_of(config, rows[-1]["sample"]))

        def missing(again: bool) -> list[SampleRequest]:
            wanted = _second_draws(config, requests, cut) if again else requests
            return [r for r in wanted if (r.row_id, r.sample) not in cut]

        with engine.open([*missing(False), *missing(True)], out_dir, console) as sampler:
            for again in (False, True) if config.sampling.on_cut == "resample" else (False,):
                what = "sampling cut ones again" if again else "sampling"
                completions = draw(sampler, missing(again), params, keep, what, console, per_host)
                cut.update({(c.row_id, c.sample): c.finish_reason == "length" for c in completions})
        count = merge(journals, [record.id for record in every], samples_each(config), out_dir)
    rates = _of_all([timer.tokens_per_second], per_host)
    return {
        "completions": count,
        "tokens_per_second": sum(rates),
        "prompts_cut": sum(cut > 0 for cut in cuts),
        "prompt_tokens_cut": sum(cuts),
        "drops": {"bad row": split.skipped, "not encodable": len(_of_all(refused, per_host))},
    }


def _all_cuts(mine: list[int], per_host: bool, config: RunConfig, console: Console) -> list[int]:
    """Tokens cut from each prompt, of all hosts; says it where there are any."""
    cuts = _of_all(mine, per_host)
    if any(cuts):
        what = f"{sum(cut > 0 for cut in cuts)} of {len(cuts)} sampling prompts lose their beginning"
        console.print(f"{what}, {sum(cuts)} tokens: sampling.max_input_length is {config.sampling.max_input_length}")
    return cuts


def _of_all(mine: list[Any], per_host: bool) -> list[Any]:
    """What the hosts found, one after the other, where each has a share; else all have found the same."""
    return [item for items in gather(mine) for item in items] if per_host else mine


def merge(journals: Journals, ids: Sequence[str], samples: int, out_dir: Path) -> int:
    """Writes what all hosts have sampled, in the order of the record ids; the journals can go then."""
    shares = gather_packed(list(journals.rows.values()), lambda rows: json.dumps(rows).encode(), json.loads)
    done = {(row["id"], row["sample"]): row for share in shares for row in share}
    keys = [(name, sample) for name in ids for sample in range(2 * samples)]  # second draws included
    rows = [done[key] for key in keys if key in done]
    on_main(lambda: write_jsonl(out_dir / "completions.jsonl", rows))
    journals.remove()
    return len(rows)


def known_cuts(journals: Journals) -> dict[tuple[str, int], bool]:
    """(id, sample) -> whether it was cut by length, of the completions that any host has."""
    mine = [[*key, row["finish_reason"] == "length"] for key, row in journals.rows.items()]
    return {(name, sample): was_cut for rows in gather(mine) for name, sample, was_cut in rows}


def draw(
    sampler: Sampler,
    missing: list[SampleRequest],
    params: SamplingParams,
    keep: Callable[[list[Completion]], dict[str, str]],
    what: str,
    console: Console,
    per_host: bool,
) -> list[Completion]:
    """Samples under a progress bar; `keep` stores completions as they come and gives an example to show.

    With a share of its own (`per_host`) a host may stop at any time, and tells the others in the end how it went.
    """
    what += f", 1 of {jax.process_count()} hosts" if per_host else ""

    def work() -> list[Completion]:
        with stage_progress(what, len(missing), "rows", console=console) as bar:

            def on_batch(completions: list[Completion]) -> None:
                example = keep(completions)
                if not per_host and stopping.reached():
                    raise Stopped
                bar.advance(len(completions))
                bar.show_sample(example)

            return sampler.sample(missing, params, on_batch)

    return on_each(work) if per_host else work()


def _second_draws(
    config: RunConfig, requests: Sequence[SampleRequest], cut: Mapping[tuple[str, int], bool]
) -> list[SampleRequest]:
    """Of requests whose completion was cut by length: another sample in its place, where that is wanted."""
    if config.sampling.on_cut != "resample":
        return []
    again = [r for r in requests if cut.get((r.row_id, r.sample))]
    return [SampleRequest(r.row_id, samples_each(config) + r.sample, r.prompt_ids) for r in again]


def completion_row(completion: Completion, tokenizer: ChatTokenizer, logps: bool, job: str) -> dict[str, Any]:
    """The row of a completion, in the journal as in completions.jsonl.

    Log-probs are left out but for the mean that a chooser asked for: their last digits may depend on the rows that
    were decoded beside, and a run that was interrupted is to leave the same file.
    """
    row: dict[str, Any] = {
        "id": completion.row_id,
        "sample": completion.sample,
        "text": tokenizer.decode(completion.token_ids),
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "request": request_key(job, completion.row_id, completion.sample),
    }
    if logps:
        row["mean_logp"] = round(sum(completion.token_logps) / len(completion.token_logps), 6)  # nats
    hidden = completion.token_ids[: len(completion.token_ids) - (completion.finish_reason == "stop")]
    strays = [i for i in hidden if i in tokenizer.control_ids and not tokenizer.decode([i])]
    if strays:
        row["control_token"] = tokenizer.decode(strays[:1], skip_special=False)
    return row


def request_key(job: str, row_id: str, sample: int) -> str:
    """16 hex digits that name one request of one job."""
    return hashlib.sha256(json.dumps([job, row_id, sample]).encode()).hexdigest()[:16]


def refuse_foreign(rows: Iterable[Mapping[str, Any]], job: str, out_dir: Path) -> None:
    """Raises `StageError` for rows that another job has left."""
    foreign = [row["id"] for row in rows if row.get("request") != request_key(job, row["id"], row["sample"])]
    if foreign:
        raise StageError(
            f"{out_dir} holds {len(foreign)} completions of another policy, input or way of sampling, such as that of "
            f"record {foreign[0]}. Give another directory, or remove completions*.jsonl there to sample them anew."
        )


def _example(record: Record, reply: str, style: str) -> dict[str, str]:
    """What a person sees of a completion while sampling goes on."""
    complaint = {} if style == UNGUIDED else {"complaint": record.user_preference}
    return {"prompt": record.prompt[-1].content, **complaint, "sampled": reply}


def _build_requests(
    config: RunConfig, records: Sequence[Record], tokenizer: ChatTokenizer
) -> tuple[list[SampleRequest], list[int], list[str]]:
    """(requests, tokens cut from each prompt, why not all prompts could be made of the other records)."""
    requests, cut_tokens, refused = [], [], []
    sampling, styles = config.sampling, method_of(config).draws
    for record in records:
        try:
            prompts = [build_sampling_prompt(record, style, tokenizer, sampling.max_input_length) for style in styles]
        except DataError as error:
            refused.append(str(error))
            continue
        each = [tuple(prompt.ids.tolist()) for prompt in prompts for _ in range(sampling.n)]
        requests += [SampleRequest(record.id, sample, ids) for sample, ids in enumerate(each)]
        cut_tokens += [prompt.cut_tokens for prompt in prompts]
    return requests, cut_tokens, refused
