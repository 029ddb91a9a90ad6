"""What makes the result of a stage: the config keys and the input hashes that its manifest entry holds.

Other keys (mesh, remat, checkpoint, tracking, batch sizes without gradient, how an update is packed) may change between
two calls.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from drift_jax.config import RunConfig
from drift_jax.data.chat_template import knows_thoughts
from drift_jax.data.tokenizer_files import find_chat_template, read_object
from drift_jax.manifest import Manifest, config_slice
from drift_jax.stages.dpo import TrainJob
from drift_jax.stages.draws import method_of, needs_logps
from drift_jax.stages.rank import ranker_source

_SAMPLE_KEYS = ("recipe.method", "sampling.", "data.test_rows", "data.max_rows", "data.on_bad_row")
_TOKEN_KEYS = ("data.max_length", "data.max_prompt_length", "data.template", "data.eos", "data.truncation")
_TRAIN_KEYS = ("train.", *_TOKEN_KEYS, "data.on_bad_row", "model.compute_dtype", "model.pad_embedding")
# `on_nonfinite` may change where a stage has stopped: before, there was nothing to leave out.
# `accumulation_steps` and `tokens_per_device`, which people change when memory runs out, say how an update is packed,
# and neither which pairs it has nor what they count for. Nor does a log-prob depend on it, but for its last digits:
# what a reference pass or its journal holds stays good, in bfloat16 within the rounding that another mesh brings too.
_NOT_SHAPING = (
    "sampling.batch_size",
    "sampling.per_host",
    "sampling.tensor_parallel",
    "train.accumulation_steps",
    "train.tokens_per_device",
    "train.eval_batch_size",
    "train.eval_every",
    "train.on_nonfinite",
    "train.reference_cache",
)
_JUDGE_KEYS = ("judge.model", "judge.temperature", "judge.max_tokens")  # where the server is shapes nothing
# What a single completion depends on, beside policy and records.
_DRAW_KEYS = (
    "sampling.engine",
    "sampling.style",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.top_k",
    "sampling.max_new_tokens",
    "sampling.max_input_length",
    "sampling.compute_dtype",
    "sampling.seed",
)

Identity = tuple[dict[str, Any], dict[str, str]]  # (config keys, input hashes)


def sample_identity(config: RunConfig, manifest: Manifest, policy: Path, records: Path) -> Identity:
    """Of the sample and the pair stage."""
    method, ranker = method_of(config), config.recipe.ranker
    asks = config.sampling.chooser == "judge" or (method.ranks and ranker == "judge")
    keys = config_slice(config, (*_SAMPLE_KEYS, *(_JUDGE_KEYS if asks else ())), _NOT_SHAPING)
    inputs = {method.records: manifest.file_hash(records), "policy": manifest.model_hash(policy)}
    keys |= _told(config, policy)
    if method.ranks:
        keys["recipe.ranker"] = ranker
        if (source := ranker_source(ranker)) is not None:
            inputs["ranker"] = manifest.file_hash(source)
    return keys, inputs


def sampling_job(config: RunConfig, inputs: dict[str, str], policy: Path) -> str:
    """A hash of all that completions depend on: of the same job they are the same. `inputs`: of `sample_identity`."""
    # n counts for what second draws are called; a chooser may need what else is not kept.
    keys = config_slice(config, ("sampling.",))
    sampling = config.sampling
    stored = {"second draws": sampling.on_cut == "resample", "log-probs": needs_logps(config)}
    draw = {key: keys[key] for key in (*_DRAW_KEYS, "sampling.n")}
    draw["sampling.style"] = " + ".join(method_of(config).draws)
    if config.data.thinking != "template":  # as before there was the key
        draw |= _told(config, policy)
    values = [draw, stored, {name: of for name, of in inputs.items() if name != "ranker"}]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def train_identity(config: RunConfig, manifest: Manifest, job: TrainJob) -> Identity:
    """Of a DPO stage."""
    inputs = {
        "train pairs": manifest.file_hash(job.train_pairs),
        "policy": manifest.model_hash(job.model_dir),
        "reference": manifest.model_hash(job.reference_dir),
    }
    if job.test_pairs is not None:
        inputs["test pairs"] = manifest.file_hash(job.test_pairs)
    keys = config_slice(config, _TRAIN_KEYS, _NOT_SHAPING) | _told(config, job.model_dir)
    return keys | {"epochs": job.epochs}, inputs


def export_identity(config: RunConfig, manifest: Manifest, job: TrainJob) -> Identity:
    """Of the export that follows a DPO stage."""
    keys, inputs = train_identity(config, manifest, job)
    return keys | config_slice(config, ("export.",)), inputs


def _told(config: RunConfig, model_dir: Path) -> dict[str, str]:
    """What the model's chat template is told; nothing where it does not ask."""
    template = find_chat_template(model_dir, read_object(model_dir / "tokenizer_config.json"))
    return {"data.thinking": config.data.thinking} if knows_thoughts(template) else {}
