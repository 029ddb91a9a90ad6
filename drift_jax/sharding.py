"""Sharding as data: logical dims of arrays on one side, mesh axes on the other, one table between them.

Parameters and activations name their dims with the words of DESIGN (embed, heads, mlp, ...). `RULES` says which
mesh axis splits which dim; nothing outside this file spells a mesh axis. Splits, collectives and placement are
XLA's work (GSPMD): the code never sends anything itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from drift_jax.config import MeshConfig
from drift_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")

Dims = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

# batch is split over `fsdp` as well: an fsdp device holds a part of every weight and computes its own pairs.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "head_dim": (),
    "length": (),
    # Where the vocabulary is cut as finely as it goes, the devices that share it look at each other's rows.
    "rows": ("data",),
    "vocab_slice": ("tensor", "fsdp"),
}

# A tensor axis wider than the number of kv heads keeps every kv head on each device instead of failing: kv
# heads are few (2 to 8) and small.
REPLICATED_WHEN_INDIVISIBLE = frozenset({"kv_heads"})

T = TypeVar("T")


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them) with the axes of `AXES`.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if any(size == -1 for size in sizes.values()):
        if len(devices) % fixed:
            raise ConfigError(
                f"mesh {sizes}: {len(devices)} devices cannot be divided by {fixed}. "
                "Choose sizes whose product divides the number of devices."
            )
        sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, {len(devices)} are here. "
            "Set one of mesh.data, mesh.fsdp, mesh.tensor to -1 to take what is left."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def to_spec(dims: Dims, rules: Rules = RULES) -> PartitionSpec:
    """Logical dims -> mesh axes.

    Raises:
      ConfigError: a dim is not in the table, or two dims of one array want the same mesh axis.
    """
    spec: list[tuple[str, ...] | str | None] = []
    taken: dict[str, str] = {}
    for dim in dims:
        if dim is None:
            spec.append(None)
            continue
        if dim not in rules:
            raise ConfigError(f"dim {dim!r} of {dims} is not in the sharding rules; known: {sorted(rules)}.")
        for axis in rules[dim]:
            if axis in taken:
                raise ConfigError(
                    f"dims {taken[axis]!r} and {dim!r} of {dims} both want mesh axis {axis!r}; "
                    "an axis can split one dim of an array. Change the rule of one of them."
                )
            taken[axis] = dim
        axes = rules[dim]
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*spec)


def build_sharding(mesh: Mesh, dims: Dims, shape: Sequence[int], name: str = "array") -> NamedSharding:
    """The placement of one array, with every split checked to be even.

    Raises:
      ConfigError: a dim is not divisible by the devices that split it (both numbers and the remedy).
    """
    spec = list(to_spec(dims))
    for i, (dim, size, axes) in enumerate(zip(dims, shape, spec, strict=True)):
        ways = _split_ways(mesh, dim)
        if size % ways == 0:
            continue
        if dim in REPLICATED_WHEN_INDIVISIBLE:
            spec[i] = None
            continue
        raise ConfigError(
            f"{name}: dim {dim!r} of size {size} cannot be split {ways} ways (mesh {dict(mesh.shape)}). "
            f"Choose mesh sizes whose product over {axes!r} divides {size}."
        )
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of small values that every device holds."""
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return _split_ways(mesh, "batch")


def split_ways(dim: str) -> int:
    """Into how many parts the mesh in force splits a dim; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _split_ways(mesh, dim)


def _split_ways(mesh: Mesh | AbstractMesh, dim: str | None) -> int:
    """Into how many parts the mesh splits a dim."""
    return 1 if dim is None else math.prod(mesh.shape[axis] for axis in RULES[dim])


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Tells the compiler how an activation is split; without a mesh in force it does nothing.

    An indivisible dim is left to the compiler: activations of an odd-sized model still compute correctly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = list(to_spec(dims))
    for i, (dim, size) in enumerate(zip(dims, x.shape, strict=True)):
        if size % _split_ways(mesh, dim):
            spec[i] = None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def run_per_device(
    function: Callable[..., jax.Array], args: Sequence[jax.Array], dims: Sequence[Dims], out_dims: Dims
) -> jax.Array:
    """`function` of each device's part of the arrays: for kernels, which XLA does not split by itself.

    Without a mesh in force it is a plain call. A dim that some array cannot have split evenly is split in none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*args)
    sizes = [pair for arg, names in zip(args, dims, strict=True) for pair in zip(names, arg.shape, strict=True)]
    uneven = {dim for dim, size in sizes if size % _split_ways(mesh, dim)}
    specs = [to_spec(tuple(None if dim in uneven else dim for dim in names)) for names in (*dims, out_dims)]
    # A kernel does not say over which axes its results vary, so that cannot be checked.
    return jax.shard_map(function, in_specs=tuple(specs[:-1]), out_specs=specs[-1], check_vma=False)(*args)


def check_batch(mesh: Mesh, batch_size: int, accumulation_steps: int) -> None:
    """Raises `ConfigError` when a micro-batch cannot be split evenly over the mesh."""
    ways = batch_ways(mesh)
    micro = batch_size // accumulation_steps
    if micro % ways:
        raise ConfigError(
            f"train.batch_size ({batch_size}) / train.accumulation_steps ({accumulation_steps}) = {micro} pairs "
            f"cannot be split over {ways} devices (mesh {dict(mesh.shape)}: data x fsdp). "
            f"Make train.batch_size a multiple of {ways * accumulation_steps}, or change the mesh."
        )


def check_sampling_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises `ConfigError` when the rows that are decoded together cannot be split evenly over the mesh."""
    ways = batch_ways(mesh)
    if batch_size % ways:
        raise ConfigError(
            f"sampling.batch_size ({batch_size}) cannot be split over {ways} devices "
            f"(mesh {dict(mesh.shape)}: data x fsdp). Make it a multiple of {ways}, or change the mesh."
        )
