"""What lies beside a broken file so that the command reaches it: a model, a run, a stage that was interrupted."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from drift_jax.checkpoint import Checkpointer
from drift_jax.config import load_config
from drift_jax.data.exchange import convert_pairs
from drift_jax.files import write_jsonl
from drift_jax.manifest import Manifest
from drift_jax.sampling.base import Completion
from drift_jax.sharding import build_layout
from drift_jax.stages.dpo import TrainJob, build_trainer
from drift_jax.stages.identity import export_identity, sample_identity, sampling_job
from drift_jax.stages.inputs import open_policy, open_tokenizer
from drift_jax.stages.reference import RefLogps, write_ref_logps
from drift_jax.stages.sample import completion_row
from drift_jax.stages.tokens import load_tokenized
from tests.bad_input import odd
from tests.http_servers import answering
from tests.report_runs import write_run
from tests.tiny_pairs import build_tiny_policy, write_dsat, write_pairs
from tests.wildbench_files import write_checkout, write_outputs, write_tasks

CONFIG: dict[str, Any] = {
    "run_dir": "run",
    "model": {"path": "model", "compute_dtype": "float32"},
    "data": {"dsat": "dsat.jsonl", "test_rows": 1, "max_length": 64, "max_prompt_length": 32},
    "recipe": {"iterations": 0, "showcase_prompts": []},
    "sampling": {"max_new_tokens": 2, "batch_size": 8, "compute_dtype": "float32", "max_input_length": 64},
    "train": {"batch_size": 8},
}


@functools.cache
def _built() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    build_tiny_policy(Path(folder.name), num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    return folder


def _model(work: Path) -> None:
    """A model and a config; `drift run config.yaml` looks at both and has nothing to do."""
    shutil.copytree(Path(_built().name), work / "model")
    (work / "config.yaml").write_text(yaml.safe_dump(CONFIG))


def _weights(work: Path) -> None:
    """The same, with the weights once more under a name that nobody reads: for files that are almost like them."""
    _model(work)
    shutil.copyfile(work / "model" / "model.safetensors", work / "model" / "model.safetensors.kept")


def _data(work: Path) -> None:
    """Records and pairs."""
    write_dsat(work / "dsat.jsonl", 8)
    (work / "pairs").mkdir()
    write_pairs(work / "pairs" / "pairs.train.jsonl", 8)


def _disk(work: Path) -> None:
    """Pairs as a `datasets` directory."""
    _data(work)
    convert_pairs(work / "pairs", work / "set", "disk")


def _sampled(work: Path) -> None:
    """`drift sample` that was stopped when all was sampled: the next call goes on from completions.jsonl."""
    _model(work)
    _data(work)
    with contextlib.chdir(work):
        config, model, out = load_config("config.yaml"), Path("model"), Path("out")
        manifest, tokenizer = Manifest(out), open_tokenizer(model)
        keys, inputs = sample_identity(config, manifest, model, Path("dsat.jsonl"))
        manifest.enter("sample", keys, inputs)
        ids = tuple(tokenizer.encode_text("A better reply."))
        drawn = [Completion(f"d{i}", 0, ids, "length", (-1.0,) * len(ids)) for i in range(8)]
        job = sampling_job(config, inputs, model)
        write_jsonl(out / "completions.jsonl", [completion_row(one, tokenizer, False, job) for one in drawn])


def _trained(work: Path) -> None:
    """`drift train` that was stopped at its end: the next call goes on from the last checkpoint."""
    _model(work)
    _data(work)
    with contextlib.chdir(work):
        config, model, out = load_config("config.yaml"), Path("model"), Path("out")
        job = TrainJob(model, model, Path("pairs/pairs.train.jsonl"), None, out, 1.0)
        manifest, console = Manifest(out), Console(quiet=True)
        manifest.enter("train", *export_identity(config, manifest, job))
        pairs = load_tokenized(config, job.train_pairs, open_tokenizer(model), out / "tokens", console).pairs
        write_ref_logps(out / "ref_logps.npz", pairs, RefLogps(np.zeros((len(pairs), 2)), np.zeros((len(pairs), 2))))
        shutil.copyfile(out / "ref_logps.npz", out / "ref_logps.kept.npz")
        layout = build_layout(config.mesh)
        trainer = build_trainer(config, model, layout, 1)
        params = open_policy(model, layout, "float32", "float32", console).params
        state = trainer.init_state(params)
        with Checkpointer(out / "checkpoints", 1) as checkpointer:
            checkpointer.save(1, {"params": state.params, "optimizer": state.opt_state}, {"step": 1})
        write_jsonl(out / "metrics.jsonl", [{"step": 1, "loss": 0.69, "rewards/margins": 0.0, "logps/chosen": -9.0}])


def _interrupted(work: Path) -> None:
    """`drift train` that was stopped in its reference pass: the next call goes on from what is known."""
    _trained(work)
    shutil.rmtree(work / "out" / "checkpoints" / "1")
    for name in ("ref_logps.npz", "ref_logps.kept.npz", "metrics.jsonl"):
        (work / "out" / name).unlink()


def _mixture(work: Path) -> None:
    """A model, and a DPO file of alignment-handbook that names a directory of pairs."""
    _model(work)
    handbook = {"model_name_or_path": "model", "dataset_mixer": {"dataset": 1.0}, "dataset_splits": ["train"]}
    handbook |= {"beta": 0.1, "max_length": 64, "max_prompt_length": 32, "output_dir": "out", "max_steps": 1}
    (work / "dpo.yaml").write_text(yaml.safe_dump(handbook | {"bf16": False}))
    (work / "dataset").mkdir()
    write_pairs(work / "dataset" / "train.jsonl", 8)


def _run(work: Path) -> None:
    """A run of two iterations with a policy at its end, as `drift report`, `card` and `evaluate compare` take it."""
    write_run(work / "run", pairs=12, theory=True)
    (work / "run" / "iter_2" / "hf").mkdir()
    (work / "run" / "iter_2" / "hf" / "config.json").write_text("{}")


def _outputs(work: Path) -> None:
    """Prompts and the outputs of two models."""
    prompts = [{"id": f"p{i}", "prompt": f"Say {i}."} for i in range(4)]
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    for name, text in (("a", "short"), ("b", "a longer one")):
        rows = [{"id": prompt["id"], "output": f"{text} {prompt['id']}"} for prompt in prompts]
        (work / f"{name}.json").write_text(json.dumps(rows))
    alpaca = [{"instruction": f"Say {i}.", "output": str(i), "generator": "base"} for i in range(4)]
    (work / "alpaca.json").write_text(json.dumps(alpaca))
    (work / "out").mkdir()


def _wildbench(work: Path) -> None:
    """WildBench's tasks, a stand-in for its checkout, and outputs of a model."""
    write_checkout(work / "wildbench")
    write_tasks(work / "tasks.json", 2)
    write_outputs(work / "outputs.json", "m", {0: "nought", 1: "one"})
    (work / "rows.json").write_text(json.dumps([{"session_id": "task00", "score": 7}]))
    (work / "out").mkdir()


def _log(work: Path) -> None:
    """A log of one conversation with a complaint."""
    turns = [("user", "Say one."), ("assistant", "Two."), ("user", "That is wrong, I said one.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (work / "log.jsonl").write_text(json.dumps({"messages": messages}) + "\n")


def _replies(work: Path) -> None:
    """Replies with rewards."""
    rows = [{"id": f"p{i}", "output": f"words {'x' * i}", "reward": float(i)} for i in range(12)]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer_of(case: Any) -> bytes:
    """What a judge answers: to cases of judges their file, else a verdict that every question can use."""
    made = odd.MAKERS.get(case.name)
    if case.kind == "judge_answer":
        if made is None:
            return (Path(__file__).parent / case.kind / case.file).read_bytes()
        with tempfile.TemporaryDirectory() as folder:
            made(Path(folder) / "answer")
            return (Path(folder) / "answer").read_bytes()
    verdict = {"turn": 2, "reason": "none", "criteria": [], "strength": 0}
    text = json.dumps({"strengths": "", "weaknesses": "", "score": "7", "better": "1", "verdicts": [verdict]})
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@contextlib.contextmanager
def judge_server(data: bytes) -> Iterator[str]:
    """The address of a server that answers every request with these bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with answering(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}/v1"


FILLERS: dict[str, Callable[[Path], None]] = {
    "model": _model,
    "weights": _weights,
    "data": _data,
    "disk": _disk,
    "sampled": _sampled,
    "trained": _trained,
    "interrupted": _interrupted,
    "mixture": _mixture,
    "run": _run,
    "outputs": _outputs,
    "wildbench": _wildbench,
    "log": _log,
    "replies": _replies,
}
