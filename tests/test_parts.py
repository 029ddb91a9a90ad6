"""A run as a chain of processes: which stages each of them does, and how it ends."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from drift_jax.cli.parts import samples_with_vllm
from drift_jax.parts import Part, PartEnd
from drift_jax.recipe import run
from drift_jax.sampling import supervise
from tests.cli_runs import base, model_dir, write_yaml  # noqa: F401
from tests.conftest import REPO


def config_of(folder: Path, **more: object) -> list[str]:
    return [str(folder / "config.yaml"), *(f"{key}={value}" for key, value in more.items())]


def test_a_part_stops_where_the_next_stage_is_not_its_own(base: Path, tmp_path: Path) -> None:
    """With the JAX sampler, which needs no second process: the parts are the same."""
    from drift_jax.config import load_config

    config = load_config(base / "config.yaml")
    part, said = Part("training", tmp_path / "parts"), []
    part.folder.mkdir()
    part.begin()
    done = []
    while len(said) < 3:
        out = io.StringIO()
        try:
            run(config, Console(file=out, width=160), part)
            ended = True
        except PartEnd:
            ended = False
        said.append((part.kind, ended))
        done.append([line.split(" ")[0] for line in out.getvalue().splitlines() if line.startswith("iter_1/")])
        assert load_config(part.config_file) == config
        part = part.other()
    assert said == [("training", False), ("sampling", False), ("training", True)]
    # What others have finished is not said again.
    assert done == [[], ["iter_1/sample"], ["iter_1/pair", "iter_1/train", "iter_1/export"]]
    assert (base / "run" / "iter_1" / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("raw", "overrides", "expected"),
    [
        ({"sampling": {"engine": "vllm"}}, [], True),
        ({"sampling": {"engine": "vllm"}}, ["sampling.engine=local"], False),
        ({}, ["sampling.engine=vllm"], True),
        ({"sampling": 3}, [], False),
        ({"sampling": {"engine": "vllm"}}, ["nonsense"], True),  # said by the first part
        (None, ["sampling.engine=vllm"], True),
    ],
)
def test_the_engine_is_known_before_anything_starts(
    raw: dict[str, object] | None, overrides: list[str], expected: bool, tmp_path: Path
) -> None:
    path = None if raw is None else write_yaml(tmp_path / "c.yaml", raw)
    assert samples_with_vllm(path, overrides) is expected
    assert not samples_with_vllm(tmp_path / "nowhere.yaml", overrides)


def test_what_is_wrong_is_said_once_by_the_part_that_finds_it(base: Path) -> None:
    """No vLLM here: the first part says so, before anything else has taken any time."""
    command = [sys.executable, "-m", "drift_jax", "run", str(base / "config.yaml"), "--set", "sampling.engine=vllm"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "head_dim is 16" in done.stderr, done.stderr


def heed_ctrl_c() -> None:
    """Also where the tests run in the background of a shell, which has all its children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 75), (signal.SIGTERM, 75)])
def test_a_run_that_is_ended_takes_its_part_along(base: Path, number: signal.Signals, code: int) -> None:
    """While the seed stage trains; vLLM itself is never asked."""
    keys = ("sampling.engine=vllm", "recipe.iterations=0", "recipe.seed_epochs=1000", "checkpoint.every_steps=end")
    keys += (f"data.seed_train={base}/pairs/pairs.train.jsonl",)
    command = [sys.executable, "-m", "drift_jax", "run", str(base / "config.yaml")]
    command += [word for key in keys for word in ("--set", key)]
    metrics, deadline = base / "run" / "seed" / "metrics.jsonl", time.monotonic() + 300
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, preexec_fn=heed_ctrl_c)
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") > 2):
            assert time.monotonic() < deadline and process.poll() is None, "training did not begin"
            time.sleep(0.2)
        family = supervise.descendants(process.pid)
        assert family
        process.send_signal(number)
        assert process.wait(60) == code
        while any(Path(f"/proc/{pid}").exists() for pid in family):
            assert time.monotonic() < deadline, "its part goes on"
            time.sleep(0.1)
        # Also the part whose parent was killed has kept what it did.
        assert [path for path in (base / "run" / "seed" / "checkpoints").iterdir() if path.name.isdigit()]
    finally:
        process.kill()
        process.wait()
