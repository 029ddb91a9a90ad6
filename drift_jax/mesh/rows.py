"""Rows of a mesh report: hosts, rules, parameters, activations, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from drift_jax.config import RunConfig
from drift_jax.models.architecture import QwenConfig
from drift_jax.models.qwen import declare_qwen, is_declared
from drift_jax.sharding import ACTIVATIONS, STRATEGIES, Dims, Layout, to_spec
from drift_jax.step import TrainState

Axes = tuple[str, ...]


@dataclass(frozen=True)
class HostRow:
    """A process and its devices, by id, in the order of the mesh."""

    process: int
    devices: tuple[int, ...]


@dataclass(frozen=True)
class RuleRow:
    """A dim, the mesh axes that split it, and those that the strategy's table has for it."""

    dim: str
    axes: Axes
    table: Axes
    ways: int

    @property
    def changed(self) -> bool:
        return self.axes != self.table


@dataclass(frozen=True)
class ArrayRow:
    """A parameter or an activation. `spec` has the axes of each dim."""

    name: str
    dims: Dims
    shape: tuple[int | None, ...]  # None: known to the data only
    spec: tuple[Axes, ...]
    whole: Mapping[str, str]  # dims that rules would split and the mesh does not divide: why
    bytes_per_device: int | None = None


@dataclass(frozen=True)
class TotalRow:
    """All of a kind: bytes of one copy, and of what a device holds of it."""

    what: str
    dtype: str
    bytes: int
    bytes_per_device: int


@dataclass(frozen=True)
class BatchRow:
    """A micro-batch: pairs in all, and into how many parts its rows and their tokens are split."""

    pairs: int
    rows_split: int
    tokens_split: int


# --- mesh -------------------------------------------------------------------------------------------------


def processes(layout: Layout) -> np.ndarray:
    """Of each place of the mesh the process that has its device."""
    shape = layout.mesh.devices.shape
    return np.array([device.process_index for device in layout.mesh.devices.flat]).reshape(shape)


def find_axes_across(axes: Sequence[str], processes: np.ndarray) -> Axes:
    """The axes along which neighbours lie on different hosts, where what they send is slow."""
    return tuple(axis for i, axis in enumerate(axes) if np.diff(processes, axis=i).any())


def host_rows(layout: Layout) -> tuple[HostRow, ...]:
    hosts: dict[int, list[int]] = {}
    for device in layout.mesh.devices.flat:
        hosts.setdefault(device.process_index, []).append(device.id)
    return tuple(HostRow(process, tuple(ids)) for process, ids in sorted(hosts.items()))


def rule_rows(layout: Layout) -> tuple[RuleRow, ...]:
    table = STRATEGIES[layout.strategy]
    return tuple(RuleRow(dim, tuple(axes), table[dim], layout.ways(dim)) for dim, axes in layout.rules.items())


def batch_row(config: RunConfig, layout: Layout) -> BatchRow:
    train = config.train
    return BatchRow(train.batch_size // train.accumulation_steps, layout.ways("batch"), layout.ways("length"))


# --- arrays -----------------------------------------------------------------------------------------------


def _array_bytes(leaf: jax.ShapeDtypeStruct, dtype: Any = None) -> tuple[int, int]:
    """(of one copy, on one device)."""
    assert leaf.sharding is not None
    size = np.dtype(dtype or leaf.dtype).itemsize
    return math.prod(leaf.shape) * size, math.prod(leaf.sharding.shard_shape(leaf.shape)) * size


def parameter_rows(qwen: QwenConfig, params: Mapping[str, Any], layout: Layout) -> tuple[ArrayRow, ...]:
    """What is outside the layers first, then their parts."""
    _, declared = declare_qwen(qwen)
    rows = []
    for (name, leaf), (_, like) in zip(named(params), named(declared, is_declared), strict=True):
        spec = tuple(_as_axes(axes) for axes in leaf.sharding.spec)
        whole = _find_whole(like.dims, leaf.shape, layout)
        rows.append(ArrayRow(name, like.dims, leaf.shape, spec, whole, _array_bytes(leaf)[1]))
    return tuple(sorted(rows, key=lambda row: (row.name.rpartition(".")[0], row.name)))


def named(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _as_axes(entry: str | Axes | None) -> Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _find_whole(dims: Dims, shape: Sequence[int | None], layout: Layout) -> dict[str, str]:
    return {
        dim: f"{dim} {size} cannot be split {layout.ways(dim)} ways ({' x '.join(layout.rules[dim])})"
        for dim, size in zip(dims, shape, strict=True)
        if dim is not None and size is not None and size % layout.ways(dim)
    }


def activation_rows(qwen: QwenConfig, layout: Layout) -> tuple[ArrayRow, ...]:
    """As the code asks for them; what cannot be split is left to the compiler."""
    sizes = {
        "hidden": qwen.embed,
        "embed": qwen.embed,
        "embed_of_batch": qwen.embed,
        "heads": qwen.heads,
        "kv_heads": qwen.kv_heads,
        "head_dim": qwen.head_dim,
        "mlp": qwen.mlp,
        "vocab_slice": padded_vocab(qwen.vocab_size, layout),
    }
    rows = []
    for name, dims in ACTIVATIONS.items():
        shape = tuple(sizes.get(dim) if dim else None for dim in dims)
        whole = _find_whole(dims, shape, layout)
        spec = to_spec(tuple(None if dim in whole else dim for dim in dims), layout.rules, name)
        rows.append(ArrayRow(name, dims, shape, tuple(map(_as_axes, spec)), whole))
    return tuple(rows)


def padded_vocab(vocab: int, layout: Layout) -> int:
    """Words of a table where it meets tokens, and each device has a slice of it."""
    return vocab + -vocab % layout.ways("vocab_slice")


def total_rows(config: RunConfig, state: TrainState) -> tuple[TotalRow, ...]:
    """Gradients lie where parameters lie. The optimizer's are all its values, its counters too."""
    params, optimizer = jax.tree.leaves(state.params), jax.tree.leaves(state.opt_state)
    moments = [leaf for leaf in optimizer if leaf.ndim]
    count = len(moments) // len(params)
    name, gradients = f"{config.train.optimizer}, {count} moment{'s' * (count > 1)}", config.train.gradient_dtype
    kinds = (
        ("parameters", params[0].dtype.name, [_array_bytes(leaf) for leaf in params]),
        ("gradients", gradients, [_array_bytes(leaf, gradients) for leaf in params]),
        (name, "+".join(sorted({leaf.dtype.name for leaf in moments})), [_array_bytes(leaf) for leaf in optimizer]),
    )
    rows = [TotalRow(what, dtype, *map(sum, zip(*sizes, strict=True))) for what, dtype, sizes in kinds]
    together = TotalRow("together", "", sum(r.bytes for r in rows), sum(r.bytes_per_device for r in rows))
    return (*rows, together)
