"""Sampling from vLLM servers: token ids go there, and token ids, their log-probs and how they ended come back.

A request is one completion. It goes to the live server with the fewest in flight, with everything that shapes it
written out, so that neither the server's defaults nor the model's generation_config.json have a say.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

from drift_jax.endpoint import Endpoint
from drift_jax.errors import EndpointError, StageError
from drift_jax.sampling.base import Completion, OnBatch, Sampler, SampleRequest, SamplingParams
from drift_jax.sampling.draw import row_words

# vLLM refuses more entries of logit_bias than 1024 (its model runner V2).
_MOST_BIASES = 1024
_NEVER = -100.0  # the lowest bias of OpenAI's protocol: at temperature 1 a factor of 4e-44
_ABORTS = 2  # of a request, after which it is sent again
_MOST_REVIVALS = 3  # of a server, without a completion in between


class AbortedError(EndpointError):
    """A completion that neither stopped nor reached its length."""


def seed_of(seed: int, request: SampleRequest) -> int:
    """The seed of one completion, 63 bits of (seed, row id, sample): the same on any server, in any order."""
    first, second = row_words([(request.row_id, request.sample)])[0].tolist()
    digest = hashlib.sha256(f"{seed}:{first}:{second}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def build_body(name: str, request: SampleRequest, params: SamplingParams, model_vocab: int) -> dict[str, Any]:
    """A request for /v1/completions.

    Args:
      name: the server's name of the model.
      model_vocab: rows of the embedding table. Those from `params.vocab_size` on are biased away, where vLLM can; what
        comes back is checked in any case.
    """
    padding = range(params.vocab_size, model_vocab)
    bias = {str(i): _NEVER for i in padding} if 0 < len(padding) <= _MOST_BIASES else None
    return {
        "model": name,
        "prompt": list(request.prompt_ids),
        "n": 1,
        "max_tokens": params.max_new_tokens,
        "min_tokens": 0,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed_of(params.seed, request),
        # Only these ids end a completion: what the model's files say of EOS is in them, or does not count.
        "ignore_eos": True,
        "stop": [],
        "stop_token_ids": list(params.eos_ids),
        "skip_special_tokens": False,
        "add_special_tokens": False,
        "logprobs": 0,  # of the drawn tokens alone
        "return_token_ids": True,
        "stream": False,
    } | ({} if bias is None else {"logit_bias": bias})


def read_completion(answer: Any, request: SampleRequest, params: SamplingParams, source: str) -> Completion:
    """What a server answered to `build_body`.

    Raises:
      AbortedError: the server gave up on the request.
      EndpointError: no token ids or log-probs, another prompt, an end that is none of ours, or tokens that only pad the
        vocabulary.
    """

    def refuse(why: str) -> EndpointError:
        return EndpointError(f"{source}: the answer for row {request.row_id} {why}", passing=False)

    try:
        choice = answer["choices"][0]
        reason, ids = choice["finish_reason"], choice["token_ids"]
        if reason not in ("stop", "length"):
            raise AbortedError(f"{source}: row {request.row_id} ended with finish_reason {reason!r}.", passing=True)
        logps = choice["logprobs"]["token_logprobs"]
        prompt = answer["usage"]["prompt_tokens"]
        ids, logps = tuple(map(int, ids)), tuple(map(float, logps))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise refuse(
            f"lacks token ids or log-probs ({type(error).__name__}: {error}). vLLM 0.10.2 or newer is needed, which "
            "knows return_token_ids."
        ) from None
    if prompt != len(request.prompt_ids):
        raise refuse(f"is for a prompt of {prompt} tokens; {len(request.prompt_ids)} were sent.")
    if len(logps) != len(ids) or not ids or not all(map(math.isfinite, logps)):
        raise refuse(f"has {len(ids)} tokens and {sum(map(math.isfinite, logps))} finite log-probs.")
    if max(ids) >= params.vocab_size:
        raise refuse(
            f"holds token {max(ids)}; the tokenizer has {params.vocab_size} ids, later ones only pad the model's "
            "vocabulary. Use sampling.engine local, or a model directory whose tokenizer belongs to it."
        )
    if reason == "stop" and ids[-1] not in params.eos_ids:
        raise refuse(f"stopped at token {ids[-1]}, which is none of {list(params.eos_ids)}.")
    if reason == "length" and len(ids) != params.max_new_tokens:
        raise refuse(
            f"was cut after {len(ids)} of {params.max_new_tokens} tokens. Start the server with a longer "
            "--max-model-len: sampling.max_input_length + sampling.max_new_tokens."
        )
    return Completion(request.row_id, request.sample, ids, reason, logps)


@final
class Served:
    """A model on a server, and how many requests are on their way to it."""

    def __init__(self, endpoint: Endpoint, name: str) -> None:
        self.endpoint, self.name = endpoint, name
        self.in_flight = 0


@final
class _Work:
    """What is still to be drawn and by whom; shared by the threads of one call of `sample`."""

    def __init__(self, count: int, servers: Sequence[Served], concurrency: int) -> None:
        self._waiting = deque(range(count))
        self._live = list(servers)
        self._concurrency = concurrency
        self._changed = threading.Condition()
        self._over = False

    def take(self) -> tuple[int, Served] | None:
        """A request and the server with the fewest in flight; None when all is over."""
        with self._changed:
            while not self._over:
                free = [server for server in self._live if server.in_flight < self._concurrency]
                if self._waiting and free:
                    server = min(free, key=lambda s: s.in_flight)
                    server.in_flight += 1
                    return self._waiting.popleft(), server
                self._changed.wait()
        return None

    def done(self, server: Served) -> None:
        with self._changed:
            server.in_flight -= 1
            self._changed.notify()

    def give_back(self, index: int, server: Served) -> bool:
        """The request waits again, and the server gets no further one. Whether it was among the live ones."""
        with self._changed:
            self._waiting.appendleft(index)
            server.in_flight -= 1
            was_live = server in self._live
            self._live = [other for other in self._live if other is not server]
            self._changed.notify_all()
            return was_live

    def add(self, server: Served) -> None:
        with self._changed:
            self._live.append(server)
            self._changed.notify_all()

    @property
    def live(self) -> int:
        return len(self._live)

    def end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()


@final
class VllmSampler(Sampler):
    """Samples from servers that have been shown to answer with the policy (see `handoff`).

    Args:
      model_vocab: rows of the policy's embedding table.
      concurrency: requests in flight per server.
      revive: brings back a server of our own that has died; None: servers that others run are left out.
      report: takes a line for the user.
    """

    def __init__(
        self,
        servers: Sequence[Served],
        model_vocab: int,
        concurrency: int,
        revive: Callable[[], Served] | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self._servers, self._model_vocab, self._concurrency = list(servers), model_vocab, concurrency
        self._revive, self._report = revive, report

    def sample(
        self, requests: Iterable[SampleRequest], params: SamplingParams, on_batch: OnBatch | None = None
    ) -> list[Completion]:
        """As in the base class; completions come to `on_batch` in the order in which they end.

        Raises:
          EndpointError: a server refuses a request, or answers what cannot be used.
          StageError: no server is left. What came to `on_batch` before is not lost.
        """
        requests = list(requests)
        work = _Work(len(requests), self._servers, self._concurrency)
        news: queue.Queue[Any] = queue.Queue()

        def draw() -> None:
            while (job := work.take()) is not None:
                index, server = job
                try:
                    completion = self._draw(server, requests[index], params)
                    work.done(server)  # before the news, after which `sample` may return and be called again
                    news.put((index, completion))
                except EndpointError as error:
                    was_live = work.give_back(index, server)
                    if was_live or not error.passing:
                        news.put((server, error))
                except BaseException as error:  # a bug of ours: shown by the caller's thread
                    news.put((server, error))
                    return

        # Daemons: on Ctrl-C nobody waits for what a server may still answer.
        threads = min(len(requests), self._concurrency * len(self._servers))
        for _ in range(threads):
            threading.Thread(target=draw, daemon=True).start()
        done: dict[int, Completion] = {}
        deaths = 0
        try:
            while len(done) < len(requests):
                fresh, lost, fatal = _read_news(news)
                done |= fresh
                if fresh and on_batch is not None:
                    on_batch(list(fresh.values()))
                if fatal is not None:
                    raise fatal
                deaths = 0 if fresh else deaths
                for server, error in lost:
                    deaths += 1
                    self._replace(work, server, error, deaths)
        finally:
            work.end()
        return [done[i] for i in range(len(requests))]

    def _draw(self, server: Served, request: SampleRequest, params: SamplingParams) -> Completion:
        body = build_body(server.name, request, params, self._model_vocab)
        for attempt in range(_ABORTS + 1):
            try:
                answer = server.endpoint.post("/completions", body)
                return read_completion(answer, request, params, server.endpoint.base_url)
            except EndpointError as error:
                # Of a server that answers: someone has aborted the request, as a pause for new weights may do.
                if not isinstance(error, AbortedError) or attempt == _ABORTS:
                    raise
        raise AssertionError("unreachable")

    def _replace(self, work: _Work, server: Served, error: EndpointError, deaths: int) -> None:
        """What follows from a server that does not answer: another start, or one server less."""
        self._servers = [other for other in self._servers if other is not server]
        if self._revive is None:
            if not work.live:
                raise StageError(
                    f"no server of vllm.base_urls is left; the last one: {error} What was sampled is kept: start one "
                    "and run again, it goes on from here."
                )
            self._report(f"left out, its requests go to the other {work.live}: {error}")
            return
        if deaths > _MOST_REVIVALS:
            raise StageError(f"vLLM has died {deaths} times without a completion in between; the last time: {error}")
        self._report(f"vLLM has died and is started again: {error}")
        revived = self._revive()
        self._servers.append(revived)
        work.add(revived)


def _read_news(
    news: queue.Queue[Any],
) -> tuple[dict[int, Completion], list[tuple[Served, EndpointError]], BaseException | None]:
    """Waits for news and takes all there is.

    Returns:
      completions by index; servers with what they died of; what is no server's death: a refusal, or an error of ours.
    """
    fresh: dict[int, Completion] = {}
    lost: list[tuple[Served, EndpointError]] = []
    item = news.get()
    while True:
        what, value = item
        if isinstance(value, Completion):
            fresh[what] = value
        elif isinstance(value, EndpointError) and value.passing:
            lost.append((what, value))
        else:
            return fresh, lost, value
        try:
            item = news.get_nowait()
        except queue.Empty:
            return fresh, lost, None
