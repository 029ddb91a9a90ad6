"""One DPO stage: the reference pass, the updates, the evaluation on held-out pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from drift_jax import stopping
from drift_jax.checkpoint import Checkpointer, SaveClock
from drift_jax.config import RunConfig
from drift_jax.data.batches import PairLoader, batch_split
from drift_jax.data.pairs import TokenizedPair
from drift_jax.data.rules import build_rules
from drift_jax.distributed import on_main
from drift_jax.evaluation.preference import PairLogps, preference_numbers
from drift_jax.files import check_checkpoint_place, remove_leftovers, write_json, write_jsonl
from drift_jax.guards import FiniteWatch, RewardWatch, check_first_loss, check_params_changed
from drift_jax.manifest import Manifest
from drift_jax.models.architecture import PAD_EMBEDDINGS
from drift_jax.models.hf import load_qwen_config
from drift_jax.models.qwen import declare_qwen
from drift_jax.optim import describe_optimizer, total_steps, warmup_steps
from drift_jax.progress import StageProgress, stage_progress
from drift_jax.sharding import Layout, build_layout, check_batch
from drift_jax.stages.inputs import Summary, open_policy, open_tokenizer
from drift_jax.stages.reference import RefJournal, RefLogps, share_ref_logps
from drift_jax.stages.reference_cache import ReferenceCache, reference_key
from drift_jax.stages.scoring import pair_logps, score_pairs
from drift_jax.stages.theory import Probe
from drift_jax.stages.tokens import TokenizedFile, describe_cuts, describe_rules, load_tokenized, sum_drops
from drift_jax.step import Metrics, TrainState
from drift_jax.stopping import Stopped
from drift_jax.telemetry import MetricsWriter, StageTimer, finite_losses, read_metrics
from drift_jax.train import Trainer, evaluate_scores, host_metrics


@dataclass(frozen=True)
class TrainJob:
    """One DPO stage: where it starts, what it compares with, what it learns from."""

    model_dir: Path  # the policy it starts from
    reference_dir: Path  # the reference; the same directory when the reference is the starting policy
    train_pairs: Path
    test_pairs: Path | None
    out_dir: Path
    epochs: float
    earlier: tuple[Path, ...] = ()  # directories of the stages before: whose margins the theory looks at again


def train_stage(config: RunConfig, job: TrainJob, console: Console, reference_hash: str | None = None) -> Summary:
    """Reference pass, then DPO; leaves the last checkpoint, metrics.jsonl and eval.json.

    Args:
      reference_hash: `Manifest.model_hash` of the reference, for `train.reference_cache`; None: by a manifest of
        `out_dir`, which reads the whole model.
    """
    check_checkpoint_place(job.out_dir)
    layout = build_layout(config.mesh)
    check_batch(layout, config.train.batch_size, config.train.accumulation_steps)
    tokenizer = open_tokenizer(job.model_dir, config.data.thinking)
    cache = job.out_dir / "tokens"
    train = load_tokenized(config, job.train_pairs, tokenizer, cache, console)
    test = load_tokenized(config, job.test_pairs, tokenizer, cache, console)
    warnings = [message for file, what in ((train, "train"), (test, "held-out")) if (message := file.warning(what))]
    if not train.pairs:
        raise train.nothing_left(job.train_pairs, "train on")
    steps = total_steps(len(train.pairs), config.train.batch_size, job.epochs, config.train.max_steps)
    if steps == 1 and warmup_steps(config.train, steps):
        warnings.append(
            "the stage has one update, and its warm-up starts at learning rate 0: nothing will be learnt. Set "
            "train.warmup_ratio to 0, or train longer."
        )
    for line in (describe_rules(config), describe_cuts(train, test), describe_optimizer(config.train, steps)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    trainer = build_trainer(config, job.model_dir, layout, steps)
    job.out_dir.mkdir(parents=True, exist_ok=True)
    run = _Stage(config, job, trainer, train, test, steps, console, reference_hash)
    for message in warnings:
        run.warn(message)
    on_main(lambda: remove_leftovers(job.out_dir))
    with Checkpointer(job.out_dir / "checkpoints", config.checkpoint.keep, alone=True) as checkpointer:
        state = run.start(checkpointer)
        with StageTimer() as timer:
            state = run.fit(state, checkpointer, timer)
        final, held_out = run.score_held_out(state)
    on_main(lambda: run.write_evaluation(final, held_out))
    losses = on_main(lambda: finite_losses(job.out_dir))
    return {
        "pairs": len(train.pairs),
        "held_out": len(test.pairs),
        "drops": sum_drops([train, test]),
        "truncation": dataclasses.asdict(train.cuts),
        "truncation_held_out": dataclasses.asdict(test.cuts),
        "steps": steps,
        "loss": float(np.mean(losses)) if losses else None,
        "tokens_per_second": timer.tokens_per_second,
        "warnings": run.warnings,
        **({"skipped_updates": run.finite.skipped} if run.finite.skipped else {}),
        **final,
    }


@final
class _Stage:
    """What the steps of one stage share."""

    ref: RefLogps  # of the pairs to train on, then of the held-out ones; set by `start`
    finite: FiniteWatch  # set by `fit`

    def __init__(
        self,
        config: RunConfig,
        job: TrainJob,
        trainer: Trainer,
        train: TokenizedFile,
        test: TokenizedFile,
        steps: int,
        console: Console,
        reference_hash: str | None,
    ) -> None:
        self.config = config
        self.job = job
        self.reference_hash = reference_hash
        self.trainer = trainer
        self.train = train.pairs
        self.test = test.pairs
        self.steps = steps
        self.console = console
        self.warnings: list[str] = []
        self.changed: dict[str, float] = {}  # of the update at hand: `params_changed`, where it is looked at
        self.probe = None
        if config.theory.every is not None:
            self.probe = Probe(config, trainer, train.pairs, job.out_dir, job.earlier, console)

    def warn(self, message: str) -> None:
        """Shows a warning, and keeps it for the stage's summary."""
        self.warnings.append(message)
        self.console.print(
            f"warning: {message}", style="yellow", highlight=False, soft_wrap=True, markup=False, emoji=False
        )

    def start(self, checkpointer: Checkpointer) -> TrainState:
        """The state to go on from: the newest checkpoint, or the starting policy. Sets `ref`."""
        job, every = self.job, self.train + self.test
        path = job.out_dir / "ref_logps.npz"
        ref, params = share_ref_logps(path, every), None
        loader = build_loader(self.config, self.trainer, self.train)  # plans its shapes once, where that is needed
        cache = self._cache(loader, every) if ref is None else None
        if cache is not None and on_main(lambda: cache.fetch(path)):
            ref = share_ref_logps(path, every)
            found = f"reference log-probs: those of an earlier run, {cache.path}"
            self.console.print(found, highlight=False, soft_wrap=True, markup=False)
        if ref is None:
            params = self._open(job.reference_dir)
            # First: whoever finds the file does not open the reference again.
            if self.probe is not None and not self.probe.has_reference:
                self.probe.refer(params)
            ref = self._reference(params, loader)
            if cache is not None:
                on_main(lambda: cache.store(path))
            # The reference is dropped here, unless it is the policy itself.
            params = params if job.reference_dir == job.model_dir else None
        self.ref = ref
        had_any = on_main(checkpointer.latest_step) is not None
        step = checkpointer.newest_whole(self.warn)
        if step is None and had_any:
            self.warn(f"no checkpoint of {job.out_dir} is left: this stage starts again from its first update")
        if step is not None:
            self.console.print(f"going on from the checkpoint of update {step}")
            abstract = self.trainer.abstract_state
            items = checkpointer.restore(step, {"params": abstract.params, "optimizer": abstract.opt_state})
            return self.trainer.state_at(step, items["params"], items["optimizer"])
        params = self._open(job.model_dir) if params is None else params
        if self.probe is not None and not self.probe.has_reference and job.reference_dir == job.model_dir:
            self.probe.refer(params)
        return self.trainer.init_state(params)

    def fit(self, state: TrainState, checkpointer: Checkpointer, timer: StageTimer) -> TrainState:
        """All updates that are left, with their metrics, guards, evaluations and checkpoints."""
        config, tracking, first = self.config, self.config.tracking, int(state.step)
        loader = build_loader(config, self.trainer, self.train, self.ref)
        if self.probe is not None and not self.probe.has_reference:
            self.probe.refer_to(self.ref.logps[: len(self.train)])
        meta = {"train": dataclasses.asdict(config.train), "pairs": len(self.train), "epochs": self.job.epochs}
        with (
            MetricsWriter(
                self.job.out_dir, trackers=tracking.trackers, project=tracking.project, resume_step=first or None
            ) as writer,
            stage_progress("DPO", self.steps - first, "updates", console=self.console) as bar,
            contextlib.ExitStack() as stack,
        ):
            earlier = on_main(lambda: read_metrics(self.job.out_dir)) if first else ()
            watch, self.finite = RewardWatch(config.train, self.steps, earlier), FiniteWatch(config.train, earlier)
            self.warnings += watch.earlier
            report = _Report(self, writer, watch, bar, timer, loader)
            clock = SaveClock(config.checkpoint.every_minutes, first)
            late: _Update | None = None
            for state, step, metrics, tokens in self.trainer.fit(state, loader, self.steps):  # noqa: B020
                if step == first + 1:  # until here nothing is lost
                    stack.enter_context(stopping.held())
                # The metrics of the update before are read now that this one is on its way.
                if late is not None:
                    report(late)
                late, last = _Update(step, metrics, tokens), step == self.steps
                stop = stopping.reached() and not last
                if not last and is_due(config.train.eval_every, step, loader.steps_per_epoch):
                    late = late._replace(evaluation=self.evaluate(state))
                if self.probe is not None and (last or is_due(config.theory.every, step, loader.steps_per_epoch)):
                    late = late._replace(evaluation=late.evaluation | self.probe.measure(state.params, last))
                due = is_due(config.checkpoint.every_steps, step, loader.steps_per_epoch) or clock.is_due(step)
                saves = last or stop or due
                if step == 1 or saves or late.evaluation:
                    report(late)
                    late = None
                if saves:
                    writer.sync()  # a checkpoint's rows are on disk before it is
                    items = {"params": state.params, "optimizer": state.opt_state}
                    checkpointer.save(step, items, meta | {"step": step, "next_batch": step})
                    clock.saved(step)
                if stop:
                    checkpointer.wait()
                    self.console.print(f"stopped after update {step} of {self.steps}, which is saved")
                    raise Stopped
            checkpointer.wait()
        return state

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """`eval_*` metrics of the held-out pairs; empty without such pairs."""
        return self.score_held_out(state)[0]

    def score_held_out(self, state: TrainState) -> tuple[dict[str, float], PairLogps | None]:
        """`eval_*` metrics of the held-out pairs, and what they were computed from; nothing without such pairs."""
        if not self.test:
            return {}, None
        scores = score_pairs(self.config, self.trainer, state.params, self.test, "held-out pairs", self.console)
        ref = self.ref.logps[len(self.train) :]
        return evaluate_scores(scores, ref, self.config.train), pair_logps(self.test, scores.logps, ref)

    def write_evaluation(self, final: dict[str, float], held_out: PairLogps | None) -> None:
        """`eval.json`: the metrics after the last update, and what the policy prefers against the stage's reference.

        `scores.test.jsonl` has what the latter was computed from, a row for each held-out pair.
        """
        found = {"step": self.steps, "pairs": len(self.test), **final}
        if held_out is not None:
            numbers = preference_numbers(held_out, self.config.train.beta)
            found["preference"] = {"reference": str(self.job.reference_dir), **numbers}
            write_jsonl(self.job.out_dir / "scores.test.jsonl", held_out.rows(self.config.train.beta))
        write_json(self.job.out_dir / "eval.json", found)

    def guard(self, step: int, numbers: dict[str, float], watch: RewardWatch) -> None:
        """Of an update whose gradient is finite."""
        train = self.config.train
        if step == 1 and self.job.reference_dir == self.job.model_dir:
            check_first_loss(numbers, train, self.config.model.compute_dtype)
        for message in check_params_changed(step, numbers, train):
            self.changed = {"params_changed": numbers["params_changed"]}
            self.console.print(message, highlight=False, soft_wrap=True, markup=False)
        for message in watch.update(step, numbers):
            self.warn(message)

    def _reference(self, params: Any, loader: PairLoader) -> RefLogps:
        """Of the pairs to train on, in the batches of the first epoch, then of the held-out ones."""
        every, count = self.train + self.test, len(self.train)
        with RefJournal(self.job.out_dir, every) as journal:
            with stage_progress("reference log-probs", count, "pairs", console=self.console) as bar:
                self.trainer.score_pairs(params, loader, bar.advance, True, journal.part(0, count))
            if self.test:
                what = "reference log-probs of held-out pairs"
                score_pairs(
                    self.config, self.trainer, params, self.test, what, self.console, journal.part(count, len(every))
                )
            return journal.finish()

    def _cache(self, loader: PairLoader, pairs: list[TokenizedPair]) -> ReferenceCache | None:
        """Where other runs may have left the log-probs of this pass; None: nowhere."""
        job, directory = self.job, self.config.train.reference_cache
        # The theory's own pairs want the reference in memory, which nothing else of the stage opens then.
        apart = self.probe is not None and not self.probe.has_reference and job.reference_dir != job.model_dir
        if directory is None or apart:
            return None
        model_hash = self.reference_hash or on_main(lambda: Manifest(job.out_dir).model_hash(job.reference_dir))
        key = reference_key(self.config, self.trainer, loader, self.test, model_hash)
        return ReferenceCache(Path(directory), key, pairs, self.warn)

    def _open(self, model_dir: Path) -> Any:
        """The parameters of a model directory, in the dtype of the master weights."""
        c = self.config
        return open_policy(
            model_dir, self.trainer.layout, c.model.compute_dtype, c.train.master_dtype, self.console
        ).params


class _Update(NamedTuple):
    """An update on its way: its metrics are still on the device."""

    step: int
    metrics: Metrics
    tokens: int
    evaluation: dict[str, float] = {}  # noqa: RUF012 - of held-out pairs, and of the theory


@final
@dataclass(frozen=True)
class _Report:
    """Waits for the metrics of an update; guards, writes and shows them."""

    stage: _Stage
    writer: MetricsWriter
    watch: RewardWatch
    bar: StageProgress
    timer: StageTimer
    loader: PairLoader

    def __call__(self, update: _Update) -> None:
        numbers, finite = host_metrics(update.metrics), self.stage.finite
        self.timer.count_tokens(update.tokens)
        is_finite = math.isfinite(numbers["grad_norm"])
        if is_finite:
            self.stage.guard(update.step, numbers, self.watch)
        del numbers["params_changed"]  # is 0 at all updates but one
        row = self.stage.changed | {
            "epoch": update.step / self.loader.steps_per_epoch,
            "tokens_per_second": self.timer.tokens_per_second,
        }
        last, every = update.step == self.stage.steps, self.stage.config.tracking.log_every
        wanted = update.evaluation or self.stage.changed or last or update.step % every == 0
        if wanted or not is_finite:
            self.writer.write(update.step, numbers | row | update.evaluation)
        self.stage.changed = {}
        if not is_finite:
            for message in finite.update(update.step, numbers, self.loader.ids(update.step - 1)):
                self.stage.warn(message)
        self.bar.advance(1, f"loss {numbers['loss']:.4f}, margin {numbers['rewards/margins']:+.4f}")


def build_trainer(config: RunConfig, model_dir: Path, layout: Layout, steps: int) -> Trainer:
    """The trainer of a stage of `steps` updates that starts from `model_dir`, as the config wants it."""
    architecture = PAD_EMBEDDINGS[config.model.pad_embedding](load_qwen_config(model_dir))
    graphdef, declared = declare_qwen(architecture, jnp.dtype(config.model.compute_dtype))
    model = config.model
    return Trainer(graphdef, declared, layout, config.train, model.remat, steps, model.attention, model.scan_layers)


def build_loader(
    config: RunConfig, trainer: Trainer, pairs: list[TokenizedPair], ref: RefLogps | None = None
) -> PairLoader:
    """The loader of the pairs to train on. `ref` may go on after the pairs; None: zeros, for the reference pass."""
    t, count = config.train, len(pairs)
    zeros = np.zeros((count, 2))
    return PairLoader(
        pairs,
        zeros if ref is None else ref.logps[:count],
        t.batch_size,
        t.accumulation_steps,
        config.data.max_length,
        t.seed,
        group_cut=build_rules(config.data).truncation.group_cut,
        group_size=t.group_size,
        ref_last_logps=zeros if ref is None else ref.last_logps[:count],
        split=batch_split(trainer.layout),
        tokens_per_device=t.tokens_per_device,
        attention=trainer.setup.attention.name,
        compile_tokens=trainer.compile_tokens(2 + 6 * t.epochs),
    )


def is_due(every: int | str | None, step: int, steps_per_epoch: int) -> bool:
    """Whether something that happens every so many updates, every epoch or never (None, "end") happens now."""
    interval = {"epoch": steps_per_epoch, "end": None, None: None}.get(every, every)
    return isinstance(interval, int) and step % interval == 0
