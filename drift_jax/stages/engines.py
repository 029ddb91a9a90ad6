"""The engines of `sampling.engine`: who draws the completions of a sample stage, and what has to be there for it."""

from __future__ import annotations

import abc
import contextlib
import io
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import final

import jax
from rich.console import Console
from rich.markup import escape

from drift_jax.config import RunConfig
from drift_jax.distributed import gather
from drift_jax.endpoint import Endpoint, Retry, is_local, read_api_key
from drift_jax.errors import ConfigError, EndpointError, StageError
from drift_jax.models.hf import load_qwen_config
from drift_jax.sampling.base import Completion, OnBatch, Sampler, SampleRequest, SamplingParams
from drift_jax.sampling.handoff import (
    check_handoff,
    compare_logps,
    compute_apart,
    probe_ids,
    server_logps,
)
from drift_jax.sampling.local import LocalSampler, split_policy
from drift_jax.sampling.running import find_model, full_url, reload_weights
from drift_jax.sampling.server import (
    SERVED_NAME,
    VllmServer,
    build_environment,
    check_installed,
    check_servable,
    needed_length,
)
from drift_jax.sampling.vllm import Served, VllmSampler
from drift_jax.stages.devices import describe_split, free_memory, rows_that_fit, sampling_layout
from drift_jax.stages.inputs import open_policy, open_tokenizer

_OWN_RETRY = Retry(attempts=3)  # of a server on this machine that we can start again


class Engine(abc.ABC):
    """What a sample stage asks before and while it samples from the policy in one directory."""

    per_host: bool  # whether every host samples a share of its own

    @abc.abstractmethod
    def open(
        self, missing: Sequence[SampleRequest], out_dir: Path, console: Console
    ) -> contextlib.AbstractContextManager[Sampler]:
        """The sampler, while the block lasts. `missing`: what this host is going to ask of it."""


@final
class LocalEngine(Engine):
    """The sampler in JAX. Raises `ConfigError` when `sampling.batch_size` cannot be split over the devices."""

    def __init__(self, config: RunConfig, model_dir: Path) -> None:
        self._config, self._model_dir = config, model_dir
        self._layout, self.per_host = sampling_layout(config, model_dir)

    @contextlib.contextmanager
    def open(self, missing: Sequence[SampleRequest], out_dir: Path, console: Console) -> Iterator[Sampler]:
        if not any(gather(bool(missing))):
            yield _Idle()
            return
        dtype = self._config.sampling.compute_dtype
        policy = split_policy(open_policy(self._model_dir, self._layout, dtype, dtype, console))
        rows = self._config.sampling.batch_size
        if rows is None:  # on a mesh of all hosts they must agree
            rows = min(gather(rows_that_fit(self._config, self._layout, policy.config, free_memory())))
        console.print(describe_split(self._layout, rows), highlight=False, soft_wrap=True)
        yield LocalSampler(policy, rows, self._config.model.attention)


@final
class VllmEngine(Engine):
    """vLLM servers. This process leaves the accelerator to them; what it compares them with is computed before.

    Raises `ModelError` for a model that vLLM cannot serve, `ConfigError` when there is no vLLM to start, when several
    processes would start one on the same devices, or when the variable of the API key is not set.
    """

    def __init__(self, config: RunConfig, model_dir: Path) -> None:
        self.per_host = jax.process_count() > 1
        self._config, self._model_dir = config, model_dir
        self._model = load_qwen_config(model_dir)
        check_servable(self._model, model_dir)
        self._key = None
        if config.vllm.base_urls:
            self._key = read_api_key(config.vllm.api_key_env)
        else:
            check_installed(config.vllm, build_environment(config.vllm, ""))
            check_own_devices(gather(f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}"))

    @contextlib.contextmanager
    def open(self, missing: Sequence[SampleRequest], out_dir: Path, console: Console) -> Iterator[Sampler]:
        if not missing:
            yield _Idle()
            return
        with contextlib.ExitStack() as stack:
            servers: list[Served]
            revive: Callable[[], Served] | None
            if self._config.vllm.base_urls:
                servers, revive = self._connect(stack, self._expect(out_dir, console), console), None
            else:
                log = out_dir / (f"vllm.{jax.process_index()}.log" if jax.process_index() else "vllm.log")
                server = stack.enter_context(VllmServer(self._config, self._model, self._model_dir, log))
                expected = self._expect(out_dir, console)

                def start(console: Console) -> Served:
                    server.start(console)
                    served = Served(server.connect(_OWN_RETRY), SERVED_NAME)
                    stack.callback(served.endpoint.close)
                    self._prove(served, expected, f"the server that was started ({log})")
                    return served

                # When a server is started again, the bar of the stage is on the screen already.
                servers, revive = [start(console)], lambda: start(Console(file=io.StringIO()))
            vllm = self._config.vllm
            yield VllmSampler(
                servers, self._model.vocab_size, vllm.concurrency, revive, lambda line: _tell(console, line)
            )

    def _expect(self, out_dir: Path, console: Console) -> list[list[float]]:
        """Log-probs of the probe texts under the policy. On the CPU where servers may hold the accelerator already."""
        urls = self._config.vllm.base_urls
        on_cpu = any(map(is_local, urls)) or jax.process_count() > 1
        dtype = self._config.sampling.compute_dtype
        name = f"probe.{jax.process_index()}.json" if jax.process_index() else "probe.json"
        out_dir.mkdir(parents=True, exist_ok=True)
        with console.status("computing the log-probs that the server must have"):
            return compute_apart(self._model_dir, dtype, needed_length(self._config), out_dir / name, on_cpu)

    def _prove(self, served: Served, expected: list[list[float]], source: str) -> None:
        """Raises `StageError` unless a server answers with the policy's weights."""
        texts = probe_ids(open_tokenizer(self._model_dir), needed_length(self._config))
        found = compare_logps(expected, server_logps(served.endpoint, served.name, texts))
        check_handoff(found, self._config.sampling.compute_dtype, source, self._model_dir, self._model.tied)

    def _connect(self, stack: contextlib.ExitStack, expected: list[list[float]], console: Console) -> list[Served]:
        """The servers of `vllm.base_urls` that answer, each with the policy."""
        vllm, servers, dead = self._config.vllm, [], []
        for url in vllm.base_urls:
            endpoint = stack.enter_context(Endpoint(full_url(url), self._key, vllm.request_timeout_s))
            try:
                name, root = find_model(endpoint, self._config)
                kept = reload_weights(endpoint, root, self._model_dir, vllm.refresh)
                served = Served(endpoint, name)
                source = endpoint.base_url + (f" (new weights were not loaded: {kept})" if kept else " (just reloaded)")
                self._prove(served, expected, source)
            except EndpointError as error:
                if not error.passing:
                    raise
                dead.append(str(error))
                _tell(console, f"left out: {error}")
            else:
                servers.append(served)
        if not servers:
            raise StageError(
                "none of the servers of vllm.base_urls answers:\n  "
                + "\n  ".join(dead)
                + "\nStart one, or leave base_urls empty to have one started here."
            )
        return servers


def check_own_devices(places: Sequence[str]) -> None:
    """Raises `ConfigError` where two processes would start servers in one place: the host and the devices they see."""
    place, count = Counter(places).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"{count} processes of this run are on {place.split()[0]} and see the same devices: each would start "
            "a vLLM server on all of them. Run one process per host, give each its own CUDA_VISIBLE_DEVICES, or start "
            "the servers yourself and name them in vllm.base_urls."
        )


@final
class _Idle(Sampler):
    """For a host that has everything already."""

    def sample(self, requests: object, params: SamplingParams, on_batch: OnBatch | None = None) -> list[Completion]:
        return []


def _tell(console: Console, line: str) -> None:
    console.print(f"[yellow]vLLM:[/] {escape(line)}", soft_wrap=True, highlight=False)


ENGINES: Mapping[str, Callable[[RunConfig, Path], Engine]] = {"local": LocalEngine, "vllm": VllmEngine}
