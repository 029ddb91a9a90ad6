"""The three programs of a run, ready to compile for devices that need not be there.

They are what `drift run` compiles: the trainer's step, its reference pass, and the sampler's loop. The batch is one of
the largest: every pair has a prompt of `data.max_prompt_length` and two completions that go on to `data.max_length`;
the sampler decodes its rows with all the room they can need, on one host where it would sample there.
This is the one file of the plan that makes meshes and puts them in force.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drift_jax.config import RunConfig
from drift_jax.data.batches import PairBatch, batch_shardings, count_tokens
from drift_jax.data.pairs import TokenizedPair
from drift_jax.models.architecture import QwenConfig, qwen_config_from_hf
from drift_jax.models.intervals import KeySpans, find_overlap, to_intervals
from drift_jax.models.logps import choose_tile
from drift_jax.models.policy import Policy
from drift_jax.models.qwen import abstract_params, declare_qwen
from drift_jax.plan.flops import forward_flops
from drift_jax.plan.hlo import Instruction, Region, read_shapes
from drift_jax.plan.slices import Slice
from drift_jax.sampling.base import SamplingParams
from drift_jax.sampling.local import LocalSampler
from drift_jax.sampling.slots import round_length
from drift_jax.sharding import (
    Layout,
    build_layout,
    check_batch,
    check_sampling_batch,
    use_layout,
)
from drift_jax.stages.devices import fits_one_host, rows_that_fit, split_for_sampling
from drift_jax.stages.dpo import build_loader, build_trainer
from drift_jax.train import Trainer

PROGRAMS = ("train", "reference", "sampler")
_STEPS = 100  # of the schedule: no shape depends on it


class PairLengths(NamedTuple):
    """Tokens of every pair of the planned batch."""

    prompt: int
    completion: int  # of each side

    @property
    def longest(self) -> int:
        """Tokens that a pair takes in a row: its prompt once, and both completions."""
        return self.prompt + 2 * self.completion

    @staticmethod
    def of(config: RunConfig) -> PairLengths:
        prompt = min(config.data.max_prompt_length, config.data.max_length - 1)
        return PairLengths(prompt, config.data.max_length - prompt)


@dataclass(frozen=True)
class Programs:
    """What a config compiles on some devices."""

    config: RunConfig
    architecture: QwenConfig
    layout: Layout
    where: Slice
    trainer: Trainer
    batch: PairBatch  # on the host

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Axis -> devices in the order of the mesh: device i of a compiled program is its element i."""
        return dict(self.layout.mesh.shape)

    @property
    def tokens(self) -> int:
        """Real tokens of an update: prompts once, and both completions."""
        return count_tokens(self.batch)

    @property
    def step_flops(self) -> float:
        """What the pairs of an update need, forward and backward."""
        lengths = PairLengths.of(self.config)
        pair = forward_flops(self.architecture, lengths.prompt, lengths.completion, lengths.completion)
        return 3 * self.config.train.batch_size * pair

    def compile(self, name: str) -> jax.stages.Compiled:
        """A key of `PROGRAMS`. Raises what the compiler raises where it does not fit."""
        if name == "sampler":
            return self.compile_sampler(sampling_layout_of(self.config, self.architecture, self.where))
        with _named_after_this_source():
            state, batch = self.trainer.abstract_state, self._placed_batch()
            with use_layout(self.layout):
                if name == "reference":
                    return self.trainer.jitted_score.lower(state.params, batch).compile()
                return self.trainer.jitted_step.lower(state, batch).compile()

    def _placed_batch(self) -> PairBatch:
        return jax.tree.map(
            lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
            self.batch,
            batch_shardings(self.batch, self.layout),
        )

    def compile_sampler(self, layout: Layout) -> jax.stages.Compiled:
        """The decoding loop on the devices of a layout."""
        sampling = self.config.sampling
        graphdef, declared = declare_qwen(self.architecture, jnp.dtype(sampling.compute_dtype))
        weights = abstract_params(declared, layout, sampling.compute_dtype)
        rows = self._sampled_rows(layout, weights)
        sampler = LocalSampler(Policy(self.architecture, graphdef, weights, layout), rows, self.config.model.attention)
        room = round_length(sampling.max_input_length + sampling.max_new_tokens, sampler.room_steps)
        with _named_after_this_source(), use_layout(layout):
            return sampler.lower(
                SamplingParams.from_config(sampling, (0,), self.architecture.vocab_size), room
            ).compile()

    def _sampled_rows(self, layout: Layout, weights: Any) -> int:
        if (rows := self.config.sampling.batch_size) is not None:
            return rows
        limit, leaves = self.where.chip.limit_gib, jax.tree.leaves(weights)
        size = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
        free = float("inf") if limit is None else limit * 2**30 - size
        return rows_that_fit(self.config, layout, self.architecture, free)

    # --- what is known here and not in the compiled text ------------------------------------------------------

    def count_region(self, region: Region) -> float:
        """How often a loop turns whose length is known at run time only, and a branch is taken.

        A loop written in step.py goes over micro-batches, in logps.py over chunks of completion tokens, in
        sampling/local.py over new tokens, of which no row ends early. Other such loops (blocks of keys of the plain XLA
        attention) count once. An update is one that does not count changed weights (the conditional of optim.py).
        """
        where = region.sources[0] if region.sources else ""
        if not region.is_loop:
            return 0.0 if where.endswith("optim.py") else 1.0
        if where.endswith("step.py"):
            return float(self.batch.micro_batches)
        if where.endswith("logps.py"):
            return float(self.chunks)
        if where.endswith("local.py"):
            return float(self.config.sampling.max_new_tokens)
        return 1.0

    @cached_property
    def chunks(self) -> int:
        """Chunks of completion tokens whose logits are made in a micro-batch."""
        listed = int((self.batch.owners >= 0).sum(axis=2).max())
        groups, length = self.batch.owners.shape[1:]
        with use_layout(self.layout):
            tile = choose_tile(self.trainer.setup.platform, groups, self.architecture.vocab_size)
        return -(-listed // min(tile.tokens, length))

    def kernel_flops(self, instruction: Instruction) -> float:
        """Of an execution of the splash kernel, which is one row: whole blocks of it, those that are seen."""
        products = {"fwd": 2, "dq": 3, "dkv": 4}
        count = next((number for name, number in products.items() if f"splash_mha_{name}" in instruction.op_name), 0)
        operands = instruction.attributes.partition("operand_layout_constraints={")[2].partition("}}")[0]
        arrays = [shape for shape in read_shapes(operands) if len(shape.dims) == 3 and shape.dtype != "s32"]
        if not (count and arrays):
            return 0.0
        heads, _, head_dim = arrays[0].dims
        return 2.0 * count * heads * head_dim * self._seen_by_blocks

    @cached_property
    def _seen_by_blocks(self) -> float:
        """Pairs of (query, key) in the blocks that the kernel computes of a row, or of a device's part of it."""
        spans = KeySpans(*(jnp.asarray(span[0]) for span in self.batch.spans))
        length, parts = spans.own_start.shape[1], self.layout.ways("length")
        block = next(size for size in (512, 384, 256, 128, length) if length // parts % size == 0)
        overlap = np.asarray(find_overlap(to_intervals(spans)[1], block, block, length))
        return float(overlap.sum() / len(overlap) / parts) * block**2


def sampling_layout_of(config: RunConfig, model: QwenConfig, where: Slice) -> Layout:
    """The layout that `stages/devices.py` would sample with on these devices: of one host, or of all of them.

    Raises:
      ConfigError: `sampling.batch_size` cannot be split over the devices.
    """
    limit = None if where.chip.limit_gib is None else where.chip.limit_gib * 2**30
    per_host = bool(where.host) and config.sampling.per_host is not False
    on_host = per_host and (config.sampling.per_host or fits_one_host(config, model, [limit] * len(where.host)))
    layout = split_for_sampling(config, model, where.host if on_host else where.devices, [limit])
    check_sampling_batch(layout, config.sampling.batch_size)
    return layout


def resolve_mesh(config: RunConfig, devices: Sequence[Any]) -> dict[str, int]:
    """Mesh axis -> devices, as the config's mesh comes out over the devices. Raises `ConfigError` where it does not."""
    return build_layout(config.mesh, devices).sizes


def build_programs(config: RunConfig, architecture: dict[str, Any], where: Slice) -> Programs:
    """Everything but the compilation.

    Args:
      architecture: as in `config.json`.

    Raises:
      ConfigError: the mesh does not divide the devices, a dim of the model or a batch.
      ModelError: an architecture that is not computed here.
    """
    layout = build_layout(config.mesh, where.devices)
    check_batch(layout, config.train.batch_size, config.train.accumulation_steps)
    sizes = qwen_config_from_hf(architecture, config.model.path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(architecture), encoding="utf-8")
        trainer = build_trainer(config, Path(folder), layout, _STEPS)
    batch = build_loader(config, trainer, _longest_pairs(config)).shuffled(0)
    return Programs(config, sizes, layout, where, trainer, batch)


@contextlib.contextmanager
def _named_after_this_source() -> Iterator[None]:
    """Compiles what JAX's persistent cache has from other source files: `count_region` knows loops by their files."""
    key = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, key)
    jax.config.update(key, True)
    try:
        yield
    finally:
        jax.config.update(key, before)


def _longest_pairs(config: RunConfig) -> list[TokenizedPair]:
    prompt, completion = (np.zeros(count, np.int32) for count in PairLengths.of(config))
    return [TokenizedPair(str(i), prompt, completion, completion) for i in range(config.train.batch_size)]
