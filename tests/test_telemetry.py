"""Metrics files (and what a resumed run does to them), trackers, timers, memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax import telemetry
from drift_jax.errors import ConfigError, DataError, StageError
from drift_jax.telemetry import MetricsWriter, StageTimer, peak_rss_gib, read_metrics


def write_steps(directory: Path, steps: range, resume_step: int | None = None) -> None:
    with MetricsWriter(directory, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 10})


def steps_of(directory: Path) -> list[int]:
    return [row["step"] for row in read_metrics(directory)]


def refuse_constant(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def test_every_kind_of_number_comes_back(tmp_path: Path) -> None:
    metrics = {
        "loss": jnp.float32(0.5),
        "rewards/margins": np.float64(-1.25),
        "rewards/accuracies": jnp.bfloat16(0.75),
        "tokens": np.int64(12),
        "epoch": 1,
    }
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, metrics)
    assert read_metrics(tmp_path) == [
        {
            "step": 3,
            "loss": 0.5,
            "rewards/margins": -1.25,
            "rewards/accuracies": 0.75,
            "tokens": 12,
            "epoch": 1,
        }
    ]
    assert type(read_metrics(tmp_path)[0]["tokens"]) is int


def test_nan_and_infinity_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.nan, "up": math.inf, "down": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse_constant)["up"] == "Infinity"
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"]) and row["up"] == math.inf and row["down"] == -math.inf


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 0.5})
    assert steps_of(tmp_path) == [1]
    writer.close()
    writer.close()


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    write_steps(tmp_path, range(5, 10), resume_step=4)
    assert steps_of(tmp_path) == list(range(1, 10))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_stage_that_starts_anew_forgets_its_earlier_attempt(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 5))
    write_steps(tmp_path, range(1, 3))
    assert steps_of(tmp_path) == [1, 2]


def test_a_line_that_is_being_written_is_passed_over(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss"')
    assert steps_of(tmp_path) == [1, 2]


@pytest.mark.parametrize("line", ["{oops", "[1]", '{"loss": 1.0}', '{"step": "1"}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)


def test_missing_metrics_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no metrics at"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("value", ["0.5", np.zeros(2), None])
def test_a_metric_must_be_one_number(tmp_path: Path, value: Any) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(TypeError, match="metric loss"):
        writer.write(1, {"loss": value})


def test_only_process_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry.jax, "process_index", lambda: 1)
    write_steps(tmp_path / "stage", range(3))
    assert not (tmp_path / "stage").exists()


def test_a_full_disk_is_a_stage_error(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer._file = open("/dev/full", "w")  # noqa: SIM115 - every flush to it fails with "no space left"
    with pytest.raises(StageError, match="No space left on device.*Make room"):
        writer.write(1, {"loss": 0.5})


# --- trackers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tracker", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_tracker_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes `import` fail
    with pytest.raises(ConfigError, match=rf'{module} is not installed(.|\n)*pip install "drift-jax\[trackers\]"'):
        MetricsWriter(tmp_path / "stage", trackers=(tracker,))
    assert not (tmp_path / "stage").exists()


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'mlflow' is not a tracker. Known ones: tensorboard, wandb"):
        MetricsWriter(tmp_path, trackers=("mlflow",))


def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401 - proves that the package is the real one

    with MetricsWriter(tmp_path, trackers=("tensorboard",)) as writer:
        writer.write(7, {"rewards/margins": 0.25})
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    data, events = file.read_bytes(), []
    while data:  # record: length (8 bytes), its checksum (4), event, checksum (4)
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    seen = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert seen == [(7, "rewards/margins", 0.25)]


class FakeWandb(types.ModuleType):
    """Keeps what W&B would be told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> FakeWandb:
        self.runs.append(arguments)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_every_metric_and_a_resumed_stage_its_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    stage = tmp_path / "run" / "iter_1"
    for resume_step in (None, 1, None):
        with MetricsWriter(stage, trackers=("wandb",), project="p", resume_step=resume_step) as writer:
            writer.write(2, {"loss": jnp.float32(0.5)})
    assert fake.logged == [(2, {"loss": 0.5})] * 3 and fake.finished == 3
    first, resumed, anew = fake.runs
    assert (first["project"], first["name"], first["dir"]) == ("p", "run/iter_1", str(stage))
    assert first["id"] == resumed["id"] != anew["id"]


# --- time and memory --------------------------------------------------------------------------------------


def test_the_timer_counts_tokens_per_second_of_its_block_only() -> None:
    now = [100.0]
    timer = StageTimer(clock=lambda: now[0])
    assert (timer.seconds, timer.tokens_per_second) == (0.0, 0.0)
    with timer:
        now[0] += 4
        timer.count_tokens(600)
        assert timer.seconds == 4.0
        timer.count_tokens(200)
    now[0] += 100
    assert (timer.tokens, timer.seconds, timer.tokens_per_second) == (800, 4.0, 200.0)


def test_peak_memory_is_this_processs_own(tmp_path: Path) -> None:
    """A child of a big process must not report its parent's peak, as getrusage does on Linux."""
    ballast = np.ones(2**29, np.uint8)  # 0.5 GiB, resident
    assert peak_rss_gib() > 0.5
    path = telemetry.__file__
    code = f"""
import ast, pathlib, resource, sys
tree = ast.parse(pathlib.Path({path!r}).read_text())
tree.body = [n for n in tree.body if getattr(n, "name", "") == "peak_rss_gib"]
names = dict(Path=pathlib.Path, resource=resource, sys=sys)
exec(compile(tree, "peak", "exec"), names)
ballast = b"x" * 2**26
print(names["peak_rss_gib"]())
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**-4 < float(child.stdout) < 0.4
    del ballast
