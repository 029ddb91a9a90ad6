"""The HTTP client against a server that misbehaves on purpose; it is a real one, on a free port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from drift_jax.endpoint import Endpoint, Retry, is_local, read_api_key
from drift_jax.errors import ConfigError, EndpointError
from tests.http_servers import answering


class Moody(ThreadingHTTPServer):
    """Gives the answers of a list, one a request; what came is kept."""

    answers: list[tuple[int, str, dict[str, str]]]
    seen: list[tuple[str, dict[str, str], Any]]


class Handler(BaseHTTPRequestHandler):
    server: Moody  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        self.server.seen.append((self.path, dict(self.headers), body))
        status, text, headers = self.server.answers.pop(0)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Moody]:
    moody = Moody(("127.0.0.1", 0), Handler)
    moody.answers, moody.seen = [], []
    with answering(moody):
        yield moody


def connect(server: Moody, waits: list[float] | None = None, **given: Any) -> Endpoint:
    waits = [] if waits is None else waits
    return Endpoint(f"http://127.0.0.1:{server.server_port}/v1/", sleep=waits.append, **given)


def test_sends_json_and_the_key(server: Moody) -> None:
    server.answers = [(200, '{"a": 1}', {}), (200, '{"b": 2}', {}), (200, "", {})]
    with connect(server, api_key="secret") as endpoint:
        assert endpoint.post("/completions", {"prompt": [1, 2]}) == {"a": 1}
        assert endpoint.get("/models") == {"b": 2}
        assert endpoint.get("/health") == {}
    path, headers, body = server.seen[0]
    assert (path, headers["Authorization"], body) == ("/v1/completions", "Bearer secret", {"prompt": [1, 2]})


def test_waits_longer_each_time_and_as_long_as_it_is_asked_to(server: Moody) -> None:
    server.answers = [(503, "", {}), (429, "", {"Retry-After": "7"}), (500, "", {}), (200, "{}", {})]
    waits: list[float] = []
    assert connect(server, waits).post("/x", {}) == {}
    assert 0.25 <= waits[0] <= 0.5 and waits[1] == 7 and 1 <= waits[2] <= 2


def test_gives_up_after_the_attempts(server: Moody) -> None:
    server.answers = [(503, "busy", {})] * 3
    with pytest.raises(EndpointError, match="503 Service Unavailable: busy") as caught:
        connect(server, retry=Retry(attempts=3)).post("/x", {})
    assert caught.value.passing and caught.value.status == 503 and not server.answers


def test_a_refusal_is_not_repeated(server: Moody) -> None:
    server.answers = [(400, "no such model", {}), (200, "{}", {})]
    with pytest.raises(EndpointError, match="no such model") as caught:
        connect(server, api_key="secret").post("/x", {})
    assert not caught.value.passing and len(server.seen) == 1 and "secret" not in str(caught.value)


def test_no_server_and_no_json(server: Moody) -> None:
    server.answers = [(200, "<html>", {})]
    with pytest.raises(EndpointError, match="not JSON"):
        connect(server).post("/x", {})
    gone = Endpoint("http://127.0.0.1:9/v1", retry=Retry(attempts=2), sleep=lambda _: None)
    with pytest.raises(EndpointError, match="no answer") as caught:
        gone.get("/models")
    assert caught.value.passing and caught.value.status is None


@pytest.mark.parametrize(
    "url",
    ["http://HOST:PORT/v1", "http://127.0.0.1:8000/v1\n", "http://ü-.de/v1", f"http://{'a' * 64}.de/v1", "10.0.0.2/v1"],
)
def test_what_is_no_address_is_said_once(url: str) -> None:
    assert not is_local(url)
    with pytest.raises(EndpointError, match="no request can be sent there .*http://HOST:PORT/v1") as caught:
        Endpoint(url, sleep=lambda _: pytest.fail("it was sent again")).get("/models")
    assert not caught.value.passing and caught.value.status is None


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_KEY", "k")
    assert read_api_key("OUR_KEY") == "k" and read_api_key("") is None
    monkeypatch.delenv("OUR_KEY")
    with pytest.raises(ConfigError, match="OUR_KEY"):
        read_api_key("OUR_KEY")
