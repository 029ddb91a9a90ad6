"""Which of several usable completions of a prompt goes into the pair: a function per name of `sampling.chooser`.

first           the one that was drawn first (the paper draws one)
longest_within  the longest of at most `sampling.longest_within` tokens; the shortest where none is that short
logprob         the one with the highest mean log-prob a token under the policy that it was drawn from, before
                temperature, top-k and top-p
judge           the one that a model names, see `drift_jax/prompts/`
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from typing_extensions import TypedDict  # pydantic needs it on Python 3.11

from drift_jax import stopping
from drift_jax.config import RunConfig
from drift_jax.errors import DataError, EndpointError, StageError
from drift_jax.journal import Journal
from drift_jax.judge import GIVE_UP, Judge, JudgePrompt, Silence, load_prompt
from drift_jax.methods import Record, logged_reply
from drift_jax.progress import stage_progress
from drift_jax.stopping import Stopped, late_answers

VERDICTS_FILE = "verdicts.jsonl"
_PROMPT = "choose_v1"


class _Verdict(TypedDict):
    """A row of verdicts.jsonl."""

    key: str
    model: str
    prompt: str
    prompt_hash: str
    order: list[int]
    best: int
    reason: str


@dataclass(frozen=True)
class Candidates:
    """A record and the rows of its usable completions, in the order of their draws; at least one."""

    record: Record
    rows: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """The place of the chosen row among the candidates, and why, as JSON values."""

    index: int
    evidence: dict[str, Any] = field(default_factory=dict)


Chooser = Callable[[Sequence[Candidates], RunConfig, Path, Console], list[Choice]]


def _first(candidates: Sequence[Candidates], config: RunConfig, out_dir: Path, console: Console) -> list[Choice]:
    return [Choice(0) for _ in candidates]


def _longest_within(
    candidates: Sequence[Candidates], config: RunConfig, out_dir: Path, console: Console
) -> list[Choice]:
    def pick(one: Candidates) -> Choice:
        lengths = [len(row["token_ids"]) for row in one.rows]
        within = [length for length in lengths if length <= config.sampling.longest_within]
        return Choice(lengths.index(max(within) if within else min(lengths)), {"tokens": lengths})

    return [pick(one) for one in candidates]


def _by_logprob(candidates: Sequence[Candidates], config: RunConfig, out_dir: Path, console: Console) -> list[Choice]:
    def pick(one: Candidates) -> Choice:
        means = [row["mean_logp"] for row in one.rows]
        return Choice(means.index(max(means)), {"mean_logp": means})

    return [pick(one) for one in candidates]


def _by_judge(candidates: Sequence[Candidates], config: RunConfig, out_dir: Path, console: Console) -> list[Choice]:
    """Verdicts are journalled in `verdicts.jsonl` as they come, so that a resumed run asks for none twice.

    Where the judge fails on a record the first completion is taken, and the pair says why.

    Raises:
      StageError: it failed on all records, or gives no answers any more.
    """
    prompt = load_prompt(_PROMPT)
    choices = [Choice(0, {"only": True}) for _ in candidates]
    with Journal(out_dir / VERDICTS_FILE, _Verdict) as journal, Judge(config.judge) as judge:
        known = {row["key"]: row for row in journal.rows}
        asked = {i: _question(one, config, prompt) for i, one in enumerate(candidates) if len(one.rows) > 1}
        missing = {i: question for i, question in asked.items() if question.key not in known}
        failures = _ask_missing(missing, len(missing) < len(asked), judge, journal, known, console)
    for i, question in asked.items():
        choices[i] = (
            Choice(0, {"failed": failures[i]}) if i in failures else _choice(known[question.key], candidates[i])
        )
    if failures:
        console.print(
            f"the judge failed on {len(failures)} of {len(asked)} records; their first completion was taken. "
            f"Such as: {next(iter(failures.values()))}",
            style="yellow",
            markup=False,
        )
    return choices


CHOOSERS: Mapping[str, Chooser] = {
    "first": _first,
    "longest_within": _longest_within,
    "logprob": _by_logprob,
    "judge": _by_judge,
}


# --- questions to the judge ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    key: str  # what the verdict depends on
    record_id: str
    order: tuple[int, ...]  # sample numbers as they are shown
    text: str
    prompt: JudgePrompt
    model: str


def _ask_missing(
    missing: Mapping[int, _Question],
    succeeded: bool,
    judge: Judge,
    journal: Journal,
    known: dict[str, dict[str, Any]],
    console: Console,
) -> dict[int, str]:
    """Adds to `known` and the journal; why others have no verdict. `succeeded`: there are verdicts from before."""
    failures, silence = dict[int, str](), Silence(judge.config, journal.path)
    with stage_progress("judging", len(missing), "records", console=console) as bar:
        pool = ThreadPoolExecutor(judge.config.concurrency)
        futures: dict[Future[dict[str, Any]], int] = {}
        try:
            futures |= {pool.submit(partial(_ask, judge, question)): i for i, question in missing.items()}
            for future in as_completed(futures):
                i = futures[future]
                try:
                    verdict = future.result()
                except EndpointError as error:
                    failures[i] = str(error)
                    if not succeeded and len(failures) >= min(GIVE_UP, len(missing)):
                        raise StageError(
                            f"the judge {judge.config.model} failed on all {len(failures)} records that it was asked "
                            f"about: {error} Mend judge.base_url, judge.model or the server and run again: "
                            "completions are kept, and what was judged is not asked again."
                        ) from None
                    silence.failed(error)
                else:
                    succeeded = True
                    silence.answered()
                    known[missing[i].key] = verdict
                    journal.append([verdict])
                bar.advance(1, f"{len(failures)} failed" if failures else None)
        except Stopped:
            late = late_answers(pool, futures)
            journal.append([verdict for i, verdict in late.items() if missing[i].key not in known])
            raise
        finally:
            pool.shutdown(wait=not stopping.asked(), cancel_futures=True)
    return failures


def _question(one: Candidates, config: RunConfig, prompt: JudgePrompt) -> _Question:
    """The order is drawn by `sampling.seed` and the record: judges like some places better than others."""
    rows = list(one.rows)
    random.Random(f"{config.sampling.seed}:{one.record.id}").shuffle(rows)
    text = prompt.fill(
        dialogue="\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in one.record.prompt),
        rejected=logged_reply(one.record),
        complaint=one.record.user_preference,
        replies="\n\n".join(f"<reply_{i}>\n{row['text']}\n</reply_{i}>" for i, row in enumerate(rows, 1)),
        count=len(rows),
    )
    settings = [config.judge.model, config.judge.temperature, config.judge.max_tokens, text]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    return _Question(key, one.record.id, tuple(row["sample"] for row in rows), text, prompt, config.judge.model)


def _ask(judge: Judge, question: _Question) -> dict[str, Any]:
    """The verdict as a row of the journal."""
    count = len(question.order)
    schema = {
        "type": "object",
        "properties": {
            "reason": {"type": "string"},
            "best": {"type": "integer", "enum": list(range(1, count + 1))},
        },
        "required": ["reason", "best"],
        "additionalProperties": False,
    }

    def read(answer: dict[str, Any]) -> tuple[int, str]:
        best = answer["best"]
        if type(best) is not int or not 1 <= best <= count:
            raise ValueError(f"best must be from 1 to {count}, found {best!r}")
        return best, str(answer.get("reason", ""))

    best, reason = judge.ask(question.text, schema, read)
    return {
        "key": question.key,
        "id": question.record_id,
        "model": question.model,
        "prompt": question.prompt.name,
        "prompt_hash": question.prompt.hash,
        "order": list(question.order),
        "best": question.order[best - 1],
        "reason": reason,
    }


def _choice(verdict: dict[str, Any], one: Candidates) -> Choice:
    samples = [row["sample"] for row in one.rows]
    if verdict["best"] not in samples:
        raise DataError(
            f"{VERDICTS_FILE}: the verdict on record {one.record.id} names sample {verdict['best']}, which is none of "
            f"its candidates {samples}. Remove that line, and the judge is asked again."
        )
    evidence = {key: verdict[key] for key in ("model", "prompt", "prompt_hash", "order", "reason")}
    return Choice(samples.index(verdict["best"]), evidence)
