"""What is prepared, refused and cleaned up around a vLLM server, as far as no vLLM is needed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drift_jax.config import RunConfig, build_config
from drift_jax.endpoint import Endpoint, Retry
from drift_jax.errors import ConfigError, DriftError, EndpointError, ModelError, StageError
from drift_jax.models.architecture import qwen_config_from_hf
from drift_jax.models.hf import load_qwen_config
from drift_jax.models.published import ARCHITECTURES
from drift_jax.sampling import supervise
from drift_jax.sampling.handoff import check_handoff, compare_logps, server_logps
from drift_jax.sampling.running import find_model, full_url, reload_weights
from drift_jax.sampling.server import (
    VllmServer,
    build_command,
    build_environment,
    check_installed,
    check_servable,
    choose_port,
    choose_tensor_parallel,
    describe_idle,
)
from drift_jax.stages.engines import check_own_devices
from tests.http_servers import serve
from tests.tiny_models import build_tiny_model

QUIET = Console(file=io.StringIO())


def make(**vllm: Any) -> RunConfig:
    raw = {"run_dir": "x", "model": {"path": "x"}, "sampling": {"max_input_length": 100, "max_new_tokens": 28}}
    return build_config(raw | {"vllm": vllm})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("server") / "model", hidden_size=128)


# --- the command and its environment ----------------------------------------------------------------------


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command_says_everything(model_dir: Path) -> None:
    config = make(python="/env/bin/python", device="cpu", args=["--swap-space", "1"])
    command = build_command(config, load_qwen_config(model_dir), model_dir, 8123)
    assert command[0] == "/env/bin/python" and str(model_dir) in command and command[-2:] == ["--swap-space", "1"]
    assert option(command, "--generation-config") == "vllm" and option(command, "--host") == "127.0.0.1"
    assert option(command, "--max-model-len") == "128" and option(command, "--dtype") == "bfloat16"
    assert "--no-enable-chunked-prefill" in command and "--gpu-memory-utilization" not in command
    assert int(option(command, "--max-num-batched-tokens")) >= 128
    gpu = build_command(make(device="cuda", tensor_parallel=2), load_qwen_config(model_dir), model_dir, 8123)
    assert option(gpu, "--tensor-parallel-size") == "2" and option(gpu, "--gpu-memory-utilization") == "0.9"
    assert "--no-enable-chunked-prefill" not in gpu


def test_the_model_is_split_over_as_many_gpus_as_its_heads_allow(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_qwen_config(model_dir)  # 4 heads
    for visible, ways in (("0,1,2,3", 4), ("0,1,2", 2), ("1", 1), ("", 1), ("-1", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert choose_tensor_parallel(make().vllm, model, "cuda") == ways


@pytest.mark.parametrize(
    ("name", "gpus", "ways", "copies"),
    [
        ("qwen2.5-7b", 8, 4, 2),  # 28 heads, 4 kv heads, MLP of 18944: seven would divide the heads alone
        ("qwen2.5-1.5b", 8, 4, 2),  # 12 heads, 2 kv heads, each on two
        ("qwen2.5-0.5b", 8, 2, 4),  # 14 heads, 2 kv heads
        ("qwen2.5-14b", 8, 8, 1),
        ("qwen2.5-3b", 3, 2, 1),
        ("qwen3-8b", 6, 4, 1),  # 32 heads
    ],
)
def test_a_published_model_is_split_as_vllm_can(
    name: str, gpus: int, ways: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    model = qwen_config_from_hf(ARCHITECTURES[name], name)
    auto = make(device="cuda")
    assert choose_tensor_parallel(auto.vllm, model, "cuda") == ways
    line = describe_idle(auto.vllm, model)
    assert (f"vLLM uses {ways} of {gpus} accelerators" in line) == (ways < gpus)
    assert (f"[--data-parallel-size, '{copies}']" in line) == (copies > 1)
    for said in ({"tensor_parallel": ways}, {"args": [f"--data-parallel-size={copies}"]}):
        assert not describe_idle(make(device="cuda", **said).vllm, model)


def test_vllm_divides_the_padded_vocabulary_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    model = qwen_config_from_hf(ARCHITECTURES["qwen2.5-1.5b"], "qwen2.5-1.5b")
    thirds = dataclasses.replace(model, heads=12, kv_heads=3, mlp=6144)
    for vocab, ways in ((64 * 2374, 1), (64 * 2373, 3), (64 * 2372 + 1, 3)):
        assert choose_tensor_parallel(make().vllm, dataclasses.replace(thirds, vocab_size=vocab), "cuda") == ways


def test_the_key_is_in_the_environment_and_ours_stays_out() -> None:
    ours = {"PYTHONPATH": "/ours", "VIRTUAL_ENV": "/ours", "PATH": "/bin", "JAX_PLATFORMS": "tpu"}
    env = build_environment(make(python="/env/bin/python", device="cpu", env={"A": "b"}).vllm, "secret", ours)
    assert env["VLLM_API_KEY"] == "secret" and env["A"] == "b" and env["VLLM_HOST_IP"] == "127.0.0.1"
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & env.keys() and env["JAX_PLATFORMS"] == "tpu"
    assert env["PATH"].startswith("/env/bin")


def test_a_config_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len \(100\).*\(128\)"):
        make(max_model_len=100)
    hot = {"run_dir": "x", "model": {"path": "x"}, "sampling": {"engine": "vllm", "temperature": 2.5}}
    with pytest.raises(ConfigError, match=r"sampling.temperature \(2.5\) is more than the 2.0 that vLLM takes"):
        build_config(hot)
    with pytest.raises(ConfigError, match=r"vllm.base_urls: 'localhost:8000' is no address"):
        make(base_urls=["localhost:8000"])
    with pytest.raises(ConfigError, match=r"vllm.env.A: .*found 1"):
        make(env={"A": 1})


# --- what stops a start -----------------------------------------------------------------------------------


def test_small_heads_are_refused_before_anything_starts(model_dir: Path) -> None:
    model = load_qwen_config(model_dir)
    check_servable(model, model_dir)
    with pytest.raises(ModelError, match="head_dim is 16.*32 or more.*sampling.engine local"):
        check_servable(dataclasses.replace(model, head_dim=16), model_dir)


def test_no_interpreter_and_no_vllm() -> None:
    with pytest.raises(ConfigError, match=r"no program /nowhere/python.*pip install vllm-tpu.*vllm.python"):
        check_installed(make(python="/nowhere/python").vllm, os.environ)
    with pytest.raises(ConfigError, match="has no vLLM.*pip install vllm"):
        check_installed(make().vllm, build_environment(make().vllm, ""))
    with pytest.raises(ConfigError, match="is no Python that works"):
        check_installed(make(python="/bin/false").vllm, os.environ)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StageError, match=f"vllm.port {port} cannot be had.*in use.*Leave it out"):
            choose_port(make(port=port).vllm)
    assert choose_port(make(port=port).vllm) == port
    assert choose_port(make().vllm) != choose_port(make().vllm)


def fake_environment(folder: Path, program: str) -> Path:
    """An interpreter whose `vllm serve` is `program`; for what comes before a real vLLM would be up."""
    package = folder / "lib" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for place in (package, package.parent, package.parent.parent):
        (place / "__init__.py").write_text("")
    (package / "main.py").write_text(program)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/lib exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_a_server_that_ends_at_once_shows_its_last_lines(model_dir: Path, tmp_path: Path) -> None:
    python = fake_environment(tmp_path, "import sys\nprint('no kernel image')\nsys.exit(7)\n")
    config = make(python=str(python), device="cpu")
    log = tmp_path / "stage" / "vllm.log"
    server = VllmServer(config, load_qwen_config(model_dir), model_dir, log)
    with pytest.raises(StageError) as caught:
        server.start(QUIET)
    assert "exit code 7" in str(caught.value) and "no kernel image" in str(caught.value)
    assert str(log) in str(caught.value)


def test_a_server_that_is_never_ready_is_ended(model_dir: Path, tmp_path: Path) -> None:
    python = fake_environment(tmp_path, "import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)\n")
    config = make(python=str(python), device="cpu", start_timeout_s=3)
    log = tmp_path / "vllm.log"
    server = VllmServer(config, load_qwen_config(model_dir), model_dir, log)
    with pytest.raises(StageError, match=r"not ready after 3 s. Raise vllm.start_timeout_s"):
        server.start(QUIET)
    assert not is_alive(int(log.read_text().split()[1]))


def test_what_is_started_listens_here_alone_with_a_new_key_each_time(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real command line, as the process itself and the list of processes have it."""
    program = """
import json, os, sys
line = open("/proc/self/cmdline", "rb").read().decode().split("\\0") if os.path.exists("/proc/self/cmdline") else []
with open(os.environ["SEEN"], "a") as file:
    file.write(json.dumps([sys.argv, line, os.environ["VLLM_API_KEY"], os.environ["VLLM_HOST_IP"]]) + "\\n")
sys.exit(7)
"""
    seen, log = tmp_path / "seen.jsonl", tmp_path / "stage" / "vllm.log"
    config = make(python=str(fake_environment(tmp_path, program)), device="cpu", env={"SEEN": str(seen)})
    monkeypatch.setenv("HF_TOKEN", "canary-of-the-hub")
    server = VllmServer(config, load_qwen_config(model_dir), model_dir, log)
    for _ in range(2):
        with pytest.raises(StageError, match="exit code 7") as caught:
            server.start(QUIET)
    starts = [json.loads(line) for line in seen.read_text().splitlines()]
    keys = {key for _, _, key, _ in starts}
    assert len(starts) == len(keys) == 2 and all(len(key) >= 32 for key in keys)
    for words, line, key, host in starts:
        assert words[words.index("--host") + 1] == host == "127.0.0.1" and words.count("--host") == 1
        assert "--trust-remote-code" not in words and key not in " ".join([*words, *line])
        assert key not in log.read_text() + str(caught.value)
    assert "canary" not in log.read_text() + str(caught.value)


# --- nothing stays behind ---------------------------------------------------------------------------------

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def wait_for(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["caller killed", "server killed"])
def test_nothing_survives_its_caller_or_its_server(how: str, tmp_path: Path) -> None:
    """A server and its child that ignore SIGTERM, in sessions of their own; the caller gets SIGKILL."""
    out, folder = tmp_path / "out", Path(supervise.__file__).parent
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    patient = f"import sys\nsys.path.insert(0, {str(folder)!r})\nimport supervise\nsupervise._GRACE_S = 1\n"
    (tmp_path / "patient.py").write_text(f"{patient}sys.exit(supervise.main(sys.argv[1:]))\n")
    command = [sys.executable, str(tmp_path / "patient.py"), sys.executable]
    (tmp_path / "caller.py").write_text(
        f"import subprocess, time\nout = open({str(out)!r}, 'wb')\n"
        f"subprocess.Popen({[*command, str(tmp_path / 'stubborn.py')]!r}, stdin=subprocess.PIPE, stdout=out)\n"
        "time.sleep(600)\n"
    )
    caller = subprocess.Popen([sys.executable, str(tmp_path / "caller.py")])
    try:
        wait_for(lambda: out.exists() and out.read_text().count("\n") == 2)
        server, child = map(int, out.read_text().split())
        family = supervise.descendants(caller.pid)
        assert {server, child} <= set(family) and len(family) == 3
        if how == "caller killed":
            caller.send_signal(signal.SIGKILL)
        else:
            os.kill(server, signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, family)))
    finally:
        caller.kill()
        caller.wait()


def test_the_exit_code_of_the_server_comes_through() -> None:
    for program, code in (("import sys; sys.exit(5)", 5), ("import os; os.kill(os.getpid(), 9)", 137)):
        command = [sys.executable, "-I", "-S", supervise.__file__, sys.executable, "-c", program]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            assert process.wait(20) == code


# --- running servers --------------------------------------------------------------------------------------


def models_reply(*models: dict[str, Any]) -> Any:
    return lambda path, body: (200, {"data": list(models)})


def test_addresses_get_their_v1() -> None:
    assert full_url("http://a:1") == full_url("http://a:1/") == full_url("http://a:1/v1/") == "http://a:1/v1"


@pytest.mark.parametrize(
    ("reply", "vllm", "message"),
    [
        (lambda *_: (401, "who?"), {"api_key_env": "K"}, r"refuses the API key \(401\).*now 'K'"),
        (models_reply({"id": "a"}, {"id": "b"}), {}, r"serves \['a', 'b'\]: name the policy with vllm.served_name"),
        (models_reply({"id": "a"}), {"served_name": "b"}, r"serves \['a'\] and not 'b', which vllm.served_name"),
        (models_reply({"id": "a", "max_model_len": 64}), {}, "--max-model-len 64.*128. Restart"),
    ],
)
def test_a_running_server_that_is_not_ours_is_named(reply: Any, vllm: dict[str, Any], message: str) -> None:
    with serve(reply) as small, pytest.raises(ConfigError, match=message):
        find_model(Endpoint(small.url), make(**vllm))


def test_the_one_model_of_a_server_is_taken() -> None:
    with serve(models_reply({"id": "a", "root": "/m", "max_model_len": 128})) as small:
        assert find_model(Endpoint(small.url), make()) == ("a", Path("/m"))


def test_who_is_asked_to_load_weights(model_dir: Path, tmp_path: Path) -> None:
    with serve(lambda path, _: (404, "Not Found") if path == "/pause?mode=wait" else (200, {})) as small:
        endpoint = Endpoint(small.url, retry=Retry(attempts=1))
        assert "restart" in (reload_weights(endpoint, None, model_dir, "restart") or "")
        assert "DEV_MODE" in (reload_weights(endpoint, None, model_dir, "auto") or "")
        assert "another machine" in (reload_weights(Endpoint("http://10.0.0.2/v1"), None, model_dir, "auto") or "")
        assert [path for path, _ in small.seen] == ["/pause?mode=wait"]
        other = build_tiny_model(tmp_path / "other", hidden_size=64)
        with pytest.raises(ConfigError, match="a model of other sizes"):
            reload_weights(endpoint, other, model_dir, "auto")


def test_a_server_that_was_paused_is_resumed_also_when_loading_fails(model_dir: Path) -> None:
    with serve(lambda path, _: (500, "out of memory") if path == "/collective_rpc" else (200, {})) as small:
        with pytest.raises(EndpointError, match="500.*out of memory"):
            reload_weights(Endpoint(small.url), model_dir, model_dir, "auto")
        assert [path for path, _ in small.seen] == ["/pause?mode=wait", "/collective_rpc", "/resume"]
        assert small.seen[1][1]["kwargs"] == {"weights_path": str(model_dir.absolute())}


# --- the comparison ---------------------------------------------------------------------------------------


def test_a_difference_is_refused_with_both_numbers() -> None:
    ours, theirs = [[-1.0, -2.0], [-3.0]], [[-1.0, -2.3], [-3.0]]
    found = compare_logps(ours, theirs)
    assert (found.ours, found.theirs, found.difference) == pytest.approx((-2.0, -2.1, 0.1))
    with pytest.raises(StageError) as caught:
        check_handoff(found, "bfloat16", "http://a", Path("/policy"), tied=True)
    for part in ("-2.1000", "-2.0000", "0.1", "0.05", "/policy", "older weights", "tied", "tokenizer or template"):
        assert part in str(caught.value)
    with pytest.raises(StageError, match="0.001 is allowed"):
        check_handoff(compare_logps([[-1.0]], [[-1.002]]), "float32", "http://a", Path("/policy"), tied=False)
    check_handoff(compare_logps([[-1.0]], [[-1.002]]), "bfloat16", "http://a", Path("/policy"), tied=False)
    with pytest.raises(StageError):
        check_handoff(compare_logps([[-1.0]], [[float("nan")]]), "bfloat16", "http://a", Path("/policy"), tied=False)


def test_a_server_without_prompt_logprobs_is_refused() -> None:
    reply = {"choices": [{"index": 0, "text": ""}]}
    with serve(lambda *_: (200, reply)) as small, pytest.raises(DriftError, match="has no log-probs of the prompt"):
        server_logps(Endpoint(small.url), "policy", [(1, 2, 3)])


def test_processes_of_one_place_do_not_each_start_a_server() -> None:
    check_own_devices(["a ", "b "])
    check_own_devices(["a 0,1", "a 2,3"])
    with pytest.raises(ConfigError, match=r"2 processes of this run are on a and see.*vllm\.base_urls"):
        check_own_devices(["b ", "a ", "a "])
