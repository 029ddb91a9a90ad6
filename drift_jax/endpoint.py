"""A server that speaks OpenAI's HTTP protocol: one place for keys, timeouts, retries and what errors say.

The sampler's vLLM servers and judges are both reached through it. The API key comes from the environment, is sent and
never printed.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, final

import httpx2

from drift_jax.errors import ConfigError, EndpointError

_CONNECT_S = 10
_SHOWN = 500  # characters of a refusal
# Too many requests, and what a server says while it starts, is overloaded or behind a proxy that lost it.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Retry:
    """How often a request is sent, and how long to wait in between: doubled each time, with jitter."""

    attempts: int = 5
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0

    def wait_s(self, attempt: int, asked_s: float | None) -> float:
        """Seconds after attempt 0, 1, ...; what the server asks for wins if it is longer."""
        wait = min(self.longest_wait_s, self.first_wait_s * 2**attempt) * random.uniform(0.5, 1.0)
        return max(wait, min(asked_s or 0.0, self.longest_wait_s))


def read_api_key(variable: str) -> str | None:
    """The key in an environment variable; an empty name means that the server asks for none.

    Raises:
      ConfigError: the variable is not set, or what it holds cannot be sent as a key; never says what that is.
    """
    if not variable:
        return None
    key = os.environ.get(variable, "").strip()  # `$(cat FILE)` of another shell keeps the end of the line
    if not key:
        raise ConfigError(f"the environment variable {variable} is to hold an API key and is not set.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"what the environment variable {variable} holds is no API key: it has spaces, line ends or other "
            "characters that no HTTP header can carry. Export the key alone."
        )
    return key


@final
class Endpoint:
    """One server. Threads may share it.

    Args:
      base_url: with the `/v1` of the protocol, such as http://127.0.0.1:8000/v1.
      timeout_s: for an answer to begin; connecting has its own, shorter one.
      wait_turn: called before every request that is sent, repeated ones too; it may wait, or raise.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry: Retry | None = None,
        sleep: Callable[[float], None] = time.sleep,
        wait_turn: Callable[[], None] | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._api_key, self._timeout_s = api_key, timeout_s
        self._retry, self._sleep, self._wait_turn = retry or Retry(), sleep, wait_turn
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx2.Timeout(timeout_s, connect=_CONNECT_S)
        # trust_env: a proxy of the environment must not get what is for a server on this machine.
        self._client = httpx2.Client(headers=headers, timeout=timeout, limits=limits, trust_env=not is_local(base_url))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Sends JSON to `base_url + path` and returns the JSON that comes back, after as many attempts as it takes.

        Raises:
          EndpointError: no answer, a refusal, or no JSON; `passing` says whether trying again later may help.
        """
        return self._repeat("POST", path, body)

    def get(self, path: str) -> dict[str, Any]:
        """As `post`, without a body."""
        return self._repeat("GET", path, None)

    def beside(self, base_url: str, retry: Retry | None = None) -> Endpoint:
        """Another address of the same server, with the same key; its own `retry` if it is given."""
        return Endpoint(base_url, self._api_key, self._timeout_s, retry or self._retry, self._sleep, self._wait_turn)

    def _repeat(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        for attempt in range(self._retry.attempts):
            try:
                return self._send(method, path, body)
            except EndpointError as error:
                if not error.passing or attempt == self._retry.attempts - 1:
                    raise
                self._sleep(self._retry.wait_s(attempt, error.retry_after_s))
        raise AssertionError("unreachable")

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        url = self.base_url + path
        if self._wait_turn is not None:
            self._wait_turn()
        try:
            answer = self._client.request(method, url, json=body)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:
            raise EndpointError(
                f"{url!a}: no request can be sent there ({type(error).__name__}: {error!s:.{_SHOWN}}). Write the "
                "address as http://HOST:PORT/v1.",
                passing=False,
            ) from error
        except httpx2.HTTPError as error:
            raise EndpointError(f"{url}: no answer ({type(error).__name__}: {error}).", passing=True) from error
        if answer.is_error:
            text = self._without_key(answer.text)[:_SHOWN]
            raise EndpointError(
                f"{url}: {answer.status_code} {answer.reason_phrase}: {text}",
                passing=answer.status_code in _PASSING,
                status=answer.status_code,
                retry_after_s=_seconds(answer.headers.get("Retry-After")),
            )
        if not answer.content:
            return {}
        text = self._without_key(answer.text)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise EndpointError(f"{url}: the answer is not JSON: {text[:_SHOWN]!r}.", passing=False) from None
        if not isinstance(found, dict):
            raise EndpointError(f"{url}: the answer is not a JSON object: {text[:_SHOWN]!r}.", passing=False)
        return found

    def _without_key(self, text: str) -> str:
        """Some servers repeat the key that they refuse; what they answer is shown, and kept in files."""
        return text.replace(self._api_key, "...") if self._api_key else text

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_local(base_url: str) -> bool:
    """Whether a server is on this machine. What is no address is nowhere: a request to it says so."""
    try:
        return httpx2.URL(base_url).host in ("127.0.0.1", "::1", "localhost")
    except (httpx2.InvalidURL, UnicodeError):
        return False


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header in seconds; its other form, a date, is not looked at."""
    try:
        return float(retry_after) if retry_after else None
    except ValueError:
        return None
