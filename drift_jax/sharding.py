"""Sharding as data: logical dims of arrays on one side, mesh axes on the other, a table of rules between them.

Parameters and activations name their dims with the words of DESIGN (embed, heads, mlp, ...). A strategy is a table that
says which mesh axes split which dim; the config may change single rules of it. Nothing outside this file spells a mesh
axis. Splits, collectives and placement are XLA's work (GSPMD): the code never sends anything itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import combinations

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from drift_jax.config import MeshConfig
from drift_jax.errors import ConfigError

# Outermost first: what talks most (`tensor`, twice a layer) lies on neighbouring devices.
AXES = ("data", "fsdp", "sequence", "tensor")

Dims = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

# What each axis splits. A strategy is the sum over its axes; where several split one dim, this is their order.
# * `data`: pairs. Every device of it holds all weights.
# * `fsdp`: pairs and weights. A device holds a part of every weight, and gathers a layer's when it computes it.
# * `sequence`: the tokens of a row, for rows too long for one device. Queries stay where they are, keys and values of a
#   row are gathered; weights are split as over `fsdp`.
# * `tensor`: heads, the MLP's width and the vocabulary, within one pair (Megatron's way).
_SPLITS: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "hidden": (),  # the width of activations
    "embed": ("fsdp", "sequence"),  # the same dim of weights
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    # Where a table of the vocabulary meets tokens, the devices that share it see the tokens of all of them: rows are
    # then split like `rows`, and what is left of `embed` where they are split like `batch` again is `embed_of_batch`.
    "rows": ("data",),
    "embed_of_batch": ("sequence",),
    "vocab_slice": ("tensor", "fsdp", "sequence"),
}


def _split_by(axes: Sequence[str]) -> Rules:
    return {dim: tuple(axis for axis in split if axis in axes) for dim, split in _SPLITS.items()}


# One table per set of axes: "fsdp", "data+fsdp", "fsdp+tensor", "fsdp+sequence", ... in the config's order of axes.
_NAMED_AXES = ("data", "fsdp", "tensor", "sequence")
STRATEGIES: Mapping[str, Rules] = {
    "+".join(axes): _split_by(axes) for count in range(1, len(AXES) + 1) for axes in combinations(_NAMED_AXES, count)
}

# Every activation that the code places, by its dims; rules are checked against these before anything is computed.
ACTIVATIONS: Mapping[str, Dims] = {
    "hidden states": ("batch", "length", "hidden"),
    "queries": ("batch", "length", "heads", "head_dim"),
    "keys and values": ("batch", "length", "kv_heads", "head_dim"),
    "keys and values of rows": ("batch", None, "kv_heads", "head_dim"),
    "MLP": ("batch", "length", "mlp"),
    "embedded tokens": ("rows", None, "embed"),
    "embedded tokens, by row": ("batch", None, "embed_of_batch"),
    "logits": ("rows", None, "vocab_slice"),
}

# What cannot be split evenly of these dims is kept whole on each device instead of refused. Kv heads are few (2 to 8)
# and small. A table with an odd number of words is padded where it meets tokens, and split there.
REPLICATED_WHEN_INDIVISIBLE = frozenset({"kv_heads", "vocab"})


@dataclass(frozen=True, eq=False)
class Layout:
    """How arrays lie on devices: a mesh, and the rules by which it splits their dims."""

    mesh: Mesh
    rules: Rules
    strategy: str

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def platform(self) -> str:
        """`jax.Device.platform`: cpu, gpu, tpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def sizes(self) -> dict[str, int]:
        """Devices per axis, in the order of the config."""
        return {axis: self.mesh.shape[axis] for axis in _NAMED_AXES}

    @property
    def key(self) -> Hashable:
        """Equal for layouts by which the same program would be compiled."""
        return self.mesh, tuple(sorted(self.rules.items())), self.strategy

    def ways(self, dim: str | None) -> int:
        """Into how many parts the mesh splits a dim."""
        return _ways(self.mesh, self.rules, dim)


def build_layout(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The mesh and the rules of a config over `devices` (default: all of them).

    Raises:
      ConfigError: the sizes do not multiply to the number of devices; an unknown strategy, or dim or axis in
        `mesh.rules`; two dims of one array want the same axis; an axis with several devices splits nothing.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _fill_sizes(config, len(devices))
    strategy = config.strategy
    if strategy == "auto":
        strategy = "+".join(axis for axis in _NAMED_AXES if sizes[axis] > 1) or "fsdp"
    if strategy not in STRATEGIES:
        raise ConfigError(f"mesh.strategy {strategy!r} is not known; choose auto or one of {', '.join(STRATEGIES)}.")
    rules = _merge_rules(STRATEGIES[strategy], config.rules)
    used = {axis for axes in rules.values() for axis in axes}
    for axis, size in sizes.items():
        if size > 1 and axis not in used:
            raise ConfigError(
                f"mesh.strategy {strategy} splits nothing over mesh axis {axis!r}, which has {size} devices: all of "
                f"them would do the same work. Set mesh.{axis} to 1, or mesh.strategy to auto."
            )
    mesh = Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Layout(mesh, rules, strategy)


def _arrange(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the shape of the mesh, neighbours on the machine along its inner axes.

    Between slices of TPUs there is a slow network only: the pairs are split over them.

    Raises:
      ConfigError: neither `data` nor `fsdp` divides into the slices.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        # An axis may go over a part of a side of the slice, such as 8 x 2 on 4 x 4 chips.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = next((axis for axis in ("data", "fsdp") if sizes[axis] % slices == 0), None)
    if across is None:
        raise ConfigError(
            f"mesh {dict(sizes)}: the devices are {slices} slices, over which only pairs can be split. "
            f"Make mesh.data or mesh.fsdp a multiple of {slices}."
        )
    inside = tuple(size // slices if axis == across else size for axis, size in zip(AXES, shape, strict=True))
    outside = tuple(slices if axis == across else 1 for axis in AXES)
    return mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)


def _fill_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices per axis, with what is left in place of -1."""
    sizes = {axis: getattr(config, axis) for axis in _NAMED_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if any(size == -1 for size in sizes.values()):
        if devices % fixed:
            raise ConfigError(
                f"mesh {sizes}: {devices} devices cannot be divided by {fixed}. "
                "Choose sizes whose product divides the number of devices."
            )
        sizes = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ConfigError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, {devices} are here. "
            "Set one of mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence to -1 to take what is left."
        )
    return sizes


def _merge_rules(table: Rules, changes: Mapping[str, Sequence[str]]) -> Rules:
    """A strategy's table with the rules of the user in it, checked against all activations."""
    problems = []
    for dim, axes in changes.items():
        if dim not in table:
            problems.append(f"mesh.rules.{dim}: there is no such dim; known: {', '.join(sorted(table))}.")
        problems += [
            f"mesh.rules.{dim}: there is no mesh axis {axis!r}; known: {', '.join(_NAMED_AXES)}."
            for axis in axes
            if axis not in AXES
        ]
        if dim == "head_dim" and axes:
            problems.append("mesh.rules.head_dim: attention needs whole heads. Split heads and kv_heads instead.")
        if len(set(axes)) < len(axes):
            problems.append(f"mesh.rules.{dim}: a mesh axis can split a dim once, found {list(axes)}.")
    if problems:
        raise ConfigError("\n".join(problems))
    rules = {**table, **{dim: tuple(axes) for dim, axes in changes.items()}}
    if "embed_of_batch" not in changes:
        rules["embed_of_batch"] = _embed_of_batch(rules)
    check_activations(rules)
    return rules


def check_activations(rules: Rules) -> None:
    """Raises `ConfigError` where two dims of an activation want the same axis."""
    for name, dims in ACTIVATIONS.items():
        to_spec(dims, rules, name)


def _embed_of_batch(rules: Rules) -> tuple[str, ...]:
    return tuple(axis for axis in rules["embed"] if axis not in rules["batch"])


def to_spec(dims: Dims, rules: Rules, name: str = "array") -> PartitionSpec:
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
            raise ConfigError(f"{name}: dim {dim!r} of {dims} is not in the sharding rules; known: {sorted(rules)}.")
        for axis in rules[dim]:
            if axis in taken:
                raise ConfigError(
                    f"{name}: dims {taken[axis]!r} and {dim!r} of {dims} both want mesh axis {axis!r}; "
                    f"an axis can split one dim of an array. Change mesh.rules.{dim} or mesh.rules.{taken[axis]}."
                )
            taken[axis] = dim
        axes = rules[dim]
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*spec)


def build_sharding(layout: Layout, dims: Dims, shape: Sequence[int], name: str = "array") -> NamedSharding:
    """The placement of one array, with every split checked to be even.

    Raises:
      ConfigError: a dim is not divisible by the devices that split it (both numbers and the remedy).
    """
    spec = list(to_spec(dims, layout.rules, name))
    for i, (dim, size, axes) in enumerate(zip(dims, shape, spec, strict=True)):
        ways = layout.ways(dim)
        if size % ways == 0:
            continue
        if dim in REPLICATED_WHEN_INDIVISIBLE:
            spec[i] = None
            continue
        fitting = max(n for n in range(1, ways) if size % n == 0 and layout.devices % n == 0)
        raise ConfigError(
            f"{name}: dim {dim!r} of size {size} cannot be split {ways} ways (mesh {layout.sizes}). Choose mesh sizes "
            f"whose product over {axes!r} divides {size}, {fitting} for example, or change mesh.rules.{dim}."
        )
    return NamedSharding(layout.mesh, PartitionSpec(*spec))


def replicated(layout: Layout) -> NamedSharding:
    """The placement of small values that every device holds."""
    return NamedSharding(layout.mesh, PartitionSpec())


def put(array: np.ndarray | np.generic, sharding: NamedSharding) -> jax.Array:
    """A host array, the same on every process, onto the devices; each process sends what its own devices hold."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


# --- in force ----------------------------------------------------------------------------------------------

_rules_in_force: ContextVar[Rules] = ContextVar("rules_in_force")


@contextlib.contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    """Puts mesh and rules in force for what is traced and run in the block."""
    token = _rules_in_force.set(layout.rules)
    try:
        with jax.set_mesh(layout.mesh):
            yield
    finally:
        _rules_in_force.reset(token)


def _in_force() -> Rules:
    """Of a mesh that was set without a layout, the table of all axes."""
    return _rules_in_force.get(STRATEGIES["+".join(_NAMED_AXES)])


def split_ways(dim: str) -> int:
    """Into how many parts the mesh in force splits a dim; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(mesh, _in_force(), dim)


def _ways(mesh: Mesh | AbstractMesh, rules: Rules, dim: str | None) -> int:
    return 1 if dim is None else math.prod(mesh.shape[axis] for axis in rules[dim])


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Tells the compiler how an activation is split; without a mesh in force it does nothing.

    An indivisible dim is left to the compiler: activations of an odd-sized model still compute correctly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = list(to_spec(dims, _in_force()))
    for i, (dim, size) in enumerate(zip(dims, x.shape, strict=True)):
        if dim is not None and size % split_ways(dim):
            spec[i] = None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def run_per_device(
    function: Callable[..., jax.Array], args: Sequence[jax.Array], dims: Sequence[Dims], out_dims: Dims
) -> jax.Array:
    """`function` of each device's part of the arrays: for kernels, which XLA does not split by itself.

    Without a mesh in force, or on one device, it is a plain call. A dim that some array cannot have split evenly is
    split in none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*args)
    sizes = [pair for arg, names in zip(args, dims, strict=True) for pair in zip(names, arg.shape, strict=True)]
    uneven = {dim for dim, size in sizes if dim is not None and size % split_ways(dim)}
    rules = _in_force()
    specs = [to_spec(tuple(None if dim in uneven else dim for dim in names), rules) for names in (*dims, out_dims)]
    # A kernel does not say over which axes its results vary, so that cannot be checked.
    return jax.shard_map(function, in_specs=tuple(specs[:-1]), out_specs=specs[-1], check_vma=False)(*args)


# --- checks ------------------------------------------------------------------------------------------------


def check_batch(layout: Layout, batch_size: int, accumulation_steps: int) -> None:
    """Raises `ConfigError` when a micro-batch cannot be split evenly over the mesh."""
    ways = layout.ways("batch")
    micro = batch_size // accumulation_steps
    if micro % ways:
        raise ConfigError(
            f"train.batch_size ({batch_size}) / train.accumulation_steps ({accumulation_steps}) = {micro} pairs "
            f"cannot be split over {ways} devices (mesh {layout.sizes}: {_axes_of(layout, 'batch')}). "
            f"Make train.batch_size a multiple of {ways * accumulation_steps}, or change the mesh."
        )


def check_sampling_batch(layout: Layout, batch_size: int | None) -> None:
    """Raises `ConfigError` when the rows that are decoded together cannot be split evenly."""
    ways = layout.ways("batch")
    if batch_size is not None and batch_size % ways:
        raise ConfigError(
            f"sampling.batch_size ({batch_size}) cannot be split over {ways} devices "
            f"(mesh of the sampler {layout.sizes}: {_axes_of(layout, 'batch')}). Make it a multiple of {ways}, or null."
        )


def _axes_of(layout: Layout, dim: str) -> str:
    return " x ".join(layout.rules[dim]) or "no axis"
