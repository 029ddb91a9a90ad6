"""A vLLM server that this process starts, watches and ends: `vllm serve` in the environment that has it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, final

from rich.console import Console

from drift_jax.config import RunConfig, VllmConfig
from drift_jax.endpoint import Endpoint, Retry
from drift_jax.errors import ConfigError, EndpointError, ModelError, StageError
from drift_jax.models.architecture import QwenConfig
from drift_jax.progress import stage_progress
from drift_jax.sampling import supervise

Device = Literal["cuda", "tpu", "cpu"]

SERVED_NAME = "policy"
_HOST = "127.0.0.1"
_SMALLEST_HEAD = 32  # below, vLLM starts, says that it is healthy, and dies at the first request
_LEAST_BATCHED_TOKENS = 4096
_VOCAB_PADDING = 64  # vLLM's
_POLL_S = 0.5
_STOP_S = 60.0
_LAST_LINES = 15
_LOG_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] *)?")
_INSTALL = (
    "Install vLLM into an environment of its own (`pip install vllm` for CUDA, `pip install vllm-tpu` for TPU, "
    "`make test-vllm` builds .venv-vllm for CPU) and name its interpreter: vllm.python."
)


def check_servable(model: QwenConfig, source: Path) -> None:
    """Raises `ModelError` for a model that vLLM would fail on, before anything is started."""
    if model.head_dim < _SMALLEST_HEAD:
        raise ModelError(
            f"{source}: head_dim is {model.head_dim}; vLLM's attention needs {_SMALLEST_HEAD} or more and would die at "
            "the first request. Use sampling.engine local for this model."
        )


def find_device(config: VllmConfig) -> Device:
    """What vLLM is to run on: as the config says, or what this host has."""
    if config.device != "auto":
        return config.device
    if _cuda_devices() > 0:
        return "cuda"
    return "tpu" if _tpu_chips() > 0 else "cpu"


def _cuda_devices() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _tpu_chips() -> int:
    return len(list(Path("/dev").glob("accel[0-9]*"))) or len(list(Path("/dev/vfio").glob("[0-9]*")))


def count_accelerators(device: Device) -> int:
    """Of this host; a CPU is one."""
    return {"cuda": _cuda_devices, "tpu": _tpu_chips, "cpu": lambda: 1}[device]()


def choose_tensor_parallel(config: VllmConfig, model: QwenConfig, device: Device) -> int:
    """As many of the host's accelerators as vLLM can divide the model over.

    It divides heads, the MLP and the padded vocabulary, and kv heads too unless each of them is on several, evenly.
    """
    if config.tensor_parallel is not None:
        return config.tensor_parallel

    vocab = -(-model.vocab_size // _VOCAB_PADDING) * _VOCAB_PADDING

    def divides(ways: int) -> bool:
        whole_heads = model.kv_heads % ways == 0 or ways % model.kv_heads == 0
        return whole_heads and not any(size % ways for size in (model.heads, model.mlp, vocab))

    return next((ways for ways in range(count_accelerators(device), 1, -1) if divides(ways)), 1)


def describe_idle(config: VllmConfig, model: QwenConfig) -> str:
    """A line about accelerators that a server of ours leaves idle; empty where it uses all, or was told how many."""
    device = find_device(config)
    there, used = count_accelerators(device), choose_tensor_parallel(config, model, device)
    if config.tensor_parallel is not None or any("data-parallel" in word for word in config.args) or used == there:
        return ""
    more = f" vllm.args: [--data-parallel-size, '{there // used}'] runs as many copies." if there // used > 1 else ""
    return (
        f"vLLM uses {used} of {there} accelerators: the model's {model.heads} heads, {model.kv_heads} kv heads and MLP "
        f"of {model.mlp} cannot be divided over more.{more}"
    )


def needed_length(config: RunConfig) -> int:
    """Tokens of the longest prompt and completion."""
    return config.sampling.max_input_length + config.sampling.max_new_tokens


def find_python(config: VllmConfig) -> str:
    """The interpreter by a path that holds from any directory. A link stays one: it says whose environment that is."""
    python = os.path.expanduser(config.python or sys.executable)
    return os.path.abspath(python if os.sep in python else shutil.which(python) or python)


def build_command(config: RunConfig, model: QwenConfig, model_dir: Path, port: int) -> list[str]:
    """`vllm serve` and its arguments. The API key is in the environment, where no list of processes shows it."""
    vllm, sampling = config.vllm, config.sampling
    device = find_device(vllm)
    longest = vllm.max_model_len or needed_length(config)
    words = [find_python(vllm), "-m", "vllm.entrypoints.cli.main", "serve", str(model_dir.absolute())]
    options = {
        "--served-model-name": SERVED_NAME,
        "--host": _HOST,
        "--port": port,
        "--dtype": sampling.compute_dtype,
        "--max-model-len": longest,
        # Else the model's generation_config.json changes whatever a request leaves out.
        "--generation-config": "vllm",
        "--logprobs-mode": "raw_logprobs",  # before temperature, top-k and top-p
        "--tensor-parallel-size": choose_tensor_parallel(vllm, model, device),
    }
    if device == "cpu":
        # A request with a seed kills the CPU engine where prompts are read in chunks; so a prompt is read at once.
        options["--max-num-batched-tokens"] = max(longest, _LEAST_BATCHED_TOKENS)
        words += ["--no-enable-chunked-prefill", "--enforce-eager"]
    else:
        options["--gpu-memory-utilization"] = vllm.gpu_memory_utilization
    words += [str(word) for option in options.items() for word in option]
    return [*words, *vllm.args]


def build_environment(config: VllmConfig, key: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The server's environment: ours without what belongs to our own Python, and what vLLM is to be told."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    env = {name: value for name, value in environment.items() if name not in ours}
    env["PATH"] = os.pathsep.join([os.path.dirname(find_python(config)), env.get("PATH", os.defpath)])
    given = {
        "VLLM_API_KEY": key,
        "VLLM_HOST_IP": _HOST,  # its processes talk to each other there, not on the machine's own address
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a directory
        "TRANSFORMERS_OFFLINE": "1",
    }
    if find_device(config) == "cpu":
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    return env | given | config.env


def check_installed(config: VllmConfig, env: Mapping[str, str]) -> None:
    """Raises `ConfigError` where the interpreter is not there or has no vLLM."""
    python = find_python(config)
    if shutil.which(python) is None:
        raise ConfigError(f"vllm.python: there is no program {python}. {_INSTALL}")
    question = "import importlib.util as i, sys; sys.exit(3 if i.find_spec('vllm') is None else 0)"
    answer = subprocess.run([python, "-c", question], env=dict(env), cwd="/", capture_output=True, text=True)
    if answer.returncode == 3:
        raise ConfigError(f"the environment of {python} has no vLLM. {_INSTALL}")
    if answer.returncode != 0:
        raise ConfigError(f"vllm.python: {python} is no Python that works: {answer.stderr.strip()[-300:]}. {_INSTALL}")


def choose_port(config: VllmConfig) -> int:
    """The config's port, or a free one. Raises `StageError` when the config's is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, config.port or 0))
        except OSError as error:
            raise StageError(
                f"vllm.port {config.port} cannot be had on {_HOST}: {error.strerror}. Leave it out for a free one, or "
                "end what listens there."
            ) from None
        return probe.getsockname()[1]


@final
class VllmServer:
    """One server over one model directory. `start` may be called again after it has died.

    Attributes:
      log_path: what the server says; it is never shown unless the server fails.
    """

    def __init__(self, config: RunConfig, model: QwenConfig, model_dir: Path, log_path: Path) -> None:
        self._config, self._model, self._model_dir = config, model, model_dir
        self.log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._key, self._root = "", ""

    def start(self, console: Console) -> None:
        """Returns when the server says that it is healthy.

        Raises:
          ConfigError: no interpreter, or no vLLM there.
          ModelError: a model that vLLM cannot serve.
          StageError: the port is taken; the server ended, or took too long; with its last lines and the log's path.
        """
        self.stop()
        vllm = self._config.vllm
        check_servable(self._model, self._model_dir)
        if idle := describe_idle(vllm, self._model):
            console.print(idle, markup=False)
        self._key = secrets.token_urlsafe(32)
        env = build_environment(vllm, self._key)
        check_installed(vllm, env)
        port = choose_port(vllm)
        self._root = f"http://{_HOST}:{port}"
        command = build_command(self._config, self._model, self._model_dir, port)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: Ctrl-C at our terminal reaches us alone, and we end the server.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", supervise.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=self.log_path.parent,
                start_new_session=True,
            )
        try:
            self._wait(console)
        except BaseException:
            self.stop()
            raise

    def connect(self, retry: Retry | None = None) -> Endpoint:
        """A client of the server, with its key."""
        return Endpoint(f"{self._root}/v1", self._key, self._config.vllm.request_timeout_s, retry)

    def ended(self) -> int | None:
        """The exit code of a server that is no more, 0 if none was started; None while it runs."""
        return 0 if self._process is None else self._process.poll()

    def _wait(self, console: Console) -> None:
        seconds = self._config.vllm.start_timeout_s
        deadline = time.monotonic() + seconds
        with (
            stage_progress("vLLM starts", 1, "servers", console=console) as bar,
            Endpoint(self._root, self._key, 5.0, Retry(attempts=1)) as root,
        ):
            while True:
                code = self.ended()
                if code is not None:
                    raise StageError(f"vLLM ended while it started, with exit code {code}. {self.last_lines()}")
                with contextlib.suppress(EndpointError):
                    root.get("/health")
                    bar.advance(1, "")
                    return
                if time.monotonic() > deadline:
                    raise StageError(
                        f"vLLM was not ready after {seconds:g} s. Raise vllm.start_timeout_s if it was still at work. "
                        f"{self.last_lines()}"
                    )
                said = self._said()
                bar.advance(0, _LOG_PREFIX.sub("", said[-1])[:80] if said else None)
                time.sleep(_POLL_S)

    def last_lines(self) -> str:
        """The end of this server's log, and where all of it is."""
        lines = "\n  ".join(self._said()[-_LAST_LINES:])
        return f"Its last lines, of {self.log_path}:\n  {lines}"

    def _said(self) -> list[str]:
        try:
            with self.log_path.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - 20_000))
                lines = log.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return []
        return [line for line in lines if line.strip()]

    def stop(self) -> None:
        """Ends the server and its children; returns when they are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            for pid in (*supervise.descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            process.wait()

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
