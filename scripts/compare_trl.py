"""Trains the same model on the same pairs with TRL's DPOTrainer and with drift_jax, and compares every logged number.

    python scripts/compare_trl.py --model DIR --pairs FILE --steps 30 [--learning-rate 1e-4] [--max-length 512]

TRL (torch on the CPU) gets the pairs as messages and makes its own tokens; ours come from preset `trl1`, and must be
the same ids. Loss `sigmoid` + 0.001 `sft`, linear warm-up, rmsprop and AdamW in float32; with --bfloat16 also the
first optimizer with bfloat16 compute, whose difference is reported apart. Every update prints both sides. The last
line is JSON: `steps`, `max_rel_diff` over all float32 runs, and the `worst` quantity. `--set` takes keys that
TRL has no word for, for instance `--set train.moment_dtype=bfloat16`, to see what they cost.

A difference is relative to TRL's number. A reward is beta times the difference of two log-probs, each a float32 sum of
up to thousands of nats whose last bit alone may be 2e-4 nats: of a difference between rewards, four such roundings are
not counted, and the rest is relative to at least beta, which is one nat. While TRL's rewards are exactly 0 (no weight
has moved), its strict `rewards/accuracies` is 0 and ours, against stored reference log-probs, a matter of the last bit:
left out, and counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # runs from a checkout that is not installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402

from drift_jax.config import RunConfig, apply_override, build_config  # noqa: E402
from drift_jax.data.batches import epoch_order  # noqa: E402
from drift_jax.data.pairs import TokenizedPair, tokenize_pair  # noqa: E402
from drift_jax.data.rules import build_rules  # noqa: E402
from drift_jax.data.tokenizer import load_tokenizer  # noqa: E402
from drift_jax.errors import DriftError  # noqa: E402
from drift_jax.models.policy import load_policy  # noqa: E402
from drift_jax.progress import stage_progress  # noqa: E402
from drift_jax.records import Pair, pair_to_row, read_pairs  # noqa: E402
from drift_jax.sharding import build_layout  # noqa: E402
from drift_jax.stages.dpo import build_loader, build_trainer  # noqa: E402
from drift_jax.stages.reference import RefLogps  # noqa: E402
from drift_jax.step import KnownScores  # noqa: E402
from drift_jax.train import host_metrics  # noqa: E402

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
QUANTITIES = ("loss", "grad_norm", "learning_rate", *REWARDS, "rewards/accuracies", "logps/chosen", "logps/rejected")
ROUNDINGS = 4  # float32 roundings of a summed log-prob: two sums in the reward, on two sides
OPTIMIZERS = {"rmsprop": "rmsprop", "adamw": "adamw_torch"}  # our name -> that of transformers
OURS_ONLY = ("model.remat", "model.scan_layers", "model.attention", "mesh.", "train.tokens_per_device")
OURS_ONLY += ("train.accumulation_steps", "train.gradient_dtype", "train.moment_dtype")
Rows = list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What both sides do: our config, the pairs as text and as our ids, in the order of the updates."""

    config: RunConfig
    steps: int
    pairs: list[Pair]
    tokenized: list[TokenizedPair]

    @property
    def order(self) -> np.ndarray:
        """Positions of the pairs, update after update."""
        t, count = self.config.train, len(self.pairs)
        epochs = -(-self.steps * t.batch_size // count)
        order = np.concatenate([epoch_order(count, t.seed, epoch) for epoch in range(epochs)])
        return order[: self.steps * t.batch_size]


def make_comparison(args: argparse.Namespace, optimizer: str, compute_dtype: str) -> Comparison:
    """Reads and tokenises the pairs; pairs that TRL drops, and those that fill no whole batch, are left out."""
    raw = {
        "run_dir": "unused",
        "preset": "trl1",
        "model": {"path": str(args.model), "compute_dtype": compute_dtype, "remat": "none"},
        "data": {"max_length": args.max_length},
        "train": {
            "beta": args.beta,
            "rpo_alpha": args.rpo_alpha,
            "group_size": args.batch_size,  # TRL's micro-batch
            "optimizer": optimizer,
            "learning_rate": args.learning_rate,
            "warmup_ratio": 0.1,
            "batch_size": args.batch_size,
            "max_steps": args.steps,
            "seed": args.seed,
        },
    }
    for override in args.set:
        if not override.startswith(OURS_ONLY):
            raise DriftError(f"--set {override}: TRL's side would differ; what may be set begins with {OURS_ONLY}.")
        apply_override(raw, override)
    config = build_config(raw)
    tokenizer, rules = load_tokenizer(args.model), build_rules(config.data)
    pairs = list(read_pairs(args.pairs).records)
    tokenized = [tokenize_pair(p, tokenizer, config.data.max_prompt_length, args.max_length, rules) for p in pairs]
    fitting = [i for i, pair in enumerate(tokenized) if not pair.emptied]
    kept = fitting[: len(fitting) // args.batch_size * args.batch_size]  # our padded last batch has no twin in TRL
    if not kept:
        raise DriftError(
            f"{len(fitting)} of {len(pairs)} pairs have a prompt below --max-length {args.max_length}, fewer than one "
            f"batch of {args.batch_size}. Raise --max-length or lower --batch-size."
        )
    cut = sum(tokenized[i].chosen_tokens_cut + tokenized[i].rejected_tokens_cut > 0 for i in kept)
    print(
        f"{len(kept)} of {len(pairs)} pairs compared, {cut} of them cut to {args.max_length} tokens; left out: "
        f"{len(pairs) - len(fitting)} whose prompt fills it, {len(fitting) - len(kept)} of an incomplete batch"
    )
    return Comparison(config, args.steps, [pairs[i] for i in kept], [tokenized[i] for i in kept])


def run_trl(comparison: Comparison, model_dir: Path) -> Rows:
    """One row of metrics an update, from TRL's own log. Checks that TRL made the ids that we made."""
    import torch
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    disable_progress_bar()
    t, order = comparison.config.train, comparison.order
    bf16 = comparison.config.model.compute_dtype == "bfloat16"
    with tempfile.TemporaryDirectory() as out:
        arguments = DPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=bf16,
            beta=t.beta,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, t.rpo_alpha],
            max_length=comparison.config.data.max_length,
            optim=OPTIMIZERS[t.optimizer],
            learning_rate=t.learning_rate,
            lr_scheduler_type=t.schedule,
            warmup_steps=t.warmup_ratio,  # transformers 5: a number below 1 is a ratio
            weight_decay=t.weight_decay,
            max_grad_norm=t.max_grad_norm,
            per_device_train_batch_size=t.batch_size,
            max_steps=comparison.steps,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",  # the rows below are in our order
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        rows = [{key: value for key, value in pair_to_row(comparison.pairs[i]).items() if key != "meta"} for i in order]
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, trust_remote_code=False),
            args=arguments,
            # Not AutoTokenizer: by model_type qwen2 it would put its own pre-tokenizer for that of tokenizer.json.
            processing_class=PreTrainedTokenizerFast.from_pretrained(model_dir),
            train_dataset=Dataset.from_list(rows),
        )
        check_same_ids(trainer.train_dataset, [comparison.tokenized[i] for i in order], arguments.max_length)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [row for row in trainer.state.log_history if "rewards/margins" in row]


def check_same_ids(theirs: Any, ours: Sequence[TokenizedPair], max_length: int) -> None:
    """Raises `DriftError` when TRL made other tokens of a pair, naming it."""
    if len(theirs) != len(ours):
        raise DriftError(f"TRL keeps {len(theirs)} of {len(ours)} rows: it dropped some that preset trl1 keeps.")
    for row, pair in zip(theirs, ours, strict=True):
        for side, completion in (("chosen_ids", pair.chosen_ids), ("rejected_ids", pair.rejected_ids)):
            whole = (row["prompt_ids"] + row[side])[:max_length]
            split = min(len(row["prompt_ids"]), max_length)
            if whole[:split] != pair.prompt_ids.tolist() or whole[split:] != completion.tolist():
                raise DriftError(f"pair {pair.id}: TRL's {side} differ from those of preset trl1.")


def run_ours(comparison: Comparison, model_dir: Path) -> Rows:
    """One row of metrics an update, from the step that `drift train` runs."""
    config, layout = comparison.config, build_layout(comparison.config.mesh, jax.devices()[:1])
    trainer = build_trainer(config, model_dir, layout, comparison.steps)
    params = load_policy(model_dir, layout, config.model.compute_dtype).params
    # Of the pairs that these updates take, in their batches.
    passed_over = ~np.isin(np.arange(len(comparison.pairs)), comparison.order)
    reference = build_loader(config, trainer, comparison.tokenized)
    known = KnownScores(passed_over, lambda *_: None)
    scores = trainer.score_pairs(params, reference, as_trained=True, known=known)
    loader = build_loader(config, trainer, comparison.tokenized, RefLogps(scores.logps, scores.last_logps))
    with stage_progress("drift_jax", comparison.steps, "updates", console=Console(stderr=True)) as bar:
        rows = []
        for _, _, metrics, _ in trainer.fit(trainer.init_state(params), loader, comparison.steps):
            rows.append(host_metrics(metrics))
            bar.advance(1)
    return rows


def difference(name: str, theirs: Mapping[str, float], ours: Mapping[str, float], beta: float) -> float | None:
    """Relative to TRL's number, as the top of this file says; None where it is left out."""
    a, b = theirs[name], ours[name]
    if name == "rewards/accuracies" and theirs["rewards/chosen"] == theirs["rewards/rejected"] == 0:
        return None
    gap, scale = abs(b - a), abs(a)
    if name in REWARDS:
        scale = max(scale, beta)
        logps = max(abs(theirs["logps/chosen"]), abs(theirs["logps/rejected"]))
        gap = max(0.0, gap - ROUNDINGS * beta * float(np.spacing(np.float32(logps))))
    return 0.0 if gap == 0 else gap / scale if scale else float("inf")


def report(title: str, trl: Rows, ours: Rows, beta: float, console: Console) -> dict[str, Any]:
    """Prints both sides of every update, and returns the largest difference and where it is."""
    console.print(f"\n{title}\n", highlight=False)
    console.print("| step | | " + " | ".join(QUANTITIES) + " |", soft_wrap=True, highlight=False)
    console.print("| ---: | --- |" + " ---: |" * len(QUANTITIES), soft_wrap=True, highlight=False)
    worst: dict[str, Any] = {"rel_diff": -1.0}
    left_out = 0
    for step, (a, b) in enumerate(zip(trl, ours, strict=True), start=1):
        for side, row in (("TRL", a), ("drift_jax", b)):
            cells = " | ".join(f"{row[name]:.7g}" for name in QUANTITIES)
            console.print(f"| {step} | {side} | {cells} |", soft_wrap=True, highlight=False)
        for name in QUANTITIES:
            found = difference(name, a, b, beta)
            left_out += found is None
            if found is not None and not found <= worst["rel_diff"]:  # NaN counts as worst
                worst = {"run": title, "step": step, "quantity": name, "trl": a[name], "ours": b[name]}
                worst["rel_diff"] = found
    console.print(f"\nlargest relative difference: {worst}; accuracies left out: {left_out}", soft_wrap=True)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of a Qwen2, Qwen3 or Llama")
    parser.add_argument("--pairs", type=Path, default=REPO / "data/sample/compare.jsonl", help="JSONL of pairs")
    parser.add_argument("--steps", type=int, default=30, help="updates")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs an update")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt + completion")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--rpo-alpha", type=float, default=0.001, help="weight of the sft loss")
    parser.add_argument("--seed", type=int, default=42, help="order of the pairs")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--bfloat16", action="store_true", help="also with bfloat16 compute")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our config")
    args = parser.parse_args()
    console = Console(width=240)
    runs = [(optimizer, "float32") for optimizer in args.optimizers]
    runs += [(args.optimizers[0], "bfloat16")] if args.bfloat16 else []
    worst: dict[str, list[dict[str, Any]]] = {"float32": [], "bfloat16": []}
    try:
        for optimizer, dtype in runs:
            comparison = make_comparison(args, optimizer, dtype)
            trl, ours = run_trl(comparison, args.model), run_ours(comparison, args.model)
            worst[dtype].append(report(f"{optimizer}, {dtype}", trl, ours, args.beta, console))
    except DriftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {"steps": args.steps} | summarise(worst["float32"])
    if worst["bfloat16"]:
        result["bfloat16"] = summarise(worst["bfloat16"])
    print(json.dumps(result))
    return 0


def summarise(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of several runs."""
    worst = max(found, key=lambda entry: entry["rel_diff"])
    return {"max_rel_diff": worst["rel_diff"], "worst": worst}


if __name__ == "__main__":
    sys.exit(main())
