"""Small HTTP servers on free ports that stand for vLLM servers which misbehave; ids come from the request alone."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Answer = tuple[int, Any]  # status, JSON; status 0: the connection is dropped


class Small(ThreadingHTTPServer):
    """Answers with `reply(path, body)`. `seen` holds (path, body), `most` how many were in flight at once."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reply: Callable[[str, Any], Answer], delay_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.delay_s = reply, delay_s
        self.seen: list[tuple[str, Any]] = []
        self.lock, self.in_flight, self.most = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Small  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        small = self.server
        with small.lock:
            small.seen.append((self.path, body))
            small.in_flight += 1
            small.most = max(small.most, small.in_flight)
        time.sleep(small.delay_s)
        with small.lock:
            small.in_flight -= 1
        status, answer = small.reply(self.path, body)
        if status == 0:
            self.close_connection = True
            return
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


Server = TypeVar("Server", bound=ThreadingHTTPServer)


@contextlib.contextmanager
def answering(server: Server) -> Iterator[Server]:
    """It answers while the block lasts, whose end it looks for often: every half second made half a second a test."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def serve(reply: Callable[[str, Any], Answer], delay_s: float = 0.0) -> contextlib.AbstractContextManager[Small]:
    return answering(Small(reply, delay_s))


def completion(body: Any, **changes: Any) -> Answer:
    """What vLLM answers: three ids that come from the seed; `changes` replaces parts of the choice."""
    ids = [body["seed"] % 50, body["seed"] % 7, 9]
    choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": ids}
    choice |= {"logprobs": {"token_logprobs": [-1.0] * len(ids)}} | changes
    return 200, {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"])}}
