"""Many questions to one judge: a cache on disk, several at a time, failures counted, and what it cost.

The cache is also the journal. An answer is on disk as soon as it is there, under (prompt hash, model, parameters), and
is asked for once; a run that was killed goes on from it, and what failed is asked again. The server's address is no
part of the key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console
from typing_extensions import TypedDict  # pydantic needs it on Python 3.11

from drift_jax import stopping
from drift_jax.config import JudgeConfig
from drift_jax.endpoint import Retry
from drift_jax.errors import DataError, EndpointError
from drift_jax.journal import Journal
from drift_jax.judge import GIVE_UP, Judge, MalformedError, Silence, Tokens, Verdict
from drift_jax.progress import stage_progress
from drift_jax.stopping import Stopped, late_answers

T = TypeVar("T")


class _Row(TypedDict):
    """Of the cache, as far as it is read."""

    key: str
    answer: dict[str, Any]
    malformed: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Question(Generic[T]):
    """One prompt, and what is taken from the object that answers it (see `Judge.verdict`)."""

    id: str  # of the caller; unique among the questions that are asked together
    text: str
    schema: Mapping[str, Any] | None
    read: Callable[[dict[str, Any]], T]

    def key(self, config: JudgeConfig) -> str:
        """64 hex digits of (prompt hash, model, parameters)."""
        prompt = hashlib.sha256(self.text.encode()).hexdigest()
        settings = [prompt, config.model, config.temperature, config.max_tokens, self.schema]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Tally:
    """What a set of questions came to. Tokens and dollars are of all answers that were used, cached ones included."""

    questions: int
    cached: int  # answered before
    failed: int  # without a usable answer; the caller leaves them out
    malformed_answers: int  # answers that could not be used, those of questions that were answered in the end included
    tokens: Tokens
    dollars: float | None  # None: no price is given

    def row(self) -> dict[str, Any]:
        return {
            "questions": self.questions,
            "answered": self.questions - self.failed,
            "from_cache": self.cached,
            "failed": self.failed,
            "malformed_answers": self.malformed_answers,
            "prompt_tokens": self.tokens.prompt,
            "completion_tokens": self.tokens.completion,
            "dollars": self.dollars,
        }


@dataclass(frozen=True)
class Judged(Generic[T]):
    """Values by question id, in the order of the questions, and why there is none for the others.

    `rows`: what the cache holds of the same questions: answer, prompt_tokens, completion_tokens, ...
    """

    values: dict[str, T]
    rows: dict[str, dict[str, Any]]
    failures: dict[str, str]
    tally: Tally


def ask_all(
    questions: Sequence[Question[T]],
    config: JudgeConfig,
    cache: Path,
    console: Console,
    what: str = "judging",
    retry: Retry | None = None,
) -> Judged[T]:
    """Asks what the cache does not know, `config.concurrency` questions at a time.

    Raises:
      ConfigError: the environment variable with the API key is not set.
      StageError: the server gives no answers, at all or any more, or another process writes the cache.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    with Journal(cache, _Row) as journal, Judge(config, retry) as judge:
        known = {row["key"]: row for row in journal.rows}
        keys = {question.id: question.key(config) for question in questions}
        missing = {keys[q.id]: q for q in questions if keys[q.id] not in known}
        cached = sum(key in known for key in keys.values())
        failures, lost = _ask_missing(missing, judge, journal, known, console, what)
    rows = {q.id: known[keys[q.id]] for q in questions if keys[q.id] in known}
    values = {q.id: _read_cached(q, rows[q.id], cache) for q in questions if q.id in rows}
    failed = {q.id: failures[keys[q.id]] for q in questions if keys[q.id] not in known}
    used = {row["key"]: row for row in rows.values()}.values()
    tokens = sum((Tokens(row["prompt_tokens"], row["completion_tokens"]) for row in used), lost.tokens)
    malformed = lost.malformed + sum(row["malformed"] for row in used)
    tally = Tally(len(questions), cached, len(failed), malformed, tokens, _dollars(tokens, config))
    return Judged(values, rows, failed, tally)


def _read_cached(question: Question[T], row: Mapping[str, Any], cache: Path) -> T:
    """Of an answer that was used before: nobody but the file's editor makes it unusable."""
    try:
        return question.read(row["answer"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{cache}: the answer to {question.id} cannot be used ({type(error).__name__}: {error}). Remove its line, "
            "and the judge is asked again."
        ) from None


@dataclass
class _Lost:
    """What questions took that have no usable answer."""

    malformed: int = 0
    tokens: Tokens = field(default_factory=Tokens)


def _ask_missing(
    missing: Mapping[str, Question[Any]],
    judge: Judge,
    journal: Journal,
    known: dict[str, dict[str, Any]],
    console: Console,
    what: str,
) -> tuple[dict[str, str], _Lost]:
    """Adds to `known` and the journal; (why others have no answer, by key; what these took)."""
    failures, lost = dict[str, str](), _Lost()
    silence = Silence(judge.config, journal.path, GIVE_UP if known else min(GIVE_UP, len(missing)))
    with stage_progress(what, len(missing), "questions", console=console) as bar:
        pool = ThreadPoolExecutor(judge.config.concurrency)
        futures: dict[Future[Verdict[Any]], str] = {}
        try:
            futures |= {pool.submit(judge.verdict, q.text, q.schema, q.read): key for key, q in missing.items()}
            for future in as_completed(futures):
                key = futures[future]
                try:
                    verdict = future.result()
                except EndpointError as error:
                    failures[key] = str(error)
                    if isinstance(error, MalformedError):
                        lost.malformed += error.malformed
                        lost.tokens += error.tokens
                    silence.failed(error)
                else:
                    silence.answered()
                    row = _answered(key, missing[key], judge.config, verdict)
                    known[key] = row
                    journal.append([row])
                bar.advance(1, f"{len(failures)} failed" if failures else None)
        except Stopped:
            late = late_answers(pool, futures)
            rows = [_answered(key, missing[key], judge.config, v) for key, v in late.items() if key not in known]
            journal.append(rows)
            raise
        finally:
            pool.shutdown(wait=not stopping.asked(), cancel_futures=True)
    if failures:
        console.print(
            f"{what}: {len(failures)} of {len(missing)} questions have no usable answer and are left out; the same "
            f"command asks them again. Such as: {next(iter(failures.values()))}",
            style="yellow",
            markup=False,
        )
    return failures, lost


def _row(key: str, question: Question[Any], config: JudgeConfig) -> dict[str, Any]:
    return {
        "key": key,
        "id": question.id,
        "prompt_hash": hashlib.sha256(question.text.encode()).hexdigest(),
        "model": config.model,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
    }


def _answered(key: str, question: Question[Any], config: JudgeConfig, verdict: Verdict[Any]) -> dict[str, Any]:
    return _row(key, question, config) | {
        "answer": verdict.answer,
        "malformed": verdict.malformed,
        "prompt_tokens": verdict.tokens.prompt,
        "completion_tokens": verdict.tokens.completion,
    }


def _dollars(tokens: Tokens, config: JudgeConfig) -> float | None:
    if not (config.price_prompt or config.price_completion):
        return None
    return (tokens.prompt * config.price_prompt + tokens.completion * config.price_completion) / 1e6
