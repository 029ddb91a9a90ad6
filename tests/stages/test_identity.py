"""What may change between two calls of a stage: how its updates are packed, so that a run that ran out goes on."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drift_jax.config import RunConfig, build_config
from drift_jax.data.tokenizer_files import find_chat_template
from drift_jax.errors import StageError
from drift_jax.manifest import Manifest
from drift_jax.recipe import run
from drift_jax.stages.identity import sample_identity, sampling_job
from drift_jax.telemetry import read_metrics
from drift_jax.train import Trainer
from tests.tiny_pairs import build_tiny_policy, write_dsat, write_pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("identity")
    build_tiny_policy(base / "model", tied=True)
    write_pairs(base / "seed.train.jsonl", 24)
    write_pairs(base / "seed.test.jsonl", 4, start=24)
    return base


def config_of(base: Path, run_dir: Path, compute_dtype: str = "float32", **train: Any) -> RunConfig:
    """Four updates of sixteen pairs over two epochs: the last of an epoch is not full."""
    raw = {
        "run_dir": str(run_dir),
        "model": {"path": str(base / "model"), "compute_dtype": compute_dtype, "remat": "none"},
        "data": {
            "seed_train": str(base / "seed.train.jsonl"),
            "seed_test": str(base / "seed.test.jsonl"),
            "max_length": 128,
            "max_prompt_length": 100,
        },
        "recipe": {"iterations": 0, "seed_epochs": 2},
        "train": {"batch_size": 16, "learning_rate": 2e-4} | train,
        "checkpoint": {"every_steps": 1},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    }
    return build_config(raw)


def run_quietly(config: RunConfig) -> str:
    out = io.StringIO()
    run(config, Console(file=out, width=160))
    return out.getvalue()


class Memory:
    """Room for so many updates of a run, or for all; notes the micro-batches of each run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.shapes: list[Any] = []
        fit = Trainer.fit

        def fit_some(trainer: Trainer, state: Any, loader: Any, total_steps: int) -> Iterator[Any]:
            self.shapes.append(loader.shapes)
            for done, update in enumerate(fit(trainer, state, loader, total_steps)):
                if done == self.room:
                    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
                yield update

        monkeypatch.setattr(Trainer, "fit", fit_some)

    def run_out(self, config: RunConfig, room: int) -> None:
        self.room = room
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            run_quietly(config)
        self.room = None


@pytest.fixture()
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


@pytest.fixture(scope="module")
def whole(base: Path) -> list[dict[str, float]]:
    """The metrics of a run that has room for all."""
    run_quietly(config_of(base, base / "whole"))
    return numbers(base / "whole")


def numbers(run_dir: Path) -> list[dict[str, float]]:
    # Before anything has moved, which reply is ahead is a matter of the last bit.
    without = ("tokens_per_second", "rewards/accuracies")
    rows = [{k: v for k, v in row.items() if k not in without} for row in read_metrics(run_dir / "seed")]
    evaluation = json.loads((run_dir / "seed/eval.json").read_text())
    return [*rows, {k: v for k, v in evaluation.items() if k.startswith("eval_")}]


@pytest.mark.parametrize(
    ("packing", "updates"),
    [({"accumulation_steps": 4}, 0), ({"accumulation_steps": 2}, 1), ({"tokens_per_device": 128}, 3)],
    ids=["before the first update", "in the first epoch", "in the second epoch"],
)
def test_a_stage_that_ran_out_of_memory_goes_on_in_smaller_micro_batches(
    base: Path,
    whole: list[dict[str, float]],
    tmp_path: Path,
    memory: Memory,
    packing: dict[str, int],
    updates: int,
) -> None:
    """After its reference pass, and after updates that are saved: its numbers are those of a run that had room."""
    memory.run_out(config_of(base, tmp_path / "run"), updates)
    reference = (tmp_path / "run/seed/ref_logps.npz").read_bytes()
    output = run_quietly(config_of(base, tmp_path / "run", **packing))
    assert (f"going on from the checkpoint of update {updates}" in output) == (updates > 0)
    (before, after), found = memory.shapes, numbers(tmp_path / "run")
    assert max(shape.tokens for shape in after) < max(shape.tokens for shape in before)
    assert (tmp_path / "run/seed/ref_logps.npz").read_bytes() == reference
    assert len(found) == len(whole) == 5
    for row, expected in zip(found, whole, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_in_bfloat16_the_first_loss_is_ln_2_in_another_packing_too(base: Path, tmp_path: Path, memory: Memory) -> None:
    """Within what the guard allows of that dtype: it stops no stage for its packing."""
    memory.run_out(config_of(base, tmp_path / "run", "bfloat16"), 0)
    memory.run_out(config_of(base, tmp_path / "run", "bfloat16", accumulation_steps=4), 1)
    assert [row["step"] for row in read_metrics(tmp_path / "run/seed")] == [1]


def test_what_shapes_the_result_is_still_refused(base: Path, tmp_path: Path, memory: Memory) -> None:
    memory.run_out(config_of(base, tmp_path / "run"), 0)
    for change in ({"beta": 0.2}, {"batch_size": 8}, {"gradient_dtype": "bfloat16"}):
        with pytest.raises(StageError, match=rf"(?s)seed/train.*train.{next(iter(change))}: was.*--run-dir"):
            run_quietly(config_of(base, tmp_path / "run", **change))


def test_a_manifest_that_still_holds_the_packing_is_taken(base: Path, whole: list[dict[str, float]]) -> None:
    """Entries of before the packing could change: of a finished run, which is skipped."""
    path = base / "whole/manifest.json"
    manifest = json.loads(path.read_text())
    entry = manifest["stages"]["seed/train"]
    assert not entry["config"].keys() & {"train.accumulation_steps", "train.tokens_per_device"}
    entry["config"] |= {"train.accumulation_steps": 1, "train.tokens_per_device": None}
    path.write_text(json.dumps(manifest))
    output = run_quietly(config_of(base, base / "whole", accumulation_steps=2))
    assert output.count("finished before, skipped") == 2


def test_what_a_template_is_told_shapes_the_draws_of_models_that_ask(base: Path, tmp_path: Path) -> None:
    """A run of Qwen3 from before the key was drawn with thoughts, and says so; other models have nothing to say."""
    plain, thinks = base / "model", shutil.copytree(base / "model", tmp_path / "thinks")
    config = json.loads((thinks / "tokenizer_config.json").read_text())
    template = find_chat_template(thinks, config)
    (thinks / "chat_template.jinja").write_text(template + "{% if enable_thinking is defined %}{% endif %}")
    inputs = {"policy": "p", "dsat": "d"}
    jobs, entered = {}, {}
    for model in (plain, thinks):
        for told in ("none", "template"):
            raw = {"run_dir": "r", "model": {"path": str(model)}, "data": {"dsat": "d", "thinking": told}}
            config = build_config(raw)
            jobs[model, told] = sampling_job(config, inputs, model)
            records = write_dsat(tmp_path / "dsat.jsonl", 2)
            entered[model, told] = sample_identity(config, Manifest(tmp_path), model, records)
    assert jobs[plain, "none"] == jobs[plain, "template"] == jobs[thinks, "template"] != jobs[thinks, "none"]
    assert "data.thinking" not in entered[plain, "none"][0]
    keys, of_model = entered[thinks, "template"]
    before = {key: value for key, value in keys.items() if key != "data.thinking"}
    manifest = Manifest(tmp_path / "run")
    manifest.enter("iter_1/sample", before, of_model)
    manifest.enter("iter_1/sample", keys, of_model)
    with pytest.raises(StageError, match=r'data\.thinking: was "template", is now "none"'):
        manifest.enter("iter_1/sample", entered[thinks, "none"][0], of_model)
