"""Secrets: refused in configs without being shown, read from the environment alone, kept out of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from drift_jax.config import build_config
from drift_jax.data.mining.config import validate
from drift_jax.data.mining.detector_config import DetectorConfig
from drift_jax.endpoint import read_api_key
from drift_jax.errors import ConfigError
from tests.cli_runs import CANARY, Drift, base, change_config, drift, model_dir  # noqa: F401
from tests.http_servers import answering

SECRET = "hunter2hunter2hunter2"


def build(**sections: Any) -> Any:
    return build_config({"run_dir": "x", "model": {"path": "x"}} | sections)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"judge": {"base_url": f"https://me:{SECRET}@host/v1"}}, r"judge.base_url: .*user or password.*api_key_env"),
        ({"judge": {"base_url": f"https://{SECRET}@host/v1"}}, r"judge.base_url: .*user or password"),
        ({"judge": {"base_url": f"https://host/v1?key={SECRET}"}}, r"judge.base_url: .*end with its path"),
        ({"judge": {"base_url": f"https://host/v1#{SECRET}"}}, r"judge.base_url: .*end with its path"),
        ({"judge": {"base_url": [SECRET]}}, r"judge.base_url: "),
        ({"judge": {"api_key_env": f"sk-{SECRET}"}}, r"judge.api_key_env: must be the NAME"),
        ({"judge": {"api_key_env": f"hf_{SECRET}"}}, r"judge.api_key_env: must be the NAME"),
        ({"vllm": {"api_key_env": f"a {SECRET}"}}, r"vllm.api_key_env: must be the NAME"),
        ({"vllm": {"base_urls": ["http://h/v1", f"http://u:{SECRET}@h/v1"]}}, r"vllm.base_urls.1: .*user or password"),
        ({"vllm": {"env": {"HF_TOKEN": SECRET}}}, r"vllm.env: must not have HF_TOKEN.*inherits"),
        ({"vllm": {"env": {"VLLM_API_KEY": SECRET}}}, r"vllm.env: must not have VLLM_API_KEY"),
        ({"vllm": {"env": {"A": f"sk-{SECRET}"}}}, r"vllm.env: must not have A"),
        ({"vllm": {"env": [f"HF_TOKEN={SECRET}"]}}, r"vllm.env: "),
        ({"vllm": {"args": ["--api-key", SECRET]}}, r"vllm.args: must not have --api-key"),
        ({"vllm": {"args": [f"--x=hf_{SECRET}"]}}, r"vllm.args: holds what looks like a key"),
    ],
    ids=range(15),
)
def test_a_secret_in_a_config_is_refused_and_not_shown(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        build(**sections)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://host:port/v1",
        "http://127.0.0.1:8000/v1\n",
        "http://127.0.0.1:8000 /v1",
        "http://127.0.0.1:80000/v1",
        "http://[::1/v1",
        "http://[::g]:8000/v1",
        "http:///v1",
        "http://ü-.de/v1",
        "http://a..de/v1",
        f"http://{'a' * 64}.de/v1",
    ],
)
def test_what_is_no_address_is_refused_and_not_shown(url: str) -> None:
    for name, value in (("judge", {"base_url": url}), ("vllm", {"base_urls": [url]})):
        with pytest.raises(ConfigError, match=rf"{name}\.base_urls?.*: is no address of a server") as caught:
            build(**{name: value})
        assert url not in str(caught.value)


def test_so_it_is_in_a_file_of_mining_rules() -> None:
    with pytest.raises(ConfigError, match=r"judge.base_url: must not hold a user") as caught:
        validate(DetectorConfig, {"judge": {"base_url": f"http://me:{SECRET}@h/v1"}}, "rules.yaml")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        "--trust-remote-code",
        "--trust_remote_code",
        "--trust-remote-code=true",
        "--trust-rem",
        "--host=0.0.0.0",
        "--host",
        "--hos",
        "--port",
        "--config",
        "--hf-token=x",
    ],
)
def test_a_server_of_ours_is_not_opened_to_others_nor_to_foreign_code(word: str) -> None:
    with pytest.raises(ConfigError, match=r"vllm.args: must not have --(trust|host|port|config|hf-token)"):
        build(vllm={"args": [word]})


def test_what_holds_no_secret_is_taken() -> None:
    args, env = ("--swap-space", "1", "--max-num-seqs", "4", "-O3"), {"TOKENIZERS_PARALLELISM": "1", "MAX_TOKENS": "9"}
    config = build(
        vllm={
            "args": list(args),
            "env": env,
            "base_urls": ["http://10.0.0.2:8000/v1", "http://my_host", "http://ü.de/"],
        },
        judge={"base_url": "https://[::1]:8000/a/v1/", "api_key_env": "OPENAI_API_KEY"},
    )
    assert config.vllm.args == args and config.vllm.env == env and config.judge.api_key_env == "OPENAI_API_KEY"


def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (f"{SECRET} x", f"{SECRET}\n{SECRET}", f"{SECRET}é"):
        monkeypatch.setenv("SOME_KEY", key)
        with pytest.raises(ConfigError, match="SOME_KEY holds is no API key") as caught:
            read_api_key("SOME_KEY")
        assert SECRET not in str(caught.value)
    monkeypatch.setenv("SOME_KEY", f"{SECRET}\n")
    assert read_api_key("SOME_KEY") == SECRET


# --- nothing of a run holds a key ----------------------------------------------------------------------------


class Parrot(BaseHTTPRequestHandler):
    """A judge that repeats the request's key wherever it can: in refusals, in answers, in what is no answer."""

    asked = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key, count = self.headers["Authorization"], type(self).asked
        type(self).asked += 1
        content = f'{{"best": 1, "reason": "because of {key}"}}' if count % 2 else f"no verdict but {key}"
        body = json.dumps({"choices": [{"message": {"content": content}}]}) if count else f"{key} is not welcome"
        self.send_response(200 if count else 400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def parrot() -> Iterator[str]:
    with answering(ThreadingHTTPServer(("127.0.0.1", 0), Parrot)) as server:
        yield f"http://127.0.0.1:{server.server_port}/v1"


def test_no_file_of_a_run_holds_a_key(drift: Drift, base: Path, parrot: str) -> None:
    """`drift` itself fails when a key is printed."""
    judge = {"base_url": parrot, "model": "j", "api_key_env": "SOME_JUDGE_KEY", "concurrency": 1}
    sampling = {"n": 2, "chooser": "judge", "max_similarity": 1, "max_repetition": 1}
    config = change_config(base / "config.yaml", judge=judge, sampling=sampling, recipe={"iterations": 1})
    words = ("sample", config, "--model", base / "model", "--input", base / "dsat.jsonl", "--out", base / "out")
    code, _, err = drift(*words)
    assert code == 0, err
    files = [path for path in base.rglob("*") if path.is_file()]
    assert Parrot.asked > 2 and "because of Bearer ..." in (base / "out" / "verdicts.jsonl").read_text()
    assert {path.name for path in files} >= {"manifest.json", "verdicts.jsonl", "pairs.train.jsonl"}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
