"""What is valid in a config and yet not meant: keys that nothing reads, weights that forget what they learnt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from drift_jax.config import RunConfig, SamplingConfig, TheoryConfig, TrainConfig, VllmConfig
from drift_jax.methods import load_method

_ADAM, _RMSPROP = ("adam_beta1", "adam_beta2", "adam_epsilon"), ("rmsprop_decay", "rmsprop_epsilon")


def print_advice(config: RunConfig, console: Console) -> None:
    """A warning a line; a run goes on."""
    for message in [*_unused_keys(config), *_rounded_between_stages(config)]:
        console.print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True, markup=False, emoji=False)


def _unused_keys(config: RunConfig) -> Iterator[str]:
    """Keys that differ from their default and that nothing reads, because of what another key says."""
    train, sampling, theory = config.train, config.sampling, config.theory
    unused: list[tuple[str, Any, Any, tuple[str, ...], str]] = []  # section, values, defaults, keys, why
    names = _ADAM if train.optimizer != "adamw" else _RMSPROP
    unused.append(("train", train, TrainConfig(), names, f"train.optimizer is {train.optimizer}"))
    if train.warmup_steps is not None:
        unused.append(("train", train, TrainConfig(), ("warmup_ratio",), "train.warmup_steps replaces it"))
    if sampling.chooser != "longest_within":
        why = f"sampling.chooser is {sampling.chooser}"
        unused.append(("sampling", sampling, SamplingConfig(), ("longest_within",), why))
    if sampling.engine != "vllm":
        keys = tuple(field.name for field in dataclasses.fields(VllmConfig))
        unused.append(("vllm", config.vllm, VllmConfig(), keys, f"sampling.engine is {sampling.engine}"))
    if theory.every is None:
        unused.append(("theory", theory, TheoryConfig(), ("pairs", "tau"), "theory.every is null"))
    for section, values, defaults, keys, why in unused:
        for key in keys:
            if getattr(values, key) != getattr(defaults, key):
                yield f"{section}.{key} ({getattr(values, key)}) has no effect: {why}."
    recipe = config.recipe
    if recipe.ranker != "logprob" and not load_method(recipe.method, sampling.style).ranks:
        yield f"recipe.ranker ({recipe.ranker}) has no effect: recipe.method {recipe.method} ranks nothing."


def _rounded_between_stages(config: RunConfig) -> Iterator[str]:
    """With bfloat16 activations a policy is measured as it is exported, for weights are rounded in either case."""
    if config.model.compute_dtype == "float32" and config.export.dtype != "float32":
        yield (
            f"policies are trained and measured in float32, and exported in {config.export.dtype}: the next stage "
            "starts from rounded weights, which forget what moved a weight by less than half of their spacing. "
            "export.dtype=float32 keeps it."
        )
