"""One epoch of Tunix's DPOTrainer over given ids. Run by `scripts/bench_step.py` in Tunix's own virtual environment.

Tunix wants prompts and responses of one length each: the longest of the set. It holds a second model as reference, and
runs it before each micro-batch. The first micro-batches run twice, one call for each to see what compiling takes; then
weights and optimizer are set back, and the epoch is timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from handover import FedIds, Result, Task, installed_versions, pad_rows, read_task, say, write_result
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput


def load_model(task: Task) -> qwen2.Qwen2:
    """A Hugging Face directory of a Qwen2, float32 weights."""
    c = json.loads((Path(task.model_dir) / "config.json").read_text())
    config = qwen2.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=c["rope_theta"],
        norm_eps=c["rms_norm_eps"],
        use_tied_embedding=c["tie_word_embeddings"],
        dtype=jnp.dtype(task.dtype),
        param_dtype=jnp.float32,
    )
    return qwen2_params.create_model_from_safe_tensors(task.model_dir, config, dtype=jnp.float32)


def build_trainer(task: Task, reference: qwen2.Qwen2) -> DPOTrainer:
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.rmsprop(task.learning_rate, decay=0.99, eps=1e-8, eps_in_sqrt=False),
    )
    accumulation = task.batch_size // task.micro_batch_size
    config = DPOTrainingConfig(
        eval_every_n_steps=10**9,
        beta=task.beta,
        gradient_accumulation_steps=accumulation if accumulation > 1 else None,
    )
    trainer = DPOTrainer(load_model(task), reference, optimizer, config)
    trainer.is_managed_externally = True  # several calls of `train` go on with one another
    return trainer


def micro_batches(task: Task) -> list[TrainingInput]:
    """All pairs in their order, padded to the longest prompt and the longest response of the set."""
    parts = {name: [pair[name] for pair in task.pairs] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    response = max(len(row) for name in ("chosen_ids", "rejected_ids") for row in parts[name])
    prompts = pad_rows(parts["prompt_ids"], max(map(len, parts["prompt_ids"])), left=True)
    arrays = (*prompts, *pad_rows(parts["chosen_ids"], response), *pad_rows(parts["rejected_ids"], response))
    size = task.micro_batch_size
    return [TrainingInput(*(a[i : i + size] for a in arrays)) for i in range(0, len(task.pairs), size)]


def record(batches: list[TrainingInput], fed: FedIds) -> Iterator[TrainingInput]:
    """The batches as the trainer takes them."""
    for batch in batches:
        masked = (
            (batch.prompt_ids, batch.prompt_mask),
            (batch.chosen_ids, batch.chosen_mask),
            (batch.rejected_ids, batch.rejected_mask),
        )
        for i in range(len(batch.prompt_ids)):
            fed.add(*(ids[i][mask[i] > 0] for ids, mask in masked))
        yield batch


def set_back(trainer: DPOTrainer, reference: qwen2.Qwen2) -> None:
    """Weights and optimizer as before the first update."""
    nnx.update(trainer.model, jax.tree.map(jnp.copy, nnx.state(reference)))
    state = nnx.state(trainer.optimizer, nnx.optimizer.OptState)
    nnx.update(trainer.optimizer, jax.tree.map(jnp.zeros_like, state))


def timed(trainer: DPOTrainer, batches: Any) -> float:
    """Seconds of `train`, which returns when the device is done."""
    start = time.perf_counter()
    trainer.train(batches)
    return time.perf_counter() - start


def main() -> None:
    task = read_task()
    reference = load_model(task)
    trainer, batches, fed = build_trainer(task, reference), micro_batches(task), FedIds()
    update = task.batch_size // task.micro_batch_size
    say("Tunix: warm-up")
    # Compiled at the first call, and again when the state comes back placed otherwise; so whole updates, three calls.
    warm_up = [timed(trainer, [batches[i % update]]) for i in range(-(-3 // update) * update)]
    set_back(trainer, reference)
    say(f"Tunix: {task.steps} updates; micro-batches of the warm-up took {', '.join(f'{s:.1f}' for s in warm_up)} s")
    seconds = timed(trainer, record(batches, fed))
    trainer.close()  # writes the last metrics
    say(f"Tunix: {seconds:.1f} s")

    def mean(name: str) -> float:
        return float(np.mean(trainer.metrics_logger.get_metric_history("", name, "train")[-task.steps :]))

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    row = batches[0].prompt_ids.shape[1] + batches[0].chosen_ids.shape[1]
    write_result(
        Result(
            seconds=seconds,
            reference_seconds=None,
            compile_s=sum(warm_up) - len(warm_up) * warm_up[-1],
            loss=mean("loss"),
            logps_chosen=mean("log_probs/chosen"),
            computed_tokens=2 * row * len(task.pairs),
            fed=fed.digest(),
            peak_device_gb=stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None,
            device=device.device_kind,
            versions=installed_versions("google-tunix", "jax", "flax", "optax"),
            settings=f"micro-batches of {task.micro_batch_size}, accumulation {update}, rows of {row} "
            "(longest prompt + longest response), no remat, reference model in memory",
        )
    )


if __name__ == "__main__":
    main()
