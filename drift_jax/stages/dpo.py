"""One DPO stage: the reference pass, the updates, the evaluation on held-out pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from drift_jax.checkpoint import Checkpointer
from drift_jax.config import RunConfig
from drift_jax.data.batches import PairLoader
from drift_jax.data.pairs import TokenizedPair, TruncationCounts, count_truncation, tokenize_pair
from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.errors import DataError
from drift_jax.models.hf import load_qwen_config
from drift_jax.models.qwen import declare_qwen
from drift_jax.optim import describe_optimizer, total_steps
from drift_jax.progress import stage_progress
from drift_jax.records import read_pairs, write_json
from drift_jax.sharding import build_mesh, check_batch
from drift_jax.stages.inputs import Summary, open_policy, open_tokenizer, report_refused
from drift_jax.stages.reference import RefLogps, read_ref_logps, write_ref_logps
from drift_jax.telemetry import MetricsWriter, StageTimer, read_metrics
from drift_jax.train import (
    PairScores,
    Trainer,
    TrainState,
    check_first_loss,
    evaluate_scores,
    host_metrics,
)


@dataclass(frozen=True)
class TrainJob:
    """One DPO stage: where it starts, what it compares with, what it learns from."""

    model_dir: Path  # the policy it starts from
    reference_dir: Path  # the reference; the same directory when the reference is the starting policy
    train_pairs: Path
    test_pairs: Path | None
    out_dir: Path
    epochs: int


def train_stage(config: RunConfig, job: TrainJob, console: Console) -> Summary:
    """Reference pass, then DPO; leaves the last checkpoint, metrics.jsonl and eval.json."""
    mesh = build_mesh(config.mesh)
    check_batch(mesh, config.train.batch_size, config.train.accumulation_steps)
    tokenizer = open_tokenizer(job.model_dir)
    train, train_cuts, refused = load_tokenized(config, job.train_pairs, tokenizer)
    test, _, test_refused = load_tokenized(config, job.test_pairs, tokenizer) if job.test_pairs else ([], None, [])
    steps = total_steps(len(train), config.train.batch_size, job.epochs, config.train.max_steps)
    for line in (_describe_cuts(len(train), len(test), train_cuts), describe_optimizer(config.train, steps)):
        console.print(line, highlight=False, soft_wrap=True)
    graphdef, declared = declare_qwen(load_qwen_config(job.model_dir), jnp.dtype(config.model.compute_dtype))
    trainer = Trainer(graphdef, declared, mesh, config.train, config.model.remat, steps)
    job.out_dir.mkdir(parents=True, exist_ok=True)
    with Checkpointer(job.out_dir / "checkpoints", config.checkpoint.keep) as checkpointer:
        state, ref = _start(config, job, trainer, checkpointer, train + test, console)
        loader = _loader(config, train, ref[: len(train)])
        with StageTimer() as timer:
            state = _fit(config, job, trainer, state, loader, steps, checkpointer, timer, console)
        final = _evaluate(config, trainer, state, test, ref[len(train) :], console)
    write_json(job.out_dir / "eval.json", {"step": steps, "pairs": len(test), **final})
    return {
        "pairs": len(train),
        "held_out": len(test),
        "drops": {"not encodable": len(refused) + len(test_refused)},
        "truncation": dataclasses.asdict(train_cuts),
        "steps": steps,
        "loss": float(np.mean([row["loss"] for row in read_metrics(job.out_dir)])),
        "tokens_per_second": timer.tokens_per_second,
        **final,
    }


def load_tokenized(
    config: RunConfig, path: Path, tokenizer: ChatTokenizer
) -> tuple[list[TokenizedPair], TruncationCounts, list[str]]:
    """Pairs of a file as ids, what cutting took away, and what was refused (only with --on-bad-row skip)."""
    tokenized, refused = [], []
    for pair in read_pairs(path, config.data.on_bad_row).records:
        try:
            tokenized.append(tokenize_pair(pair, tokenizer, config.data.max_prompt_length, config.data.max_length))
        except DataError as error:
            refused.append(str(error))
    report_refused(refused, config)
    return tokenized, count_truncation(tokenized), refused


def _describe_cuts(train: int, test: int, cuts: TruncationCounts) -> str:
    parts = [
        f"{count} {name} ({tokens} tokens)"
        for name, count, tokens in (
            ("prompts", cuts.prompts_cut, cuts.prompt_tokens_cut),
            ("chosen", cuts.chosen_cut, cuts.chosen_tokens_cut),
            ("rejected", cuts.rejected_cut, cuts.rejected_tokens_cut),
        )
        if count
    ]
    return f"{train} pairs, {test} held out; cut to fit: {', '.join(parts) or 'nothing'}"


def _loader(config: RunConfig, pairs: list[TokenizedPair], ref_logps: np.ndarray) -> PairLoader:
    t = config.train
    return PairLoader(pairs, ref_logps, t.batch_size, t.accumulation_steps, config.data.max_length, t.seed)


def _scoring_loader(config: RunConfig, pairs: list[TokenizedPair]) -> PairLoader:
    """Batches for passes without gradient; each is one micro-batch."""
    t = config.train
    size = t.eval_batch_size or t.batch_size // t.accumulation_steps
    return PairLoader(pairs, np.zeros((len(pairs), 2)), size, 1, config.data.max_length)


def _score(
    config: RunConfig, trainer: Trainer, params: Any, pairs: list[TokenizedPair], what: str, console: Console
) -> PairScores:
    with stage_progress(what, len(pairs), "pairs", console=console) as bar:
        return trainer.score_pairs(params, _scoring_loader(config, pairs), bar.advance)


def _start(
    config: RunConfig,
    job: TrainJob,
    trainer: Trainer,
    checkpointer: Checkpointer,
    every: list[TokenizedPair],
    console: Console,
) -> tuple[TrainState, RefLogps]:
    """The state to go on from (newest checkpoint or the starting policy) and the reference log-probs of all pairs."""
    ref = read_ref_logps(job.out_dir / "ref_logps.npz", every)
    params = None
    if ref is None:
        reference = open_policy(job.reference_dir, trainer.mesh, config.model.compute_dtype, "float32", console)
        ref = _score(config, trainer, reference.params, every, "reference log-probs", console).logps
        write_ref_logps(job.out_dir / "ref_logps.npz", every, ref)
        # The reference is dropped here, unless it is the policy itself.
        params = reference.params if job.reference_dir == job.model_dir else None
        del reference
    step = checkpointer.latest_step()
    if step is not None:
        console.print(f"going on from the checkpoint of update {step}")
        abstract = trainer.abstract_state
        items = checkpointer.restore(step, {"params": abstract.params, "optimizer": abstract.opt_state})
        return trainer.state_at(step, items["params"], items["optimizer"]), ref
    if params is None:
        params = open_policy(job.model_dir, trainer.mesh, config.model.compute_dtype, "float32", console).params
    return trainer.init_state(params), ref


def _fit(
    config: RunConfig,
    job: TrainJob,
    trainer: Trainer,
    state: TrainState,
    loader: PairLoader,
    steps: int,
    checkpointer: Checkpointer,
    timer: StageTimer,
    console: Console,
) -> TrainState:
    first = int(state.step)
    meta = {"train": dataclasses.asdict(config.train), "pairs": len(loader.pairs), "epochs": job.epochs}
    trackers = config.tracking
    with (
        MetricsWriter(
            job.out_dir, trackers=trackers.trackers, project=trackers.project, resume_step=first or None
        ) as writer,
        stage_progress("DPO", steps - first, "updates", console=console) as bar,
    ):
        for state, step, metrics, tokens in trainer.fit(state, loader, steps):  # noqa: B020
            numbers = host_metrics(metrics)
            timer.count_tokens(tokens)
            if step == 1 and job.reference_dir == job.model_dir:
                check_first_loss(numbers, config.train)
            if step % trackers.log_every == 0 or step == steps:
                extra = {"epoch": step / loader.steps_per_epoch, "tokens_per_second": timer.tokens_per_second}
                writer.write(step, numbers | extra)
            if step % config.checkpoint.every_steps == 0 or step == steps:
                items = {"params": state.params, "optimizer": state.opt_state}
                checkpointer.save(step, items, meta | {"step": step, "next_batch": step})
            bar.advance(1, f"loss {numbers['loss']:.4f}, margin {numbers['rewards/margins']:+.4f}")
        checkpointer.wait()
    return state


def _evaluate(
    config: RunConfig,
    trainer: Trainer,
    state: TrainState,
    test: list[TokenizedPair],
    ref: RefLogps,
    console: Console,
) -> dict[str, float]:
    if not test:
        return {}
    scores = _score(config, trainer, state.params, test, "held-out pairs", console)
    return evaluate_scores(scores, ref, config.train)
