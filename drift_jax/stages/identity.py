"""What makes the result of a stage: the config keys and the input hashes that its manifest entry holds.

Other keys (mesh, remat, checkpoint, tracking, batch sizes without gradient) may change between two calls.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from drift_jax.config import RunConfig
from drift_jax.manifest import Manifest, config_slice
from drift_jax.stages.dpo import TrainJob
from drift_jax.stages.draws import method_of, needs_logps
from drift_jax.stages.rank import ranker_source

_SAMPLE_KEYS = ("recipe.method", "sampling.", "data.test_rows", "data.max_rows", "data.on_bad_row")
_TOKEN_KEYS = ("data.max_length", "data.max_prompt_length", "data.template", "data.eos", "data.truncation")
_TRAIN_KEYS = ("train.", *_TOKEN_KEYS, "data.on_bad_row", "model.compute_dtype", "model.pad_embedding")
# `on_nonfinite` may change where a stage has stopped: before, there was nothing to leave out.
_NOT_SHAPING = (
    "sampling.batch_size",
    "sampling.per_host",
    "train.eval_batch_size",
    "train.eval_every",
    "train.on_nonfinite",
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
    if method.ranks:
        keys["recipe.ranker"] = ranker
        if (source := ranker_source(ranker)) is not None:
            inputs["ranker"] = manifest.file_hash(source)
    return keys, inputs


def sampling_job(config: RunConfig, inputs: dict[str, str]) -> str:
    """A hash of all that completions depend on: of the same job they are the same. `inputs`: of `sample_identity`."""
    # n counts for what second draws are called; a chooser may need what else is not kept.
    keys = config_slice(config, ("sampling.",))
    sampling = config.sampling
    stored = {"second draws": sampling.on_cut == "resample", "log-probs": needs_logps(config)}
    draw = {key: keys[key] for key in (*_DRAW_KEYS, "sampling.n")}
    draw["sampling.style"] = " + ".join(method_of(config).draws)
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
    return config_slice(config, _TRAIN_KEYS, _NOT_SHAPING) | {"epochs": job.epochs}, inputs


def export_identity(config: RunConfig, manifest: Manifest, job: TrainJob) -> Identity:
    """Of the export that follows a DPO stage."""
    keys, inputs = train_identity(config, manifest, job)
    return keys | config_slice(config, ("export.",)), inputs
