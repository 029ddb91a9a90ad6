"""A judge that finds complaints: it is asked about several user turns of a conversation at once, by rubrics.

The rubrics are in the manner of SPUR (arXiv 2403.12388): a list of criteria, each of which applies to a turn or not,
and a strength. Ours are written by hand, not learned from labelled turns. They are the lines `- name: ...` of a
versioned file of `drift_jax/prompts/`.

Every answer is a row of a journal as soon as it is there, under all that it depends on (text, model, parameters).
A run that was killed asks for none of them again, and neither does one with another threshold. Answers that could not
be used are kept too: their turns stay undecided until the journal is removed. Where the server gave no answer nothing
is kept, and the next run asks again.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from typing_extensions import TypedDict  # pydantic needs it on Python 3.11

from drift_jax import stopping
from drift_jax.data.mining.complaint_rules import RuleSet
from drift_jax.data.mining.detector_config import DetectorConfig
from drift_jax.data.mining.dialogue import Complaint, Conversation
from drift_jax.data.mining.fired import RuleCounts, follow_ups
from drift_jax.data.mining.pace import Pace
from drift_jax.endpoint import Retry
from drift_jax.errors import ConfigError, EndpointError
from drift_jax.journal import Journal
from drift_jax.judge import Judge, JudgePrompt, MalformedError, Silence, Tokens, load_prompt

_WAITING = 1024  # conversations that are held while one before them is judged
# Bounds of an answer where the server keeps to the schema: a small model may write on until it is cut off.
# By length: xgrammar 0.2.8, which vLLM takes, fails on a pattern here.
_LONGEST_REASON = 200
_MOST_CRITERIA = 4
_CRITERION = re.compile(r"^- ([a-z_]+): ", re.MULTILINE)

Row = dict[str, Any]


@dataclass(frozen=True)
class _Question:
    key: str  # what its answer depends on
    turns: tuple[int, ...]  # places in the conversation that are judged
    text: str


class _Verdict(TypedDict):
    turn: int
    reason: str
    criteria: list[str]
    strength: int


class _Answer(TypedDict):
    """A row of the journal, as far as it is read."""

    key: str
    verdicts: list[_Verdict]
    undecided: list[int]
    calls: int
    malformed: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class _Waiting:
    """A conversation, what rules found in it, and the questions about it with their answers to come."""

    conversation: Conversation
    fired: dict[int, dict[str, str]]
    asked: tuple[tuple[_Question, Future[Row]], ...]

    def open(self) -> bool:
        return any(not future.done() for _, future in self.asked)


@final
class JudgeDetector:
    """Asks a judge about every user turn after a reply; with `rules`, about those where one fires.

    Args:
      journal: made if it is not there; one process at a time.
      retry, pace: how often requests are sent, and how fast; by default `Retry()` and `config.requests_per_minute`.

    Raises:
      ConfigError: the prompt lists no criteria, or the variable with the API key is not set.
      StageError: another process writes the journal.
    """

    def __init__(
        self,
        config: DetectorConfig,
        journal: Path,
        rules: Sequence[RuleSet] = (),
        retry: Retry | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._config, self._rules = config, RuleCounts(rules) if rules else None
        self._prompt: JudgePrompt = load_prompt(config.prompt)
        self._criteria = tuple(_CRITERION.findall(self._prompt.text))
        if not self._criteria:
            raise ConfigError(f"prompt {config.prompt} lists no criteria: lines that begin with `- name: `.")
        self._pace = pace or Pace(config.requests_per_minute)
        self._judge = Judge(config.judge, retry, self._pace.pause, self._pace.wait)
        journal.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._journal = Journal(journal, _Answer)
        except BaseException:
            self._judge.close()
            raise
        self._lock = threading.Lock()
        self._known: dict[str, Row] = {row["key"]: row for row in self._journal.rows}
        self._coming: dict[str, Future[Row]] = {}
        self._used: dict[str, None] = {}  # keys of all answers of this run, those of the journal included
        self._pool = ThreadPoolExecutor(config.judge.concurrency)
        self._turns = self._undecided = self._unanswered = self._asked = 0
        self._silence, self._last_error = Silence(config.judge, journal), ""

    def find(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, list[Complaint]]]:
        """Every conversation with its complaints, in order; a few questions ahead of what is taken.

        Raises:
          StageError: the server answers nothing any more, or the disk is full.
        """
        waiting: deque[_Waiting] = deque()
        most = 4 * self._config.judge.concurrency
        try:
            for conversation in conversations:
                waiting.append(self._ask_about(conversation))
                while waiting and (not waiting[0].open() or len(waiting) > _WAITING or len(self._coming) > most):
                    yield self._settle(waiting.popleft())
            while waiting:
                yield self._settle(waiting.popleft())
            if self._unanswered and not self._used:
                raise self._silence.gave_up()
        finally:
            if any(one.open() for one in waiting):
                self._pace.stop()  # nobody waits for these answers

    def stats(self) -> dict[str, Any]:
        """Counts of what was found so far, and what the answers took that it rests on, whichever run asked for them."""
        rows = [self._known[key] for key in self._used]
        tokens = sum((Tokens(row["tokens_in"], row["tokens_out"]) for row in rows), Tokens())
        judge = self._config.judge
        priced = judge.price_prompt or judge.price_completion
        cost = (tokens.prompt * judge.price_prompt + tokens.completion * judge.price_completion) / 1e6
        return {
            **(self._rules.stats() if self._rules else {}),
            "judge": {
                "model": judge.model,
                "prompt": self._prompt.name,
                "prompt_hash": self._prompt.hash,
                "threshold": self._config.threshold,
                "turns_asked_about": self._turns,
                "questions": len(rows),
                "calls": sum(row["calls"] for row in rows),
                "malformed_answers": sum(row["malformed"] for row in rows),
                "tokens_in": tokens.prompt,
                "tokens_out": tokens.completion,
                "answers_without_token_counts": sum(not row["tokens_in"] for row in rows),
                "cost": round(cost, 6) if priced else None,
                "turns_undecided": self._undecided,
                "questions_without_answer": self._unanswered,
                "last_failure": self._last_error or None,
            },
        }

    def status(self) -> str:
        """What this run has asked, for a line of progress."""
        failed = f", {self._unanswered} without answer" if self._unanswered else ""
        return f"{self._asked} questions asked, {self._pace.passed} requests{failed}"

    def close(self) -> None:
        """Lets go of the server and the journal, which gets the answers that are on their way."""
        self._pace.stop()
        if stopping.asked():
            stopping.late_answers(self._pool, {future: key for key, future in self._coming.items()})
        else:
            self._pool.shutdown(cancel_futures=True)
        self._judge.close()
        self._journal.close()

    # --- questions ------------------------------------------------------------------------------------------

    def _ask_about(self, conversation: Conversation) -> _Waiting:
        fired = self._rules.match(conversation) if self._rules else {}
        places = sorted(fired) if self._rules else follow_ups(conversation)
        self._turns += len(places)
        size = self._config.turns_per_question
        questions = [self._question(conversation, tuple(places[i : i + size])) for i in range(0, len(places), size)]
        return _Waiting(conversation, fired, tuple((one, self._answer_to(one, conversation)) for one in questions))

    def _question(self, conversation: Conversation, turns: tuple[int, ...]) -> _Question:
        """With each turn the reply before it, and the turn which that answers."""
        shown = sorted({place for turn in turns for place in range(max(0, turn - 2), turn + 1)})
        lines = [
            json.dumps(
                {
                    "turn": place,
                    "role": conversation.turns[place].role,
                    "content": _shorten(conversation.turns[place].content, self._config.turn_characters),
                },
                ensure_ascii=False,
            )
            for place in shown
        ]
        text = self._prompt.fill(conversation="\n".join(lines), turns=", ".join(map(str, turns)))
        text, judge = _mend(text), self._config.judge
        settings = json.dumps([judge.model, judge.temperature, judge.max_tokens, text])
        return _Question(hashlib.sha256(settings.encode()).hexdigest()[:32], turns, text)

    def _answer_to(self, question: _Question, conversation: Conversation) -> Future[Row]:
        """From the journal, from a question that is on its way, or from the server."""
        with self._lock:
            known = self._known.get(question.key)
        if known is not None:
            future: Future[Row] = Future()
            future.set_result(known)
            return future
        coming = self._coming.get(question.key)
        if coming is None:
            self._asked += 1
            coming = self._coming[question.key] = self._pool.submit(self._ask, question, conversation.id)
        return coming

    def _ask(self, question: _Question, conversation_id: str) -> Row:
        """In a thread of the pool: the answer as a row, which is in the journal by then. Raises `EndpointError`."""
        verdicts: dict[int, Row] = {}
        asked = set(question.turns)

        def read(answer: dict[str, Any]) -> None:
            good, problem = read_verdicts(answer, asked, self._criteria)
            verdicts.update((turn, one) for turn, one in good.items() if turn not in verdicts)
            if asked - set(verdicts):
                raise ValueError(problem or f"no verdict of turn {min(asked - set(verdicts))}")

        malformed, tokens = 0, Tokens()
        schema = verdict_schema(question.turns, self._criteria)
        try:
            verdict = self._judge.verdict(question.text, schema, read)
            malformed, calls, tokens = verdict.malformed, verdict.malformed + 1, verdict.tokens
        except MalformedError as error:
            malformed, calls, tokens = error.malformed, error.malformed, error.tokens
        row: Row = {
            "key": question.key,
            "conversation": _mend(conversation_id),
            "model": self._config.judge.model,
            "prompt": self._prompt.name,
            "prompt_hash": self._prompt.hash,
            "verdicts": [verdicts[turn] for turn in sorted(verdicts)],
            "undecided": sorted(asked - set(verdicts)),
            "calls": calls,
            "malformed": malformed,
            "tokens_in": tokens.prompt,
            "tokens_out": tokens.completion,
        }
        with self._lock:
            self._journal.append([row])
            self._known[question.key] = row
        return row

    # --- answers --------------------------------------------------------------------------------------------

    def _settle(self, one: _Waiting) -> tuple[Conversation, list[Complaint]]:
        """Waits for the answers about a conversation."""
        complaints: list[Complaint] = []
        for question, future in one.asked:
            try:
                row = future.result()
            except EndpointError as error:
                self._coming.pop(question.key, None)
                self._undecided += len(question.turns)
                self._unanswered += 1
                self._last_error = str(error)
                self._silence.failed(error)
                continue
            if self._coming.pop(question.key, None) is not None:  # an answer of this run
                self._silence.answered()
            self._used[question.key] = None
            self._undecided += len(row["undecided"])
            complaints += [self._complaint(v, one.fired) for v in row["verdicts"] if self._is_complaint(v)]
        return one.conversation, complaints

    def _is_complaint(self, verdict: Mapping[str, Any]) -> bool:
        return bool(verdict["criteria"]) and verdict["strength"] >= self._config.threshold

    def _complaint(self, verdict: Mapping[str, Any], fired: Mapping[int, dict[str, str]]) -> Complaint:
        evidence: dict[str, Any] = {"detector": self._config.kind}
        if self._rules:
            evidence["rules"] = fired[verdict["turn"]]
        evidence["judge"] = {
            "model": self._config.judge.model,
            "prompt": self._prompt.name,
            "prompt_hash": self._prompt.hash,
            **{key: verdict[key] for key in ("criteria", "strength", "reason")},
        }
        return Complaint(verdict["turn"], evidence)


def verdict_schema(turns: Sequence[int], criteria: Sequence[str]) -> dict[str, Any]:
    """JSON Schema of an answer about these turns."""
    verdict = {
        "turn": {"type": "integer", "enum": list(turns)},
        "reason": {"type": "string", "maxLength": _LONGEST_REASON},
        "criteria": {
            "type": "array",
            "items": {"type": "string", "enum": list(criteria)},
            "maxItems": _MOST_CRITERIA,
        },
        "strength": {"type": "integer", "enum": list(range(11))},
    }
    item = {"type": "object", "properties": verdict, "required": list(verdict), "additionalProperties": False}
    verdicts = {"type": "array", "items": item, "minItems": len(turns), "maxItems": len(turns)}
    return {
        "type": "object",
        "properties": {"verdicts": verdicts},
        "required": ["verdicts"],
        "additionalProperties": False,
    }


def read_verdicts(
    answer: Mapping[str, Any], asked: set[int], criteria: Sequence[str]
) -> tuple[dict[int, Row], str | None]:
    """The verdicts that can be used, by turn, and what is wrong with the first of the others.

    Raises:
      ValueError: there is no list of them.
    """
    verdicts = answer.get("verdicts")
    if not isinstance(verdicts, list):
        raise ValueError("verdicts must be a list")
    good: dict[int, Row] = {}
    problems: list[str] = []
    for verdict in verdicts:
        why = _problem(verdict, asked, criteria)
        if why:
            problems.append(why)
        elif verdict["turn"] not in good:
            good[verdict["turn"]] = {
                "turn": verdict["turn"],
                "reason": _mend(str(verdict.get("reason", ""))),
                "criteria": list(dict.fromkeys(verdict["criteria"])),
                "strength": verdict["strength"],
            }
    return good, problems[0] if problems else None


def _problem(verdict: Any, asked: set[int], criteria: Sequence[str]) -> str | None:
    if not isinstance(verdict, dict):
        return "a verdict must be an object"
    turn, named, strength = (verdict.get(key) for key in ("turn", "criteria", "strength"))
    if type(turn) is not int or turn not in asked:
        return f"turn must be one of {sorted(asked)}, found {turn!r}"
    if not isinstance(named, list) or not all(isinstance(one, str) and one in criteria for one in named):
        return f"criteria must be names of the list, found {named!r}"
    if type(strength) is not int or not 0 <= strength <= 10:
        return f"strength must be from 0 to 10, found {strength!r}"
    if strength and not named:
        return f"strength {strength} without a criterion"
    return None


def _mend(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _shorten(text: str, most: int) -> str:
    """Two thirds of what is kept are the start."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end]} [...] {text[-end:]}"
