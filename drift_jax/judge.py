"""A model that judges: one question to an OpenAI-compatible server, one JSON object back.

What is asked and what the object must hold is the caller's; prompts are versioned files of `drift_jax/prompts/`, which
are never edited once results were made with them: a better prompt is a new version.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import TracebackType
from typing import Any, Generic, TypeVar, final

from drift_jax.config import JudgeConfig
from drift_jax.endpoint import Endpoint, Retry, read_api_key
from drift_jax.errors import ConfigError, EndpointError, StageError
from drift_jax.reading import parse_json

T = TypeVar("T")

GIVE_UP = 16  # questions in a row without an answer that say enough
_ATTEMPTS = 3  # at an answer that can be used; connections have their own (`Retry`)
_SHOWN = 200  # characters of an answer in an error
# What servers say to a parameter that they do not know; 500 is vLLM's word where its library for grammars is not there.
_REFUSED = frozenset({400, 404, 422, 500, 501})


@dataclass(frozen=True)
class JudgePrompt:
    """A versioned prompt; `$name` are its gaps."""

    name: str  # of the file, such as choose_v1
    text: str

    @property
    def hash(self) -> str:
        """16 hex digits of the text's sha256: results name what they were made with."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def fill(self, **values: object) -> str:
        return Template(self.text).substitute(values)


def load_prompt(name: str) -> JudgePrompt:
    """The file `drift_jax/prompts/NAME.txt`. Raises `ConfigError` for a name that is none of theirs."""
    folder = importlib.resources.files("drift_jax") / "prompts"
    ours = sorted(file.name.removesuffix(".txt") for file in folder.iterdir() if file.name.endswith(".txt"))
    if name not in ours:
        raise ConfigError(f"there is no prompt {name!r:.80}: ours are {', '.join(ours)}.")
    file = folder / f"{name}.txt"
    return JudgePrompt(name, file.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Tokens:
    """What an answer took, as the server counts it; 0 where it does not say."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)


@dataclass(frozen=True)
class Verdict(Generic[T]):
    """What was read, the object it was read from, and what it took, answers that could not be used included."""

    value: T
    answer: dict[str, Any]
    malformed: int  # answers that could not be used
    tokens: Tokens


class MalformedError(EndpointError):
    """The server answered, as often as it was asked, and none of its answers can be used."""

    def __init__(self, message: str, malformed: int, tokens: Tokens) -> None:
        super().__init__(message, passing=False)
        self.malformed, self.tokens = malformed, tokens


@final
class Silence:
    """Questions in a row that a judge gave no answer to: where there are enough of them, nobody is there to answer.

    Args:
      kept: the file of its answers, which a run that goes on finds.
      most: so many are enough.
    """

    def __init__(self, config: JudgeConfig, kept: Path, most: int = GIVE_UP) -> None:
        self._model, self._kept, self._most = config.model, kept, most
        self._questions, self._error = 0, ""

    def answered(self) -> None:
        self._questions = 0

    def failed(self, error: EndpointError) -> None:
        """Raises `StageError` where it is one too many. Answers that cannot be used (`MalformedError`) are answers."""
        if isinstance(error, MalformedError):
            self.answered()
            return
        self._questions, self._error = self._questions + 1, str(error)
        if self._questions >= self._most:
            raise self.gave_up() from None

    def gave_up(self) -> StageError:
        return StageError(
            f"the judge {self._model} gave no answer to {self._questions} questions in a row: {self._error} Mend "
            "judge.base_url, judge.model or the server and run again: what was answered is kept in "
            f"{self._kept} and not asked again."
        )


@final
class Judge:
    """The server and model of section `judge`. Threads may share it. `retry`, `sleep` and `wait_turn` as in `Endpoint`.

    Raises:
      ConfigError: the environment variable with the API key is not set.
    """

    def __init__(
        self,
        config: JudgeConfig,
        retry: Retry | None = None,
        sleep: Callable[[float], None] = time.sleep,
        wait_turn: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        key = read_api_key(config.api_key_env)
        self._endpoint = Endpoint(config.base_url, key, config.timeout_s, retry, sleep, wait_turn)
        self._structured = True

    def ask(self, prompt: str, schema: Mapping[str, Any] | None, read: Callable[[dict[str, Any]], T]) -> T:
        """The value of `verdict`."""
        return self.verdict(prompt, schema, read).value

    def verdict(self, prompt: str, schema: Mapping[str, Any] | None, read: Callable[[dict[str, Any]], T]) -> Verdict[T]:
        """`read` of the object that the model answers with; asked again where that raises or is no JSON object.

        Args:
          schema: of the object, in JSON Schema; None: any object. A server that knows no structured output is asked
            without it.
          read: takes what is needed out of the object; a KeyError, TypeError or ValueError means that it is not there.

        Raises:
          EndpointError: the server gave no answer; as `MalformedError` none that can be used.
        """
        problem, tokens = "", Tokens()
        for attempt in range(_ATTEMPTS):
            text, taken = self._complete(prompt, schema)
            tokens += taken
            try:
                answer = parse_object(text)
                return Verdict(read(answer), answer, attempt, tokens)
            except (KeyError, TypeError, ValueError) as error:
                problem = f"{type(error).__name__}: {error} in {text[:_SHOWN]!r}"
        raise MalformedError(
            f"{self._endpoint.base_url}: no verdict of {self.config.model} in {_ATTEMPTS} answers: {problem}",
            _ATTEMPTS,
            tokens,
        )

    def _complete(self, prompt: str, schema: Mapping[str, Any] | None) -> tuple[str, Tokens]:
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        if self._structured:
            form: dict[str, Any] = {"type": "json_object"}
            if schema is not None:
                named = {"name": "verdict", "strict": True, "schema": dict(schema)}
                form = {"type": "json_schema", "json_schema": named}
            try:
                return _content(self._endpoint.post("/chat/completions", body | {"response_format": form}))
            except EndpointError as error:
                # A 404 or a 400 may have other causes; the request without a schema then says so once more.
                if error.status not in _REFUSED:
                    raise
            answer = _content(self._endpoint.post("/chat/completions", body))
            self._structured = False
            return answer
        return _content(self._endpoint.post("/chat/completions", body))

    def close(self) -> None:
        self._endpoint.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _content(answer: dict[str, Any]) -> tuple[str, Tokens]:
    try:
        text = answer["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise EndpointError(f"the answer holds no message: {json.dumps(answer)[:_SHOWN]}.", passing=False)
    usage = answer.get("usage")
    counts = [usage.get(key) if isinstance(usage, dict) else 0 for key in ("prompt_tokens", "completion_tokens")]
    return text, Tokens(*(count if type(count) is int and count > 0 else 0 for count in counts))


def parse_object(text: str) -> dict[str, Any]:
    """The last JSON object in a text that may say more around it, such as a thought before or a fence.

    A character that was cut, half of a surrogate pair, becomes a `?`: no file could hold it.

    Raises:
      ValueError: there is none, or it holds NaN or an infinity, as Python's JSON may and no other.
    """
    decoder, found, start = json.JSONDecoder(), None, text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        start = text.find("{", end)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    try:
        return parse_json(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
