"""One process of several that answer prompts with a stand-in for the sampler; see stages/test_answer.py.

python -m tests.answers MODEL OUT COORDINATOR COUNT INDEX
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import jax
from rich.console import Console

from drift_jax.config import build_config
from drift_jax.distributed import Processes, start_processes
from drift_jax.records import Message
from drift_jax.sampling.base import Completion, OnBatch, Sampler, SampleRequest, SamplingParams
from drift_jax.stages.answer import answer_stage
from drift_jax.stages.engines import ENGINES, Engine
from drift_jax.stopping import Stopped, heed_signals, join_processes

PROMPTS = 200


@final
class Scripted(Engine, Sampler):
    """Answers one prompt at a time; `asked` is what the last call wanted. `stops_at`: process 1 is asked to stop."""

    def __init__(self, per_host: bool, stops_at: int | None = None) -> None:
        self.per_host, self._stops_at = per_host, stops_at
        self.asked: list[str] = []

    @contextlib.contextmanager
    def open(self, missing: Sequence[SampleRequest], out_dir: Path, console: Console) -> Iterator[Sampler]:
        self.asked = [request.row_id for request in missing]
        yield self

    def sample(self, requests: Any, params: SamplingParams, on_batch: OnBatch | None = None) -> list[Completion]:
        done = []
        for count, request in enumerate(requests):
            if self._stops_at is not None:
                time.sleep(0.05)
                if count == self._stops_at and jax.process_index() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            done.append(Completion(request.row_id, request.sample, (5, params.eos_ids[0]), "stop", (-1.0, -1.0)))
            assert on_batch is not None
            on_batch(done[-1:])
        return done


def answer(model: Path, out: Path, engine: Scripted, count: int = PROMPTS) -> dict[str, Any]:
    """What was asked for, and what came of it."""
    ENGINES["local"] = lambda config, model_dir: engine  # type: ignore[index]
    config = build_config({"run_dir": "x", "model": {"path": str(model)}, "sampling": {"engine": "local"}})
    dialogues = {f"p{i}": [Message("user", f"Question {i}?")] for i in range(count)}
    try:
        answers: int | None = len(answer_stage(config, model, dialogues, out, Console(file=io.StringIO())).by_id)
    except Stopped:
        answers = None
    return {"asked": engine.asked, "answers": answers}


def main(model: str, out: str, coordinator: str, count: str, index: str) -> None:
    start_processes(Processes("on", coordinator, int(count), int(index)))
    found: dict[str, Any] = {}
    for name, per_host in (("apart", True), ("together", False)):
        found[name] = [answer(Path(model), Path(out) / name, Scripted(per_host), 6) for _ in range(2)]
    with heed_signals():
        join_processes()
        stopped = answer(Path(model), Path(out) / "stopped", Scripted(False, stops_at=3))
    with heed_signals():
        found["stopped"] = [stopped, answer(Path(model), Path(out) / "stopped", Scripted(False))]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
