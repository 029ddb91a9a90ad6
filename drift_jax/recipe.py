"""The recipe: a seed stage, then K iterations of sampling responses, pairing them and DPO on the pairs.

    policy_0 = DPO(model, seed pairs)
    for k = 1..K:
        chosen   ~ policy_{k-1}( . | dialogue + logged reply + complaint + "improve")
        rejected = the logged reply the user complained about
        policy_k = one epoch of DPO from policy_{k-1} on these pairs

That is `recipe.method: drift`. The others differ in where chosen and rejected come from, and in nothing else: a
function each in `methods/`.

Every stage leaves files in the run directory; running the same command again skips what is finished, resumes what
was interrupted, and refuses what was made with another config (`manifest.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, final

import jax
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text
from typing_extensions import TypedDict  # pydantic needs it on Python 3.11

from drift_jax.checkpoint import find_damage
from drift_jax.config import RunConfig, config_to_yaml
from drift_jax.distributed import on_each, on_main
from drift_jax.files import atomic_writer, check_checkpoint_place
from drift_jax.manifest import Manifest
from drift_jax.models.hf import check_weights, load_qwen_config, resolve_model
from drift_jax.models.qwen import declare_qwen, param_shardings
from drift_jax.parts import Kind, Part
from drift_jax.progress import StageSummary, printable, summary_markdown, summary_table
from drift_jax.reading import check_form, read_json
from drift_jax.records import read_pairs
from drift_jax.sharding import build_layout, check_batch
from drift_jax.stages.advice import print_advice
from drift_jax.stages.devices import layout_of_all
from drift_jax.stages.dpo import TrainJob, train_stage
from drift_jax.stages.engines import ENGINES
from drift_jax.stages.export import export_stage
from drift_jax.stages.identity import export_identity, sample_identity, sampling_job, train_identity
from drift_jax.stages.inputs import Summary, load_split, open_tokenizer, records_path, refuse_held_out, run_lock
from drift_jax.stages.pair import check_choosing, pair_stage
from drift_jax.stages.sample import sample_stage
from drift_jax.stages.showcase import showcase_stage
from drift_jax.telemetry import check_trackers, peak_rss_gib


def run(config: RunConfig, console: Console, part: Part | None = None) -> Path:
    """Runs the whole recipe, or what is left of it. Returns the directory of the exported policy.

    Args:
      part: of a run as a chain of processes, what this one does; None: everything.

    Raises:
      DriftError: see the stages; whatever was finished before stays, and the same command goes on from there.
      PartEnd: the next stage is not one of this part.
    """
    if config.recipe.iterations:
        records_path(config)
    run_dir = Path(config.run_dir)
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        # An iteration compiles what the one before compiled; so does a run that is resumed.
        jax.config.update("jax_compilation_cache_dir", str(run_dir.absolute() / ".cache" / "xla"))
    initial = on_each(lambda: resolve_model(config.model.path, config.model.revision))
    trains = part is None or part.kind == "training"
    on_main(lambda: check_run(config, initial, trains))
    if config.recipe.iterations:
        ENGINES[config.sampling.engine](config, initial)
    if config.recipe.showcase_prompts and trains:
        layout_of_all(config, on_each(lambda: load_qwen_config(initial)))
    if part is None or part.is_first:
        print_advice(config, console)
    with run_lock(run_dir):
        recipe = Recipe(config, run_dir, console, part)
        policy = initial
        if config.data.seed_train:
            policy = recipe.seed(policy)
        for iteration in range(1, config.recipe.iterations + 1):
            policy = recipe.iterate(iteration, policy, initial)
        recipe.show(initial, policy)
    return policy


class _Answer(TypedDict):
    prompt: str
    before: str
    after: str


def _read_answers(path: Path) -> list[dict[str, str]]:
    """What the showcase stage wrote, of this call or one before."""
    remedy = "Restore it, or give a new run directory with --run-dir."
    return check_form(list[_Answer], read_json(path, remedy), str(path), remedy)


def check_run(config: RunConfig, model_dir: Path, trains: bool = True) -> None:
    """Finds what would stop a later stage before the first one has cost any time.

    Args:
      trains: whether this process has the devices of `config.mesh`.

    Raises:
      DriftError: no checkpoints can be kept in the directory; the mesh does not fit the devices, the batches or the
        model; the tokenizer does not fit the model; a tracker or what a rule of `sampling` needs is not installed;
        the judge's key is not set; an input file is missing or has bad rows.
    """
    check_checkpoint_place(Path(config.run_dir))
    if trains:
        layout = build_layout(config.mesh)
        check_batch(layout, config.train.batch_size, config.train.accumulation_steps)
        param_shardings(declare_qwen(load_qwen_config(model_dir))[1], layout)
    check_trackers(config.tracking.trackers)
    open_tokenizer(model_dir, config.data.thinking)
    check_weights(model_dir)
    for path in filter(None, (config.data.seed_train, config.data.seed_test)):
        read_pairs(path, config.data.on_bad_row)
    if config.recipe.iterations:
        records = records_path(config)
        split = load_split(config, str(records))
        if not any(stage.startswith("iter_") for stage in Manifest(Path(config.run_dir)).stages()):
            refuse_held_out(split, records)  # a run that has begun otherwise goes on as it began
        check_choosing(config)


@final
class Recipe:
    """The stages of one run directory, entered and finished through its manifest."""

    def __init__(self, config: RunConfig, run_dir: Path, console: Console, part: Part | None = None) -> None:
        self.config = config
        self.part = part
        self.tells_skipped = part is None or part.is_first
        self.run_dir = run_dir
        self.console = console
        self.manifest = on_each(lambda: Manifest(run_dir))
        self.started = part.started if part else time.monotonic()
        self.rows: list[StageSummary] = []
        on_main(lambda: run_dir.mkdir(parents=True, exist_ok=True))

    def seed(self, policy: Path) -> Path:
        """DPO on the seed pairs: policy_0."""
        data = self.config.data
        assert data.seed_train is not None
        test = Path(data.seed_test) if data.seed_test else None
        epochs = self.config.recipe.seed_epochs
        job = TrainJob(policy, policy, Path(data.seed_train), test, self.run_dir / "seed", epochs)
        return self._train_and_export("seed", job, {})

    def iterate(self, iteration: int, policy: Path, initial: Path) -> Path:
        """One iteration: sample, pair, train, export. Returns policy_k."""
        name, out_dir = f"iter_{iteration}", self.run_dir / f"iter_{iteration}"
        records = records_path(self.config)
        keys, inputs = on_main(lambda: sample_identity(self.config, self.manifest, policy, records))
        job = on_main(lambda: sampling_job(self.config, inputs, policy))
        pairs = (out_dir / "pairs.train.jsonl", out_dir / "pairs.test.jsonl")
        if self._reopen_lost(f"{name}/pair", *pairs):  # only then are completions needed again
            self._reopen_lost(f"{name}/sample", out_dir / "completions.jsonl")
        sample = partial(sample_stage, self.config, policy, str(records), out_dir, self.console, job)
        self._stage(f"{name}/sample", keys, inputs, sample, "sampling")
        pair = partial(pair_stage, self.config, inputs["policy"], str(records), out_dir, self.console)
        self._stage(f"{name}/pair", keys, inputs, lambda: on_main(pair))
        reference = {"previous": policy, "initial": initial}[self.config.recipe.reference]
        earlier = tuple(self.run_dir / of for of in ("seed", *(f"iter_{k}" for k in range(1, iteration))))
        job = TrainJob(policy, reference, pairs[0], pairs[1], out_dir, self.config.train.epochs, earlier)
        return self._train_and_export(name, job, {"recipe.reference": self.config.recipe.reference})

    def show(self, initial: Path, policy: Path) -> None:
        """The end of a run: the table of stages, replies before and after, and where the policy lies."""
        answers: list[dict[str, str]] = []
        if self.config.recipe.showcase_prompts:
            keys = {"prompts": list(self.config.recipe.showcase_prompts)}
            models = {"before": initial, "after": policy}
            inputs = on_main(lambda: {when: self.manifest.model_hash(path) for when, path in models.items()})
            path = self.run_dir / "showcase.json"
            # More iterations make another policy to show.
            on_main(lambda: self.manifest.renew("showcase", keys, inputs))
            self._reopen_lost("showcase", path)
            self._stage(
                "showcase", keys, inputs, lambda: showcase_stage(self.config, initial, policy, path, self.console)
            )
            answers = on_main(lambda: _read_answers(path))
        self.console.print(summary_table(self.rows, title=escape(str(self.run_dir))))
        for answer in answers:
            before, after = (printable(answer[when], lines=12) for when in ("before", "after"))
            text = Text.assemble(("before  ", "dim"), before, "\n\n", ("after   ", "bold"), after)
            self.console.print(Panel(text, title=Text(printable(answer["prompt"])), title_align="left"))
        text = summary_markdown(self.rows)
        on_main(lambda: self._write("summary.md", text))
        seconds = time.monotonic() - self.started
        memory = "" if self.part else f", at most {peak_rss_gib():.1f} GiB of memory"
        self.console.print(f"{seconds:.0f} seconds{memory}")
        self.console.print(f"policy: {policy}", highlight=False, soft_wrap=True, markup=False)

    def _train_and_export(self, name: str, job: TrainJob, more_keys: dict[str, Any]) -> Path:
        hf, checkpoints = job.out_dir / "hf", job.out_dir / "checkpoints"
        self._reopen_lost(f"{name}/export", hf)
        keys, inputs = on_main(lambda: train_identity(self.config, self.manifest, job))
        work = partial(train_stage, self.config, job, self.console, inputs["reference"])
        train = partial(self._stage, f"{name}/train", keys | more_keys, inputs, work)
        if train() and not self._is_kept(name, job):
            self.rows.pop()
            train()
        keys, inputs = on_main(lambda: export_identity(self.config, self.manifest, job))
        self._stage(
            f"{name}/export",
            keys | more_keys,
            inputs,
            lambda: export_stage(self.config, checkpoints, job.model_dir, hf, self.console),
        )
        return hf

    def _is_kept(self, name: str, job: TrainJob) -> bool:
        """Whether what an earlier call has trained is there for the export; if not, the stage is open again."""
        if self.part is not None and self.part.kind != "training":
            return True

        def look() -> bool:
            last = self.manifest.summary(f"{name}/train")["steps"]
            problem = None
            if not self.manifest.is_finished(f"{name}/export"):
                problem = find_damage(job.out_dir / "checkpoints" / str(last))
            if problem is not None:
                self.manifest.reopen(f"{name}/train")
                self.console.print(
                    f"{name}/train is to be done again from what is left: {problem}", style="yellow", soft_wrap=True
                )
            return problem is None

        return on_main(look)

    def _reopen_lost(self, stage: str, *made: Path) -> bool:
        """Opens a finished stage again where something that it made is gone. Returns whether it is open."""

        def look() -> bool:
            lost = [str(path) for path in made if not path.exists()]
            if lost and self.manifest.is_finished(stage):
                self.manifest.reopen(stage)
                what = f"{stage} is to be done again: {' and '.join(lost)} is gone"
                self.console.print(what, style="yellow", highlight=False, soft_wrap=True, markup=False)
            return not self.manifest.is_finished(stage)

        return on_main(look)

    def _stage(
        self,
        stage: str,
        keys: dict[str, Any],
        inputs: dict[str, str],
        work: Callable[[], Summary],
        kind: Kind = "training",
    ) -> bool:
        """Does the work unless it is done; either way its row goes into the closing table.

        Returns whether it was done by an earlier call.

        Raises `PartEnd` where it is to be done by a process of another kind.
        """
        if self.part and self.part.kind != kind and not on_main(lambda: self.manifest.is_finished(stage)):
            raise self.part.end(self.config)
        before = on_main(lambda: self._enter(stage, keys, inputs))
        if before:
            if self.tells_skipped:
                self.console.print(f"{stage}: finished before, skipped", style="dim")
        else:
            self.console.rule(stage, align="left")
            start = time.monotonic()
            summary = work()
            on_main(lambda: self._finish(stage, summary | {"seconds": time.monotonic() - start}))
        s = on_main(lambda: self.manifest.summary(stage))
        self.rows.append(
            StageSummary(
                stage=stage,
                pairs=s.get("pairs"),
                drops=s.get("drops", {}),
                loss=s.get("loss"),
                eval_margins=s.get("eval_rewards/margins"),
                eval_accuracies=s.get("eval_rewards/accuracies"),
                tokens_per_second=s.get("tokens_per_second"),
                seconds=s.get("seconds"),
            )
        )
        return before

    def _enter(self, stage: str, keys: dict[str, Any], inputs: dict[str, str]) -> bool:
        """True when the stage is finished already."""
        if self.manifest.enter(stage, keys, inputs):
            return True
        # Only now: a refused call must not replace the config that the run was made with.
        self._write("config.yaml", config_to_yaml(self.config))
        self._log(stage, "started")
        return False

    def _write(self, name: str, text: str) -> None:
        with atomic_writer(self.run_dir / name) as file:
            file.write(text)

    def _finish(self, stage: str, summary: dict[str, Any]) -> None:
        self.manifest.finish(stage, summary)
        self._log(stage, "finished")

    def _log(self, stage: str, event: str) -> None:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "stage": stage, "event": event}
        with (self.run_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
