"""One epoch of TRL's DPOTrainer over given ids. Run by `scripts/bench_step.py` in TRL's own virtual environment.

The first update runs twice: once on a trainer of its own, to load and warm up what torch loads late, and then timed.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from datasets import Dataset
from handover import FedIds, Result, Task, installed_versions, read_task, say, write_result
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer


class TimedTrainer(DPOTrainer):
    """TRL's trainer on rows that are ids already, with a clock on its reference pass."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any) -> Dataset:
        start = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args)
        self.reference_seconds = time.perf_counter() - start
        return dataset


class RecordingCollator:
    """TRL's collator, keeping account of the batches that it makes."""

    def __init__(self, collate: Any) -> None:
        self.collate, self.fed, self.tokens = collate, FedIds(), 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collate(examples)
        self.tokens += batch["input_ids"].numel()
        sides = []
        for row in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
            ids, real, completion = (part.tolist() for part in row)
            split = completion.index(1)
            sides.append((ids[:split], ids[split : sum(real)]))
        half = len(examples)
        for (prompt, chosen), (_, rejected) in zip(sides[:half], sides[half:], strict=True):
            self.fed.add(prompt, chosen, rejected)
        return batch


def build_trainer(task: Task, rows: Sequence[dict[str, list[int]]], out: str) -> TimedTrainer:
    """A trainer on fresh weights. With `task.precompute` the reference pass runs here."""
    arguments = DPOConfig(
        output_dir=out,
        use_cpu=not torch.cuda.is_available(),
        bf16=task.dtype == "bfloat16",
        beta=task.beta,
        max_length=task.max_length,
        precompute_ref_log_probs=task.precompute,
        gradient_checkpointing=task.gradient_checkpointing,
        optim="rmsprop",
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        per_device_train_batch_size=task.micro_batch_size,
        gradient_accumulation_steps=task.batch_size // task.micro_batch_size,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(task.model_dir, dtype=torch.float32, trust_remote_code=False),
        args=arguments,
        # Not AutoTokenizer: by model_type qwen2 it would put its own pre-tokenizer for that of tokenizer.json.
        processing_class=PreTrainedTokenizerFast.from_pretrained(task.model_dir),
        train_dataset=Dataset.from_list(list(rows)),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def main() -> None:
    task = read_task()
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as out:
        say("TRL: warm-up")
        start = time.perf_counter()
        trainer = build_trainer(task, task.pairs[: task.batch_size], out)
        trainer.train()
        first = time.perf_counter() - start
        del trainer
        gc.collect()
        say(f"TRL: {task.steps} updates")
        trainer = build_trainer(task, task.pairs, out)
        recorder = trainer.data_collator = RecordingCollator(trainer.data_collator)
        start = time.perf_counter()
        trainer.train()
        if cuda:
            torch.cuda.synchronize()
        epoch = time.perf_counter() - start
    say(f"TRL: warm-up {first:.1f} s, reference pass {trainer.reference_seconds:.1f} s, epoch {epoch:.1f} s")
    rows = [row for row in trainer.state.log_history if "rewards/margins" in row]
    write_result(
        Result(
            seconds=trainer.reference_seconds + epoch,
            reference_seconds=trainer.reference_seconds if task.precompute else None,
            compile_s=0.0,
            loss=sum(row["loss"] for row in rows) / len(rows),
            logps_chosen=sum(row["logps/chosen"] for row in rows) / len(rows),
            computed_tokens=recorder.tokens,
            fed=recorder.fed.digest(),
            peak_device_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
            device=torch.cuda.get_device_name() if cuda else "cpu",
            versions=installed_versions("trl", "torch", "transformers"),
            settings=f"batches of {task.micro_batch_size}, reference {'before' if task.precompute else 'within'} the "
            f"epoch, gradient checkpointing {'on' if task.gradient_checkpointing else 'off'}, eager, attention sdpa",
        )
    )


if __name__ == "__main__":
    main()
