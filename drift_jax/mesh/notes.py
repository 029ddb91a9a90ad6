"""What a reader of a mesh report must know besides: work done twice, dims left whole, what a run would refuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax

from drift_jax.config import RunConfig
from drift_jax.errors import ConfigError
from drift_jax.mesh.rows import ArrayRow, padded_vocab
from drift_jax.models.architecture import QwenConfig
from drift_jax.sharding import ACTIVATIONS, Layout, check_batch, check_sampling_batch
from drift_jax.stages.devices import split_for_sampling


def find_notes(qwen: QwenConfig, layout: Layout, arrays: Sequence[ArrayRow]) -> Iterator[str]:
    yield from _idle_axes(layout)
    if any("kv_heads" in row.whole for row in arrays):
        yield (
            f"kv_heads {qwen.kv_heads} cannot be split {layout.ways('kv_heads')} ways "
            f"({' x '.join(layout.rules['kv_heads'])}): each of these devices holds and computes all keys and values."
        )
    padded = padded_vocab(qwen.vocab_size, layout)
    if padded != qwen.vocab_size:
        yield (
            f"vocab {qwen.vocab_size} is padded to {padded} words where it meets tokens, for "
            f"{layout.ways('vocab_slice')} ways ({' x '.join(layout.rules['vocab_slice'])}). "
            "The added words count nowhere, and are in no checkpoint."
        )


# Work of a step, and the activations of which it is enough that one is split.
_WORK = {"attention": ("hidden states", "queries"), "MLP": ("hidden states", "MLP"), "logits": ("logits",)}


def _idle_axes(layout: Layout) -> Iterator[str]:
    """Axes whose devices do the same work."""
    for axis, size in layout.sizes.items():
        if size == 1:
            continue
        dims = {what: [dim for name in names for dim in ACTIVATIONS[name] if dim] for what, names in _WORK.items()}
        alike = [what for what, some in dims.items() if not any(axis in layout.rules[dim] for dim in some)]
        if {"attention", "MLP"} <= set(alike):
            yield (
                f"mesh axis {axis!r} ({size} devices) splits no work of the layers: its devices hold parts of weights "
                f"and compute the same. Let it split batch, length, heads or mlp (mesh.rules), or set mesh.{axis} to 1."
            )
        elif alike:
            yield (
                f"mesh axis {axis!r} ({size} devices) does not split {' and '.join(alike)}: "
                "there its devices compute the same."
            )


def find_problems(config: RunConfig, qwen: QwenConfig, layout: Layout, planned: bool) -> Iterator[str]:
    """What `drift run` would refuse. Where it samples depends on hosts, which planned devices do not have."""
    train, sampling = config.train, config.sampling
    checks = [lambda: check_batch(layout, train.batch_size, train.accumulation_steps)]
    if not planned and jax.process_count() == 1:
        devices = layout.mesh.devices.flatten().tolist()
        checks.append(lambda: check_sampling_batch(split_for_sampling(config, qwen, devices, ()), sampling.batch_size))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            yield str(error)
